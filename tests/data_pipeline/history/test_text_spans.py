"""Text spans of a document: every token once, with its loss weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import DatasetConfig
from data_pipeline.history.text_spans import TextSpan, decode_with_names, text_spans
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer
from tests.data_pipeline.conftest import picture

EMBEDDING = MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(2, 2))
IMAGE = ImagePart(picture(1), "png")
PAGE = Sample((TextPart("a"), IMAGE, TextPart("bc", 0.5), IMAGE), {}, Provenance("x", "s", "k", 0))
ASKED = Sample(
    (IMAGE,),
    {"annotations": [{"question": "q?", "answer": "yes"}, {"question": "r?", "answer": "no"}]},
    Provenance("x", "s", "k", 0),
)


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path))


def _shown(kind: str, sample: Sample, tokenizer: Tokenizer, spec: MediaSpec = EMBEDDING) -> list[TextSpan]:
    config = {"name": "x", "manifest": "x", "template": {"kind": kind}, "transforms": {"kind": "fixed"}}
    document = DocumentBuilder(DatasetConfig.model_validate(config), tokenizer, spec)(sample)
    found = text_spans(document, tokenizer, spec)
    assert sum(one.num_tokens for one in found) == document.num_tokens
    weight = sum(one.num_tokens * one.weight for one in found)
    assert weight == pytest.approx(float(document.loss_weights.sum()))
    return found


def test_a_page(tokenizer: Tokenizer) -> None:
    image = "2x2 patches, 4 features embedded"
    assert _shown("interleaved", PAGE, tokenizer) == [
        TextSpan("read", 1, 0.0, "<s>"),
        TextSpan("learned", 1, 1.0, "a"),
        TextSpan("image", 4, 0.0, f"image 1: {image}"),
        TextSpan("learned", 2, 0.5, "bc"),
        TextSpan("image", 4, 0.0, f"image 2: {image}"),
        TextSpan("read", 1, 0.0, "</s>"),
    ]


def test_branches_are_numbered(tokenizer: Tokenizer) -> None:
    found = _shown("annotations", ASKED, tokenizer)
    assert [(one.kind, one.text, one.branch) for one in found] == [
        ("read", "<s>", 0),
        ("image", "image 1: 2x2 patches, 4 features embedded", 0),
        ("read", "q?", 1),
        ("learned", "yes</s>", 1),
        ("read", "r?", 2),
        ("learned", "no</s>", 2),
    ]
    assert [one.weight for one in found if one.kind == "learned"] == pytest.approx([2**-0.5] * 2)


def test_views_of_one_kind_are_counted(tokenizer: Tokenizer) -> None:
    hybrid = replace(EMBEDDING, placement=Placement.HYBRID)
    found = _shown("interleaved", replace(PAGE, parts=PAGE.parts[:3]), tokenizer, hybrid)
    assert found[2].text == "image 1: 2x2 patches, 4 features embedded; 2x2 patches, 4 features attended"


def test_tokens_that_are_no_text_are_named(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("héllo"), tokenizer.eos_id, tokenizer.pad_id, *tokenizer.encode("x")]
    assert decode_with_names(ids, tokenizer) == "<s>héllo</s><pad>x"
