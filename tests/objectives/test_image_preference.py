"""Preference pairs of images as tokens, against one forward pass for each text with one image.

The sequences of the comparison are documents of ``template.kind=drawing``. The tolerances are those of
``test_preference``, which gives the measured worst case.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.packing.truncation import split
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.shards.token_grid import encode_grid
from data_pipeline.text.templates import PreferenceTemplate
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer
from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from mmscale.objectives.preference import Preference
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import PreferenceConfig
from tests.models.tiny import config
from tests.objectives.answers import written_out_of
from tests.objectives.test_preference import gradients

DIGEST, CODES = "ab" * 32, 20
TOKENIZER = load_tokenizer(SentencePieceTokenizerConfig(path=Path("examples/text/tokenizer.model")))
VOCAB = TOKENIZER.vocab_size
SEPARATE = {"kind": "separate", "codes": CODES, "code_dim": 4}
VOCABULARY: dict[str, Any] = {"kind": "vocabulary", "codes": CODES, "first_id": VOCAB - CODES}
DRAWING = {"kind": "drawing", "prompts": ["{prompt}"], "image_weight": 0.5}
SIZES = [(2, 3), (3, 2), (1, 4)]
DEALS = [[[0, 1, 2]], [[2], [], [1, 0]]]


def model_config(tokens: dict[str, Any]) -> ModelConfig:
    return config(None, vocab_size=VOCAB, image_tokens=tokens)


def builder(template: dict[str, Any], first_id: int = VOCAB) -> DocumentBuilder:
    tokens = {"codebook_size": CODES, "first_id": first_id}
    values = {"name": "d", "manifest": "d", "template": template, "image_tokens": tokens}
    return DocumentBuilder(DatasetConfig.model_validate(values), TOKENIZER, MediaSpec())


def image(number: int, name: str, digest: str = DIGEST) -> ImagePart:
    codes = np.random.default_rng(number).integers(0, CODES, SIZES[number % len(SIZES)])
    return ImagePart(b"", name, None, encode_grid(codes, CODES, digest))


def sample(number: int, **fields: Any) -> Sample:
    parts = (image(2 * number, "0.png"), image(2 * number + 1, "1.png"))
    names = {"prompt": "ab" * (1 + number), "chosen": "1.png", "rejected": "0.png"}
    return Sample(parts, {**names, **fields}, Provenance("d", "s", str(number), number))


def answers(source: Sample, first_id: int) -> list[Document]:
    """Return the text with the chosen image, and with the rejected one, each as a drawing of its own."""
    build = builder({**DRAWING, "text_weight": 0}, first_id)
    images = {part.name: part for part in source.parts if isinstance(part, ImagePart)}
    return [build(replace(source, parts=(images[source.fields[name]],))) for name in ("chosen", "rejected")]


@pytest.mark.parametrize("tokens", [VOCABULARY, SEPARATE], ids=["in the vocabulary", "with a head of their own"])
def test_equals_separate_drawings_however_pairs_are_packed(tokens: dict[str, Any]) -> None:
    settings = model_config(tokens)
    first_id = tokens.get("first_id", VOCAB)
    model, other = (build_model(settings, attention="sdpa", seed=seed) for seed in (1, 2))
    build = builder({"kind": "preference", "each": DRAWING}, first_id)
    samples = [sample(number) for number in range(3)]
    loss = PreferenceConfig(beta=0.5, next_token=0.2)
    expected, metrics = written_out_of(loss, model, other, [answers(each, first_id) for each in samples])
    expected.sum().backward()
    wanted = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    objective, spec = Preference(loss, [Teacher(other, 1.0, 1.0)]), MediaSpec()
    for deal in DEALS:
        total, sums = 0.0, dict.fromkeys(metrics, 0.0)
        for part in deal:
            documents = [*(build(samples[number]) for number in part), dummy_document(spec, 0)]
            output = objective(model, collate([Pack(tuple(documents), 0)], spec))
            output.loss_sum.backward()
            total += output.loss_sum.item()
            sums = {name: sums[name] + float(value) for name, value in output.metrics.items()}
        assert total == pytest.approx(expected.sum().item(), rel=1e-5)
        assert sums == pytest.approx(metrics, rel=1e-4, abs=1e-4)
        for name, gradient in gradients(model).items():
            scale = max(float(wanted[name].abs().max()), 1e-3 * largest)
            torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=6e-5 * scale)


def test_each_branch_is_the_drawing_of_its_image() -> None:
    build = builder({"kind": "preference", "each": DRAWING})
    pair = build(sample(2))
    starts = [*pair.branches, pair.num_tokens]
    for number, drawing in enumerate(answers(sample(2), VOCAB)):
        rows = np.r_[0 : starts[0], starts[number] : starts[number + 1]]
        for column in ("token_ids", "labels", "loss_weights", "position_ids", "drawn"):
            assert getattr(pair, column)[rows].tolist() == getattr(drawing, column).tolist(), column
    extents = [(each.start, each.stop) for each in pair.images]
    assert pair.drawn is not None
    assert all(pair.drawn[start:stop].all() for start, stop in extents)
    assert [stop - start for start, stop in extents] == [4, 6]  # Grids of 1 x 4 and 3 x 2 codes, in this order.
    assert build.build_prompt(sample(2)).token_ids.tolist() == pair.token_ids[: starts[0] + 1].tolist()


def test_a_pair_that_no_stage_of_pairs_reads_is_cut_between_its_images() -> None:
    pair = builder({"kind": "preference", "each": DRAWING})(sample(0))
    parts = list(split(pair, lambda part: part.num_tokens < pair.num_tokens))
    assert [part.branches for part in parts] == [(), ()]
    for part, drawing in zip(parts, answers(sample(0), VOCAB), strict=True):
        assert part.token_ids.tolist() == drawing.token_ids.tolist()
        assert part.images == drawing.images
        assert part.drawn is not None
        assert drawing.drawn is not None
        assert part.drawn.tolist() == drawing.drawn.tolist()


def _changed(number: int, part: ImagePart) -> Sample:
    parts = list(sample(0).parts)
    parts[number] = part
    return replace(sample(0), parts=tuple(parts))


BAD: dict[str, tuple[Sample, str]] = {
    "absent": (sample(0, chosen="7.png"), "names the image '7.png', but the images of the sample are 0.png, 1.png"),
    "turns": (sample(0, chosen=[{"content": "1.png"}]), "but the images of the sample are"),
    "one image twice": (sample(0, chosen="0.png"), "chosen and rejected are equal, so the pair prefers nothing"),
    "equal": (_changed(1, image(0, "1.png")), "are equal grids, so the pair prefers nothing"),
    "another tokenizer": (_changed(1, image(1, "1.png", "cd" * 32)), "of different image tokenizers"),
    "without a grid": (_changed(1, ImagePart(b"", "1.png")), "has no token grid; write token grids with"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_pair_is_a_bad_sample(case: str) -> None:
    source, reason = BAD[case]
    with pytest.raises(SampleError, match=reason):
        builder({"kind": "preference", "each": DRAWING})(source)


@pytest.mark.parametrize("change", [{"caption_last": 0.5}, {"text_dropout": 0.1}, {"image_weight": 0}])
def test_settings_of_drawings_that_make_no_pair(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the two images are the answers to one text"):
        PreferenceTemplate.model_validate({"each": {**DRAWING, **change}})
