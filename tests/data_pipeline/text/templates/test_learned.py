"""Weights of learned text, and text dropout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import IGNORE, Document
from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.history.digest import digest
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.templates import EndPiece, TemplateConfig, TextPiece
from data_pipeline.text.templates.base import share_weights
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from tests.data_pipeline.conftest import WriteSet, captioned, page, picture

IMAGE = ImagePart(picture(1), "png")
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
SAMPLE = Sample(
    (TextPart("a"), IMAGE, TextPart("bcd", 0.5)),
    {
        "caption": "four",
        "messages": TURNS,
        "annotations": [{"question": "q", "answer": "abc"}, {"question": "q", "answer": "abcdefgh"}],
    },
    Provenance("x", "shard.tar", "key", 0),
)


def _build(
    tokenizer_path: Path, template: dict[str, Any], sample: Sample = SAMPLE, seed: int | None = None
) -> Document:
    config = {"name": "x", "manifest": "x", "template": template, "transforms": {"kind": "fixed"}}
    tokenizer = load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path))
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(2, 2))
    rng = None if seed is None else np.random.default_rng(seed)
    return DocumentBuilder(DatasetConfig.model_validate(config), tokenizer, spec)(sample, rng)


@pytest.mark.parametrize(("rule", "power"), [("token", 0.0), ("sqrt", 0.5), ("sample", 1.0)])
@pytest.mark.parametrize(
    ("template", "own"),
    [
        ({"kind": "caption"}, [1.0] * 5),
        ({"kind": "interleaved"}, [1.0] + [0.5] * 4),
        ({"kind": "dialogue"}, [1.0] * 4),
    ],
)
def test_learned_tokens_share_the_weight_of_a_sample(
    tokenizer_path: Path, template: dict[str, Any], own: list[float], rule: str, power: float
) -> None:
    document = _build(tokenizer_path, {**template, "loss_weight": rule})
    found = document.loss_weights[document.labels != IGNORE]
    assert found.tolist() == pytest.approx([weight / len(own) ** power for weight in own])
    assert np.count_nonzero(document.loss_weights) == len(own)


def test_every_branch_is_a_sample_of_its_own(tokenizer_path: Path) -> None:
    each = {"kind": "caption", "prompts": ["{question}"], "answers": ["{answer}"], "loss_weight": "sample"}
    document = _build(tokenizer_path, {"kind": "annotations", "each": each})
    first, second = np.split(document.loss_weights, document.branches)[1:]
    assert np.count_nonzero(first) == 4
    assert np.count_nonzero(second) == 9
    assert first.sum() == pytest.approx(1 / math.sqrt(2))
    assert second.sum() == pytest.approx(1 / math.sqrt(2))


def test_a_document_that_learns_nothing_is_shared_out_too() -> None:
    assert share_weights([0.0, 0.0], [], "sample").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["caption", "interleaved"])
def test_dropped_text_leaves_images_and_nothing_learned(tokenizer_path: Path, kind: str) -> None:
    template = TypeAdapter(TemplateConfig).validate_python({"kind": kind, "text_dropout": 0.3})
    rng = np.random.default_rng(0)
    drawn = [template.pieces(SAMPLE, rng) for _ in range(2000)]
    dropped = [pieces for pieces in drawn if not any(isinstance(piece, TextPiece) for piece in pieces)]
    assert all(pieces == [IMAGE, EndPiece(0.0)] for pieces in dropped)
    # Five standard deviations of a binomial of 2,000 draws.
    assert abs(len(dropped) / len(drawn) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(drawn))
    assert any(isinstance(piece, TextPiece) for piece in template.pieces(SAMPLE, None))
    seeds = range(20)
    config = {"kind": kind, "text_dropout": 0.3}
    documents = [_build(tokenizer_path, config, seed=seed) for seed in seeds]
    bare = [document for document in documents if not document.loss_weights.any()]
    assert 0 < len(bare) < len(documents)
    assert all(len(document.items) == 1 and (document.labels == IGNORE).all() for document in bare)
    again = [_build(tokenizer_path, config, seed=seed).num_tokens for seed in seeds]
    assert again == [document.num_tokens for document in documents]


def test_a_prompt_stays_and_a_text_alone_is_never_dropped() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(TemplateConfig)
    caption = adapter.validate_python({"kind": "caption", "prompts": ["p"], "text_dropout": 0.999})
    assert caption.pieces(SAMPLE, np.random.default_rng(0)) == [IMAGE, TextPiece("p", 0.0), EndPiece(0.0)]
    stored = adapter.validate_python({"kind": "interleaved", "text_dropout": 0.999})
    words = stored.pieces(Sample((TextPart("a"),)), np.random.default_rng(0))
    assert words == [TextPiece("a", 1.0), EndPiece(1.0)]
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "caption", "text_dropout": 1.0})


def test_dropout_is_the_same_at_any_number_of_ranks_and_after_a_resume(
    write_set: WriteSet, tokenizer_path: Path, hybrid_spec: MediaSpec
) -> None:
    sets = [
        ("captions", [captioned(i) for i in range(40)], {"kind": "caption", "text_dropout": 0.4}),
        ("pages", [page(i) for i in range(20)], {"kind": "interleaved", "text_dropout": 0.4, "loss_weight": "sqrt"}),
    ]
    config = DataConfig.model_validate(
        {
            "tokenizer": {"kind": "tokenizers", "path": tokenizer_path},
            "datasets": [
                {"name": name, "manifest": write_set(name, samples), "template": template}
                for name, samples, template in sets
            ],
            "lanes": 4,
            "packing": {"max_tokens": 90, "look_ahead": 3},
        }
    )
    expected = list(digest(config, hybrid_spec, 5, range(6)))
    assert list(digest(config, hybrid_spec, 5, range(6), world_size=3)) == expected
    assert list(digest(config, hybrid_spec, 5, range(6), world_size=2, resume_at=3)) == expected
    plain = config.model_copy(
        update={
            "datasets": tuple(
                one.model_copy(update={"template": one.template.model_copy(update={"text_dropout": 0.0})})
                for one in config.datasets
            )
        }
    )
    assert list(digest(plain, hybrid_spec, 5, range(6))) != expected


@pytest.mark.fault
def test_half_a_pair_of_utf16_is_a_fault_of_the_text(tokenizer_path: Path) -> None:
    fields = json.loads('{"caption": "a\\ud800b"}')
    with pytest.raises(SampleError, match="not valid Unicode") as caught:
        _build(tokenizer_path, {"kind": "caption"}, Sample((IMAGE,), fields, SAMPLE.provenance))
    assert caught.value.kind is FaultKind.TEXT
