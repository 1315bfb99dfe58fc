from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.sample import ImagePart, Part, Provenance, Sample, StoredFrames, TextPart, VideoPart
from data_pipeline.text.templates import CaptionTemplate, InterleavedTemplate, TemplateConfig
from mmscale.errors import ConfigError, MMScaleError
from mmscale.evaluate.answers import caption_images, respond
from mmscale.metrics.sample_images import Pixels
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig
from tests.evaluate.emoji_models import ALONE, EMOJI, continued, data_config, evaluation, tiny_model
from tests.videos import encoded


def _image(seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def describe_image(model: MultimodalModel, image: Path, data: DataConfig, spec: MediaSpec, **options: Any) -> str:
    (text,) = respond(model, data, spec, images=[image], **options)
    return text


def _file(folder: Path, format_name: str, pixels: Pixels) -> Path:
    path = folder / f"picture.{format_name}"
    Image.fromarray(pixels).save(path, format_name, **({"lossless": True} if format_name == "webp" else {}))
    return path


def _greedy(model: MultimodalModel, data: DataConfig, image: bytes, prompt: str, steps: int) -> str:
    """Generate with a whole forward pass per token, without a cache."""
    parts = (ImagePart(image, "png"),)
    return _continued(model, data, CaptionTemplate(prompts=(prompt,), answers=("x",)), parts, steps)


def _continued(
    model: MultimodalModel, data: DataConfig, template: TemplateConfig, parts: tuple[Part, ...], steps: int
) -> str:
    return continued(model, data, template, Sample(parts, {}, Provenance("t", "t", "t", 0)), steps)


@pytest.mark.parametrize("kind", ["cross_attention", "embedding"])
def test_a_description_is_what_greedy_decoding_by_hand_gives(kind: str, tmp_path: Path) -> None:
    model, data = tiny_model(kind), data_config()
    path = _file(tmp_path, "png", _image())
    text = describe_image(model, path, data, media_spec(model.config), max_new_tokens=6)
    assert text == _greedy(model, data, path.read_bytes(), "name:", 6)
    other = describe_image(model, path, data, media_spec(model.config), prompt="a {b}", max_new_tokens=6)
    assert other == _greedy(model, data, path.read_bytes(), "a {{b}}", 6)


@pytest.mark.parametrize("kind", ["dialogue", "annotations"])
def test_a_question_to_a_model_of_dialogues_is_asked_in_their_format(kind: str, tmp_path: Path) -> None:
    model, data = tiny_model("embedding"), data_config()
    path, spec = _file(tmp_path, "png", _image()), media_spec(model.config)
    template = {"kind": "dialogue"} if kind == "dialogue" else {"kind": kind, "each": {"kind": "dialogue"}}
    (dataset,) = data.model_dump()["datasets"]
    chatty = DataConfig.model_validate(data.model_dump() | {"datasets": [{**dataset, "template": template}]})
    answer = describe_image(model, path, chatty, spec, prompt="a {b}?", max_new_tokens=6)
    words = [TextPart(text) for text in ("USER: ", "a {b}?", " ", "ASSISTANT: ", "the answer")]
    parts = (words[0], ImagePart(path.read_bytes(), "png"), *words[1:])
    assert answer == _continued(model, data, InterleavedTemplate(), parts, 6)
    with pytest.raises(ConfigError, match="cannot be made for an image without fields"):
        describe_image(model, path, chatty, spec)


def test_lossless_formats_are_described_alike_and_jpeg_is_read(tmp_path: Path) -> None:
    model, data = tiny_model(), data_config()
    spec = media_spec(model.config)
    png, webp, jpeg = (_file(tmp_path, name, _image()) for name in ("png", "webp", "jpeg"))
    assert describe_image(model, png, data, spec) == describe_image(model, webp, data, spec) != ""
    assert describe_image(model, jpeg, data, spec)


def test_draws_are_repeatable_and_follow_the_seed(tmp_path: Path) -> None:
    model, data = tiny_model(), data_config()
    path, spec = _file(tmp_path, "png", _image()), media_spec(model.config)

    def answer(seed: int) -> str:
        sampling = SamplingConfig(temperature=5.0, top_p=1.0, seed=seed)
        return describe_image(model, path, data, spec, sampling=sampling, max_new_tokens=8)

    assert answer(1) == answer(1) != answer(2)


def test_captions_of_a_set_are_those_of_its_single_images(tmp_path: Path) -> None:
    model, data = tiny_model(), data_config()
    spec = media_spec(model.config)
    block = evaluation().model_dump() | {"captions": {"num_images": 3, "max_new_tokens": 5}}
    config = type(evaluation()).model_validate(block)
    captioned = caption_images(model, config, data, spec, ALONE)
    assert [one.set for one in captioned] == ["both"] * 3
    for one in captioned:
        path = _file(tmp_path, "png", one.pixels)
        assert one.generated == describe_image(model, path, data, spec, prompt="name:", max_new_tokens=5)
        assert max(one.pixels.shape) <= 256


def test_no_captions_where_none_are_wanted() -> None:
    model = tiny_model()
    config = evaluation().model_copy(update={"captions": None})
    assert caption_images(model, config, data_config(), media_spec(model.config), ALONE) == []


def test_clips_have_no_captions() -> None:
    model, images = tiny_model("embedding"), data_config({"kind": "native"}).model_dump()
    data = type(data_config()).model_validate({**images, "datasets": [{**images["datasets"][0], "video": {}}]})
    clips = EMOJI.parent / "omni/shards/clips-heldout-both.manifest"
    config = evaluation(manifest=clips, field="motion", choices=None, limit=None)
    assert config.captions is not None
    assert caption_images(model, config, data, media_spec(model.config), ALONE) == []


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    model, data = tiny_model(), data_config()
    spec = media_spec(model.config)
    with pytest.raises(MMScaleError, match=r"absent\.png: no such file"):
        describe_image(model, tmp_path / "absent.png", data, spec)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(SampleError, match=r"text\.png: no JPEG, PNG or WebP"):
        describe_image(model, text, data, spec)
    buffer = io.BytesIO()
    Image.fromarray(_image()).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:200])
    with pytest.raises(SampleError, match="damaged png"):
        describe_image(model, tmp_path / "cut.png", data, spec)


