"""Annotations: the images once, then a branch for each annotation; and batches of such documents."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.batch import BranchedSegments
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.loader.shared_buffers import BatchReceiver, BatchSender
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.text.templates import AnnotationsTemplate, BranchPiece, CaptionTemplate, EndPiece, TextPiece
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from tests.data_pipeline.conftest import picture
from tests.data_pipeline.packing.test_collate import assert_same

IMAGE = ImagePart(picture(1), "png")
SAMPLE = Sample(
    (IMAGE,),
    {
        "place": "zoo",
        "annotations": [{"question": f"q{i} ", "answer": f"a{i}"} for i in range(4)],
        "said": ["one", "two"],
    },
    Provenance("x", "shard.tar", "key7", 0),
)
SPEC = MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(2, 2))


def test_images_stand_once_before_all_branches() -> None:
    pieces = AnnotationsTemplate().pieces(SAMPLE, None)
    branches = [[BranchPiece(), TextPiece(f"q{i} ", 0), TextPiece(f"a{i}", 0.5), EndPiece(0.5)] for i in range(4)]
    assert pieces == [IMAGE, *(piece for branch in branches for piece in branch)]
    assert AnnotationsTemplate().prompt(SAMPLE) == [IMAGE, TextPiece("q0 ", 0)]


def test_strings_are_captions_and_fields_of_the_sample_stay_readable() -> None:
    template = AnnotationsTemplate(field="said", each=CaptionTemplate(prompts=("In the {place}: ",)))
    texts = [piece.text for piece in template.pieces(SAMPLE, None) if isinstance(piece, TextPiece)]
    assert texts == ["In the zoo: ", "one", "In the zoo: ", "two"]


def test_one_annotation_is_a_plain_document_of_full_weight() -> None:
    pieces = AnnotationsTemplate(max_annotations=1).pieces(SAMPLE, None)
    assert pieces == [IMAGE, TextPiece("q0 ", 0), TextPiece("a0", 1.0), EndPiece(1.0)]


def test_of_many_some_are_drawn_anew_in_each_epoch() -> None:
    template = AnnotationsTemplate(max_annotations=2)
    seen = set()
    for seed in range(60):
        pieces = template.pieces(SAMPLE, np.random.default_rng(seed))
        again = template.pieces(SAMPLE, np.random.default_rng(seed))
        assert pieces == again
        learned = [piece for piece in pieces if isinstance(piece, TextPiece) and piece.weight]
        assert [piece.weight for piece in learned] == pytest.approx([2**-0.5] * 2)
        seen.add(tuple(piece.text for piece in learned))
    assert seen == {(f"a{i}", f"a{j}") for i in range(4) for j in range(i + 1, 4)}


def test_an_annotation_may_have_a_weight_of_its_own() -> None:
    entries = [{"question": "q", "answer": "a", "weight": 0.5}, {"question": "r", "answer": "b"}]
    pieces = AnnotationsTemplate().pieces(replace(SAMPLE, fields={"annotations": entries}), None)
    weights = {piece.text: piece.weight for piece in pieces if isinstance(piece, TextPiece)}
    assert weights == pytest.approx({"q": 0, "a": 0.5 / 2**0.5, "r": 0, "b": 1 / 2**0.5})


@pytest.mark.fault
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"field": "none"}, "field 'none' is missing"),
        ({"field": "place"}, "expected a list of objects or strings"),
        ({"field": "said"}, "field 'answer' is missing"),
    ],
)
def test_samples_without_annotations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        AnnotationsTemplate(**config).pieces(SAMPLE, None)


def test_a_branch_needs_a_prompt() -> None:
    with pytest.raises(ValidationError, match="no prompt may be empty"):
        AnnotationsTemplate(each=CaptionTemplate(prompts=("Say:", "")))


@pytest.fixture
def builder(tokenizer_path: Path) -> DocumentBuilder:
    tokenizer = load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path))
    config = {"name": "x", "manifest": "x", "template": {"kind": "annotations"}, "transforms": {"kind": "fixed"}}
    return DocumentBuilder(DatasetConfig.model_validate(config), tokenizer, SPEC)


@pytest.mark.fault
def test_a_prompt_that_a_sample_leaves_empty_is_refused(builder: DocumentBuilder) -> None:
    fields = {"annotations": [{"question": "", "answer": "a"}, {"question": "q", "answer": "b"}]}
    with pytest.raises(SampleError, match=r"shard\.tar/key7: a branch begins with learned text"):
        builder(replace(SAMPLE, fields=fields))


def _plain(document: Document) -> Document:
    return replace(document, branches=())


def test_batches_name_the_keys_of_every_branch(builder: DocumentBuilder) -> None:
    document = builder(SAMPLE)
    fork, length = document.branches[0], document.num_tokens
    batch = collate([Pack((_plain(document), document), 0)], SPEC)
    assert batch.branched is batch.attended
    assert batch.branched is not None
    bounds = [length, *(length + start for start in document.branches), 2 * length]
    assert batch.branched.queries.bounds == (0, *bounds)
    rows, keys = batch.branched.key_tokens.tolist(), batch.branched.keys.bounds
    expected = [range(length), range(length, length + fork)]
    for start, end in pairwise(bounds[1:]):
        expected.append([*range(length, length + fork), *range(start, end)])  # type: ignore[arg-type]
    assert [rows[a:b] for a, b in pairwise(keys)] == [list(piece) for piece in expected]
    plain = collate([Pack((_plain(document),), 0)], SPEC)
    assert plain.branched is None
    assert plain.attended is plain.segments


@pytest.mark.parametrize("order", ["bp", "pb", "bb", "pp", "bpb"])
def test_batches_with_branches_join_and_travel(builder: DocumentBuilder, order: str) -> None:
    document = builder(SAMPLE)
    packs = [Pack((document if kind == "b" else _plain(document),), lane) for lane, kind in enumerate(order)]
    together = collate(packs, SPEC)
    joined = concatenate([collate([pack], SPEC) for pack in packs], SPEC)
    (sent,) = BatchReceiver().decode(BatchSender().encode((together,)))
    for ours, expected in ((joined, together), (sent, together)):
        assert_same(ours, expected)
        assert isinstance(ours.branched, BranchedSegments) == ("b" in order)
        if ours.branched is not None and expected.branched is not None:
            assert ours.branched.queries.bounds == expected.branched.queries.bounds
            assert torch.equal(ours.branched.key_tokens, expected.branched.key_tokens)
    assert together.to("meta").attended.__class__ is together.attended.__class__
