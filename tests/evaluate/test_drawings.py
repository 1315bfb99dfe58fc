"""Drawings from texts, against the codes that ``draw`` chooses for documents of training cut before the image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import SampleError
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.shards.token_grid import encode_grid
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate.drawings import draw_images
from mmscale.metrics.sample_images import Pixels
from mmscale.models.build import media_spec
from mmscale.models.generation import ImageGrid, draw
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.sampling import SamplingConfig
from tests.data_pipeline.conftest import picture
from tests.evaluate.drawing_models import (
    CODES,
    FIRST,
    ROW_END,
    STRIDE,
    Kind,
    dataset_block,
    drawing_data,
    drawing_model,
    with_tokens,
)

SAMPLING = SamplingConfig(temperature=0.8, top_k=9, seed=4)
TEXTS = ["a red fox", "the moon", "cat"]
SIZES: dict[Kind, Any] = {"vocabulary": (4, 6), "separate": None}
GRIDS: dict[Kind, tuple[int, int]] = {"vocabulary": (2, 3), "separate": (3, 3)}


def before_the_image(kind: Kind, caption: str, *, dropped: bool) -> list[int]:
    """Return the tokens of a training document before its first code; ``dropped``: of one without its text."""
    template = {"text_dropout": 0.999999} if dropped else {"text_dropout": 0.0}
    data = drawing_data(kind, **template)
    tokenizer = load_tokenizer(data.tokenizer)
    codes = np.zeros(GRIDS[kind], dtype=np.int64)
    parts = (ImagePart(picture(1), "png", None, encode_grid(codes, CODES, "ab" * 32)),)
    sample = Sample(parts, {"caption": caption}, Provenance("s", "s", "k", 0))
    rng: Any = np.random.default_rng(0) if dropped else None
    document = DocumentBuilder(data.datasets[0], tokenizer, media_spec(drawing_model(kind).config))(sample, rng)
    ids: list[int] = document.token_ids.tolist()
    return ids[: ids.index(FIRST[kind])]


def by_hand(kind: Kind, texts: list[str], guidance: float, sampling: SamplingConfig) -> tuple[list[Pixels], Any]:
    """Return pixels and codes that ``draw`` and the tokenizer give for documents of training."""
    net = drawing_model(kind)
    spec, tokenizer = media_spec(net.config), load_tokenizer(drawing_data(kind).tokenizer)
    prompts = [before_the_image(kind, text, dropped=False) for text in texts]
    if guidance > 1:
        prompts += [before_the_image(kind, text, dropped=True) for text in texts]
    empty = DocumentBuilder(drawing_data(kind).datasets[0], tokenizer, spec).build_drawing_prompt("x", 1, 1)
    batch = collate([Pack(tuple(with_tokens(empty, ids) for ids in prompts), lane=-1)], spec)
    row_end = tokenizer.special_id(ROW_END, "") if kind == "vocabulary" else None
    codes = draw(net, batch, [ImageGrid(*GRIDS[kind], row_end)] * len(texts), sampling, guidance=guidance)
    assert isinstance(net.image_tokenizer, ImageTokenizer)
    images = net.image_tokenizer.decode(torch.stack(codes))
    values = ((images + 1) / 2 * 255).round().to(torch.uint8)
    return [each.numpy() for each in values.permute(0, 2, 3, 1)], [each.tolist() for each in codes]


@pytest.mark.parametrize("kind", ["vocabulary", "separate"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawings_are_those_of_the_codes_after_a_training_prompt(kind: Kind, guidance: float) -> None:
    net, data = drawing_model(kind), drawing_data(kind)
    options: dict[str, Any] = {"size": SIZES[kind], "sampling": SAMPLING, "guidance": guidance}
    drawings = draw_images(net, data, media_spec(net.config), TEXTS, **options)
    pixels, codes = by_hand(kind, TEXTS, guidance, SAMPLING)
    assert [each.codes.tolist() for each in drawings] == codes
    for drawing, expected in zip(drawings, pixels, strict=True):
        assert drawing.pixels.shape == (GRIDS[kind][0] * STRIDE, GRIDS[kind][1] * STRIDE, 3)
        assert np.abs(drawing.pixels.astype(int) - expected).max() <= 1  # Rounding of a convolution over one image.
    assert len({each.codes.tobytes() for each in drawings}) == 3
    apart = [
        draw_images(net, data, media_spec(net.config), [text], **{**options, "sampling": SAMPLING.for_sequence(number)})
        for number, text in enumerate(TEXTS)
    ]
    assert [each.codes.tolist() for (each,) in apart] == codes
    small = draw_images(net, data, media_spec(net.config), TEXTS, **options, batch_size=2)
    assert [each.codes.tolist() for each in small] == codes


def test_a_text_fills_the_only_field_of_the_prompt_and_replaces_any_other_prompt() -> None:
    net = drawing_model("vocabulary")

    def codes(text: Any, *prompts: str) -> list[list[int]]:
        data = drawing_data("vocabulary", prompts=prompts)
        (drawing,) = draw_images(net, data, media_spec(net.config), [text], size=8, sampling=SamplingConfig())
        return drawing.codes.tolist()  # type: ignore[no-any-return]

    whole = codes("draw a fox:", "{caption}")
    assert codes("a fox", "draw {caption}:") == codes("a fox", "draw {names.first}:", "{b}") == whole
    assert codes("draw a fox:", "{a} in {b}") == codes("draw a fox:", "nothing") == whole
    assert codes({"a": "draw", "b": "a fox:"}, "{a} {b}") == whole != codes("a cat", "draw {caption}:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": None}, r"give a size: data set drawn has images of several .* --size 32"),
        ({"size": 7}, "size 7x7: both sides must be multiples of the 2 pixels"),
        ({"size": (8, 0)}, "size 8x0"),
        ({"size": 1 << 14}, "at most 8192"),
        ({"guidance": 0.5}, "guidance 0.5: must be at least 1"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"sampling": SamplingConfig(repetition_penalty=1.2)}, "repetition penalty 1.2: images repeat codes"),
        ({"net": {"image_tokenizer": None}}, "has no image tokenizer .*--tokenizer RUN"),
        ({"data": {"caption_last": 1.0}}, "no data set of this run has a text before an image"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    net, data = (
        drawing_model("vocabulary", **change.pop("net", {})),
        drawing_data("vocabulary", **change.pop("data", {})),
    )
    with pytest.raises(ConfigError, match=message):
        draw_images(net, data, media_spec(net.config), ["a"], **{"size": 8, **change})


def test_other_refusals() -> None:
    net = drawing_model("separate")
    spec, data = media_spec(net.config), drawing_data("separate")
    with pytest.raises(ConfigError, match=r"size 8x8: the model draws 6x6 pixels .*leave the size out"):
        draw_images(net, data, spec, ["a"], size=8)
    with pytest.raises(ConfigError, match=r"a text with 3x3 codes needs \d+ positions, and the model has 12"):
        draw_images(net, data, replace(spec, max_document_tokens=12), ["a"])
    with pytest.raises(SampleError, match="the text to draw is empty"):
        draw_images(net, data, spec, [" "])
    other = {**dataset_block("separate"), "template": {"kind": "text"}}
    silent = drawing_data("separate").model_validate({**data.model_dump(), "datasets": [other]})
    with pytest.raises(ConfigError, match="no data set of this run"):
        draw_images(net, silent, spec, ["a"])
    with pytest.raises(ConfigError, match="this model draws no images"):
        draw_images(torch.nn.Linear(1, 1), data, spec, ["a"])