def test_a_prompt_that_needs_fields_asks_for_one(tmp_path: Path) -> None:
    model, data = tiny_model(), data_config()
    template = CaptionTemplate(prompts=("of the {group}:",))
    dataset = data.datasets[0].model_copy(update={"template": template})
    data = data.model_copy(update={"datasets": (dataset,)})
    with pytest.raises(ConfigError, match=r"'group' is missing.*give a prompt"):
        describe_image(model, _file(tmp_path, "png", _image()), data, media_spec(model.config))


def _text_model() -> MultimodalModel:
    model = build_model(ModelConfig(decoder=tiny_model().config.decoder), seed=3).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


def _taught(template: dict[str, Any]) -> DataConfig:
    data = data_config()
    (dataset,) = data.model_dump()["datasets"]
    return DataConfig.model_validate(data.model_dump() | {"datasets": [{**dataset, "template": template}]})


def test_a_text_model_goes_on_with_a_text_from_its_beginning_or_from_where_it_is_given() -> None:
    model, data = _text_model(), _taught({"kind": "text"})
    spec = media_spec(model.config)
    assert respond(model, data, spec, prompt="a {b}", max_new_tokens=6) == [
        _continued(model, data, InterleavedTemplate(), (TextPart("a {b}"), TextPart("x")), 6)
    ]
    begun = _continued(model, data, CaptionTemplate(prompts=("",), answers=("x",)), (), 6)
    assert (
        respond(model, data, spec, max_new_tokens=6)
        == [begun]
        == respond(model, data, spec, prompt="", max_new_tokens=6)
    )
    with pytest.raises(ConfigError, match="give an image or a prompt"):
        respond(model, data_config(), spec)
    for place in ("<image>", "<image-2>"):
        with pytest.raises(ConfigError, match=f"prompt contains {place}, and no image is given; add --image FILE"):
            respond(model, data, spec, prompt=f"{place} is")


