"""Imported Idefics3 and SmolVLM give the results of transformers, and an export restores the folder bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.images.crops import TORCH_HAS_LANCZOS
from data_pipeline.images.native_sizes import longest_edge_size
from data_pipeline.images.tilings import Idefics3Tiling
from data_pipeline.media_spec import MediaSpec
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageSource
from mmscale.hf.layouts import layout_of
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.build import media_spec
from tests.hf.pages import (
    AUTO,
    BOS,
    EOS,
    PAD,
    Page,
    Seen,
    builder,
    load,
    normalised,
    odd_pages,
    save_tokenizer,
    written,
)
from tests.hf.reference_models import imported, loaded, tensors_of
from tests.hf.train_and_export import VOCABULARY, captions, train_and_export
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

LANCZOS = pytest.mark.skipif(not TORCH_HAS_LANCZOS, reason="the processor resizes with another filter")
pytestmark = [pytest.mark.parity, LANCZOS]
BOUND, GRADIENT_BOUND = 2e-6, 8e-6
IMAGE, FAKE, WHOLE, END = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
TAGS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL = [IMAGE, FAKE, END, WHOLE, *TAGS]  # Ids 3 to 42.
CASES: dict[str, dict[str, Any]] = {
    "idefics3, as SmolVLM 256M": {"side": 32, "patch": 4, "scale_factor": 4},
    "smolvlm, as 2.2B, pixels left over": {"side": 48, "patch": 7, "scale_factor": 3},
    "idefics3, as 8B, tags are text": {"side": 28, "patch": 7, "scale_factor": 2, "tags": False, "tied": True},
}
"""The family is the first word. ``side``: pixels of a tile; ``tags``: whether the tags of tiles are tokens."""
FIRST, SECOND, THIRD = CASES


def reference_model(name: str = FIRST, seed: int = 0, vocabulary: int = 304) -> Any:
    """Return a tiny random model. The image token is 3, or 4 with the emoji tokenizer's vocabulary."""
    import transformers

    one = CASES[name]
    kind = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[name.partition(",")[0]]
    sizes = {"intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        text_config={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            **sizes,
        },
        vision_config={"hidden_size": 32, "image_size": one["side"], "patch_size": one["patch"], **sizes},
        scale_factor=one["scale_factor"],
        image_token_id=4 if vocabulary == VOCABULARY else 3,
        tie_word_embeddings=one.get("tied", False),
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    randomise(model, seed)
    return model.eval()


def pixels(name: str = FIRST) -> dict[str, Any]:
    """Return the arguments of the image processor: at most two tiles along a side."""
    side = CASES[name]["side"]
    return {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}