def test_an_image_model_answers_a_prompt_without_an_image() -> None:
    model, data = tiny_model("embedding"), data_config()
    parts = (TextPart("a rose is"), TextPart("x"))
    answer = respond(model, data, media_spec(model.config), prompt="a rose is", max_new_tokens=6)
    assert answer == [_continued(model, data, InterleavedTemplate(), parts, 6)]


def test_an_image_is_not_left_out_where_training_begins_with_texts(tmp_path: Path) -> None:
    model, data = tiny_model("embedding"), _taught({"kind": "text"})
    path, spec = _file(tmp_path, "png", _image()), media_spec(model.config)
    parts = (ImagePart(path.read_bytes(), "png"),)
    expected = _continued(model, data, CaptionTemplate(prompts=("",), answers=("x",)), parts, 6)
    assert describe_image(model, path, data, spec, max_new_tokens=6) == expected


@pytest.mark.parametrize("kind", ["caption", "dialogue"])
@pytest.mark.parametrize(
    ("prompt", "order"),
    [("a <image> b <image> c", "a 0 b 1 c"), ("a <image-2> b <image-1> c", "a 1 b 0 c"), ("which?", "01which?")],
)
def test_several_images_stand_where_the_prompt_says(kind: str, prompt: str, order: str, tmp_path: Path) -> None:
    model, data = tiny_model("embedding"), _taught({"kind": kind})
    spec = media_spec(model.config)
    paths = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        paths.append(_file(tmp_path / str(number), "png", _image(number)))
    images = {str(number): ImagePart(path.read_bytes(), f"{number}.png") for number, path in enumerate(paths)}
    parts: list[Part] = [
        images[piece] if piece in images else TextPart(piece) for piece in re.split("([01])", order) if piece
    ]
    if kind == "dialogue":
        parts = [TextPart("USER: "), *parts, TextPart(" "), TextPart("ASSISTANT: ")]
    answer = respond(model, data, spec, images=paths, prompt=prompt, max_new_tokens=6)
    assert answer == [_continued(model, data, InterleavedTemplate(), (*parts, TextPart("x")), 6)]
    other = respond(model, data, spec, images=paths[::-1], prompt=prompt, max_new_tokens=6)
    assert other != answer  # The order of the images matters.


@pytest.mark.parametrize("tags", ["text", "keys"])
@pytest.mark.parametrize("kind", ["hybrid", "cross_attention"])
def test_tiles_and_their_tags_are_attended_to_the_end_of_an_answer(kind: str, tags: str, tmp_path: Path) -> None:
    layout = {"tile": "<{n}>", "overview": "<all>", "attended_tags": tags, "spell": True}
    tiles = {"kind": "tiles", "size": 16, "tiling": {"kind": "internvl", "max_tiles": 4}, "layout": layout}
    model, data = tiny_model(kind), data_config(tiles)
    pictures = [_image(0), _image(1)[:, :24]]
    parts: list[Part] = [TextPart("a ")]
    for number, (pixels, text) in enumerate(zip(pictures, (" b ", " c"), strict=True)):
        path = _file(tmp_path, "png", pixels).rename(tmp_path / f"{number}.png")
        parts += [ImagePart(path.read_bytes(), "png"), TextPart(text)]
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    spec = media_spec(model.config)
    answer = respond(model, data, spec, images=paths, prompt="a <image> b <image> c", max_new_tokens=6)
    assert answer == [_continued(model, data, InterleavedTemplate(), (*parts, TextPart("x")), 6)]
    assert answer != respond(model, data, spec, images=paths[::-1], prompt="a <image> b <image> c", max_new_tokens=6)


def test_images_and_places_must_agree(tmp_path: Path) -> None:
    model, data = tiny_model(), data_config()
    path, spec = _file(tmp_path, "png", _image()), media_spec(model.config)
    for prompt in ("<image> and <image>", "<image-2>"):
        with pytest.raises(ConfigError, match="prompt refers to image number 2, and --image gives 1; add --image"):
            respond(model, data, spec, images=[path], prompt=prompt)
    with pytest.raises(SampleError, match="shows 1 of 2 images"):
        respond(model, data, spec, images=[path, path], prompt="<image> only")


def test_answers_are_drawn_one_by_one_and_end_where_they_shall() -> None:
    model, data = _text_model(), _taught({"kind": "text"})
    spec, sampling = media_spec(model.config), SamplingConfig(temperature=3.0, seed=1)
    texts = respond(model, data, spec, prompt="a", num=3, sampling=sampling, max_new_tokens=8)
    assert len(set(texts)) == 3
    grown: list[str] = []
    whole = respond(model, data, spec, prompt="a", max_new_tokens=8, show=grown.append)
    assert grown[-1].strip() == whole[0]
    assert [len(text) for text in grown] == sorted(len(text) for text in grown)
    stop = whole[0][3:5]
    assert respond(model, data, spec, prompt="a", max_new_tokens=8, stop=[stop, "never said"]) == [
        whole[0][: whole[0].index(stop)].strip()
    ]


def test_what_closes_a_turn_ends_an_answer() -> None:
    model = _text_model()
    spec = media_spec(model.config)
    turns = {"user": {"prefix": "Q"}, "assistant": {"prefix": "A", "weight": 1}}
    data = _taught({"kind": "dialogue", "roles": turns, "end": "none"})
    parts = (TextPart("Q"), TextPart("who?"), TextPart("A"), TextPart("x"))
    free = respond(model, data, spec, prompt="who?", max_new_tokens=8)
    assert free == [_continued(model, data, InterleavedTemplate(), parts, 8)]
    grown: list[str] = []
    assert respond(model, data, spec, prompt="who?", max_new_tokens=8, show=grown.append) == free
    name = grown[3][len(grown[2]) :].replace(" ", "▁")  # Piece of the fourth token.
    closed = {**turns, "assistant": {"prefix": "A", "suffix": name, "weight": 1}}
    data = _taught({"kind": "dialogue", "roles": closed, "special_tokens": [name], "end": "none"})
    (answer,) = respond(model, data, spec, prompt="who?", max_new_tokens=8)
    assert answer == grown[2].strip() != free[0]


def test_a_text_model_cannot_look(tmp_path: Path) -> None:
    model = _text_model()
    with pytest.raises(ConfigError, match="no vision tower"):
        describe_image(model, _file(tmp_path, "png", _image()), data_config(), media_spec(model.config))


def test_a_question_about_videos_is_what_greedy_decoding_by_hand_gives(tmp_path: Path) -> None:
    model, data = tiny_model("embedding"), data_config()
    path, spec = tmp_path / "clip.webm", media_spec(model.config)
    path.write_bytes(encoded(5, kind="webm"))
    with pytest.raises(ConfigError, match="the first data set has no block video"):
        respond(model, data, spec, videos=[path])
    (dataset,) = data.model_dump()["datasets"]
    block = {**dataset, "video": {"min_pixels": 64, "max_pixels": 1024}}
    data = DataConfig.model_validate(data.model_dump() | {"datasets": [block]})
    (answer,) = respond(model, data, spec, videos=[path], prompt="what? <video>", max_new_tokens=6)
    parts = (TextPart("what? "), VideoPart(path.read_bytes(), "webm"), TextPart("the answer"))
    assert answer == _continued(model, data, InterleavedTemplate(), parts, 6)
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in (10, 9):
        Image.fromarray(_image(number)).save(frames / f"{number}.png")
    with pytest.raises(MMScaleError, match=r'frames: no video in frames, .* in frames.json beside it: {"fps": 8}'):
        respond(model, data, spec, videos=[frames])
    (tmp_path / "frames.json").write_text('{"fps": 2}')
    (answer,) = respond(model, data, spec, videos=[frames], prompt="what? <video>", max_new_tokens=6)
    images = tuple((frames / f"{number}.png").read_bytes() for number in (9, 10))
    parts = (TextPart("what? "), VideoPart(StoredFrames(images, 2.0), "png"), TextPart("the answer"))
    assert answer == _continued(model, data, InterleavedTemplate(), parts, 6)
    for prompt, words in (("<video> <video>", "video number 2, and --video gives 1"), ("<image>", "no image is given")):
        with pytest.raises(ConfigError, match=words):
            respond(model, data, spec, videos=[path], prompt=prompt)