def processor(tokenizer: Path, name: str, **more: Any) -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

    one = CASES[name]
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[IMAGE]
    )
    features = (one["side"] // one["patch"] // one["scale_factor"]) ** 2
    return Idefics3Processor(Idefics3ImageProcessor(**pixels(name), **more), words, features)


def transforms_of(name: str, model: Any, **more: Any) -> dict[str, Any]:
    """Return the transforms that the import derives from the image processor."""
    from transformers import Idefics3ImageProcessor

    values = {PREPROCESSOR: json.loads(Idefics3ImageProcessor(**pixels(name), **more).to_json_string())}
    images = layout_of("idefics3").images
    assert images is not None
    found = images(ImageSource(model.config, values, {}, "config.json")).transforms
    spell = {} if CASES[name].get("tags", True) else {"spell": "tags"}
    return {**found, "layout": {**found["layout"], **spell}}


def seen(folder: Path, model: Any, pages: list[Page], name: str = FIRST, **more: Any) -> Seen:
    special = SPECIAL if CASES[name].get("tags", True) else SPECIAL[:3]
    path = save_tokenizer(folder / "tokenizer.json", special)
    theirs = processor(path, name, **more)

    def process(page: Page) -> dict[str, Tensor]:
        text, pictures = written(page, IMAGE)
        inputs = theirs(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False)
        return dict(inputs)

    transforms = transforms_of(name, model, **more)
    return Seen.of(builder(load(path, IMAGE), media_spec(model.config), transforms), process, pages)


def test_smolvlm_is_exported_under_both_names(tmp_path: Path) -> None:
    """Both families hold the same model, so an export without ``--like`` takes the first."""
    reference_model(SECOND).save_pretrained(tmp_path / "theirs")
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    before = tensors_of(tmp_path / "theirs")
    for name, like in (("smolvlm", tmp_path / "theirs"), ("idefics3", None)):
        report = export_weights(checkpoint, tmp_path / name, to=HuggingFace(like))
        assert report.family == loaded(tmp_path / name, AUTO).config.model_type == name
        after = tensors_of(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("block", "change", "message"),
    [
        (None, {"scale_factor": 0}, "scale_factor=0 must be at least 1"),
        (None, {"scale_factor": 3}, "connector.projector.merge=3: must divide both sides"),
        ("vision_config", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("text_config", {"model_type": "gemma"}, "model_type='gemma'"),
        ("text_config", {"qk_layer_norms": True}, "qk_layer_norms=True is not known"),
    ],
)
def test_unsupported_values_are_rejected(block: str | None, change: dict[str, Any], message: str) -> None:
    values = json.loads(reference_model().config.to_json_string(use_diff=False))
    (values if block is None else values[block]).update(change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        layout_of("idefics3").model_config(values, "config.json")


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_pictures_are_cut_and_placed_as_theirs(name: str, tmp_path: Path, parity: Recorder) -> None:
    """Compare the number, order and pixels of crops, and the tokens, with several pictures and text between them."""
    reference_model(name).save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    pages = seen(tmp_path, ours, odd_pages(100 if name == FIRST else 20, 4, 150), name)  # Asserts equal token ids.
    patch, places = CASES[name]["patch"], CASES[name]["side"] // CASES[name]["patch"]
    for document, inputs in zip(pages.documents, pages.inputs, strict=True):
        values = torch.cat([torch.from_numpy(item.values) for item in document.items])
        whole = inputs["pixel_values"][0, :, :, : places * patch, : places * patch]
        expected = whole.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
        error = distance(normalised(ours.config.vision, values), expected.reshape(len(values), -1))
        parity("idefics3", "pixels", error, BOUND)


def test_images_that_are_not_split_are_theirs(tmp_path: Path, parity: Recorder) -> None:
    reference_model().save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    pages = seen(tmp_path, ours, odd_pages(20, 4, 150), FIRST, do_image_splitting=False)
    for document, inputs in zip(pages.documents, pages.inputs, strict=True):
        values = torch.cat([torch.from_numpy(item.values) for item in document.items])
        expected = inputs["pixel_values"][0].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        error = distance(normalised(ours.config.vision, values), expected.reshape(len(values), -1))
        parity("idefics3", "pixels", error, BOUND)


def test_a_processor_of_another_size_is_rejected() -> None:
    images, model = layout_of("idefics3").images, layout_of("idefics3")
    config = model.model_config(json.loads(reference_model().config.to_json_string(use_diff=False)), "config.json")
    assert images is not None
    values = {PREPROCESSOR: {"max_image_size": {"longest_edge": 64}, "image_mean": 0.5, "image_std": 0.5}}
    with pytest.raises(CheckpointError, match="max_image_size=64 differs from the tower's 32 pixels"):
        images(ImageSource(config, values, {}, "config.json"))


def test_sizes_of_ten_thousand_images_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ``get_number_of_image_patches`` differs from what they do where ``longest`` is no multiple of a tile."""
    from transformers.models.idefics3 import image_processing_idefics3 as reference

    theirs = reference.Idefics3ImageProcessor()
    monkeypatch.setattr(theirs, "resize", lambda image, size, resample: (size.height, size.width))
    rng, spec = np.random.default_rng(0), MediaSpec(patch_size=16, fixed_grid=(32, 32))
    for longest in (2048, 1000, 501, 5000):
        ours = Idefics3Tiling(longest_side=longest)
        for size in np.exp(rng.uniform(1, 8, (2_500, 2))).astype(int).tolist():
            first = reference.get_resize_output_image_size(torch.empty(3, *size, device="meta"), longest)
            whole = theirs.resize_for_vision_encoder(torch.empty(3, *first, device="meta"), 512)
            tiled = ours.plan(tuple(size), 512, spec)
            assert tiled.canvases[0].steps == (first, whole), (longest, size)
            assert tiled.grid in ours.grids(512)
            assert len(tiled.tiles) == (1 if whole == (512, 512) else whole[0] * whole[1] // 512**2 + 1)


def test_the_reference_counts_positions_of_whole_crops_from_0() -> None:
    """Fractions of a whole crop fall into the buckets 0, 1, 2, ..., so learned positions need no buckets."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

    for places in (24, 26, 27, 32, 70):
        config = Idefics3VisionConfig(hidden_size=1, num_attention_heads=1, image_size=places, patch_size=1)
        embeddings = Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            embeddings.position_embedding.weight.copy_(torch.arange(places**2)[:, None])
            found = embeddings(torch.zeros(1, 3, places, places), torch.ones(1, places, places, dtype=torch.bool))
        assert found.flatten().tolist() == list(range(places**2))


@pytest.mark.parametrize(("size", "longest", "expected"), [((1, 5000), 2048, (1, 2048)), ((900, 700), 501, (501, 390))])
def test_sides_are_even_and_at_least_1(size: tuple[int, int], longest: int, expected: tuple[int, int]) -> None:
    assert longest_edge_size(*size, longest) == expected


@pytest.mark.slow
def test_trained_on_two_ranks_and_generated_from(tmp_path: Path) -> None:
    reference_model(vocabulary=VOCABULARY).save_pretrained(tmp_path / "theirs")
    transforms = {"kind": "tiles", "tiling": {"kind": "idefics3", "longest_side": 64}}
    again = loaded(train_and_export(tmp_path / "theirs", tmp_path, captions(transforms)), AUTO)
    inputs = {
        "input_ids": torch.tensor([[1, *[4] * 8, 9]]),
        "pixel_values": torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    }
    ids = again.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.shape == (1, 15)
    assert ids[0, 10] == again(**inputs).logits[0, -1].argmax()
