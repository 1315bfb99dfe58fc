"""Preference pairs: the prompt once, then a branch for each answer; unusable pairs are bad samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.templates import PreferenceTemplate
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer
from tests.data_pipeline.conftest import picture

TOKENIZER = load_tokenizer(SentencePieceTokenizerConfig(path=Path("examples/text/tokenizer.model")))
IMAGE = ImagePart(picture(1), "png")
FIELDS = {"prompt": "Which group is a cat in?", "chosen": "animals & nature", "rejected": "food & drink"}
CHAT = {"kind": "dialogue", "format": "chatml"}


def sample(*parts: ImagePart, **fields: Any) -> Sample:
    return Sample(parts, {**FIELDS, **fields}, Provenance("d", "s.tar", "k", 0))


def build(template: dict[str, Any], source: Sample, axes: int = 1) -> Document:
    values = {"name": "d", "manifest": "d.manifest", "template": template, "transforms": {"kind": "fixed", "size": 16}}
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, position_axes=axes)
    return DocumentBuilder(DatasetConfig.model_validate(values), TOKENIZER, spec)(source)


def branch(document: Document, number: int) -> dict[str, list[Any]]:
    """Return the columns of the prompt with one answer."""
    starts = [*document.branches, document.num_tokens]
    rows = np.r_[0 : starts[0], starts[number] : starts[number + 1]]
    names = ("token_ids", "labels", "loss_weights", "position_ids")
    return {name: getattr(document, name)[rows].tolist() for name in names}


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("parts", [(), (IMAGE,)])
@pytest.mark.parametrize("each", [CHAT, {"kind": "caption", "prompts": ["{prompt} "], "answers": ["{answer}"]}])
def test_prompt_and_branch_are_the_document_of_that_answer(
    each: dict[str, Any], parts: tuple[ImagePart, ...], axes: int
) -> None:
    if each["kind"] == "caption":
        each = {**each, "images": "optional"}
    pair = build({"kind": "preference", "each": each}, sample(*parts), axes)
    assert len(pair.branches) == 2
    assert len(pair.items) == len(parts)
    for number, name in enumerate(("chosen", "rejected")):
        turns = [{"role": "user", "content": FIELDS["prompt"]}, {"role": "assistant", "content": FIELDS[name]}]
        single = build(each, sample(*parts, messages=turns, answer=FIELDS[name]), axes)
        columns = ("token_ids", "labels", "loss_weights", "position_ids")
        assert branch(pair, number) == {column: getattr(single, column).tolist() for column in columns}


def test_turns_may_hold_the_prompt() -> None:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": answer}]

    asked = [{"role": "user", "content": FIELDS["prompt"]}]
    template = {"kind": "preference", "each": CHAT}
    expected = build(template, sample())
    listed = sample(prompt=asked, chosen=turns(FIELDS["chosen"]), rejected=turns(FIELDS["rejected"]))
    within = sample(prompt=None, chosen=asked + turns(FIELDS["chosen"]), rejected=asked + turns(FIELDS["rejected"]))
    for source in (listed, within):
        found = build(template, source)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.labels.tolist() == expected.labels.tolist()


def test_earlier_answers_and_special_tokens_need_not_count() -> None:
    before = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": FIELDS["prompt"]},
    ]
    document = build({"kind": "preference", "each": CHAT, "learn_special": False}, sample(prompt=before))
    learned = [int(label) for label in document.labels if label >= 0]
    assert TOKENIZER.special_id("<|im_end|>", "") not in learned
    words = TOKENIZER.decode(learned)
    assert words.split("\n") == ["animals & nature", "food & drink", ""]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"rejected": " "}, "field 'rejected' is ' ', expected an answer"),
    "missing": ({"chosen": None}, "field 'chosen' is None, expected an answer"),
    "equal": ({"rejected": FIELDS["chosen"]}, "chosen and rejected are equal, so the pair prefers nothing"),
    "turns for a caption": ({"chosen": [{"role": "assistant", "content": "a"}]}, "need template.each.kind=dialogue"),
    "no prompt": ({"prompt": ""}, "the prompt of a pair must end with text and have at least two tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_pair_is_a_bad_sample(case: str) -> None:
    changes, reason = BAD[case]
    with pytest.raises(SampleError, match=reason):
        build({"kind": "preference"}, sample(**changes))


def test_a_prompt_that_ends_with_an_image_is_a_bad_sample() -> None:
    each = {"kind": "caption", "prompts": [""], "answers": ["{answer}"]}
    with pytest.raises(SampleError, match="must end with text"):
        build({"kind": "preference", "each": each}, sample(IMAGE))


def test_answers_to_different_prompts_are_no_pair() -> None:
    def asked(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    source = sample(prompt=None, chosen=asked("a", "b"), rejected=asked("c", "d"))
    with pytest.raises(SampleError, match="answer different prompts"):
        build({"kind": "preference", "each": CHAT}, source)


@pytest.mark.parametrize(
    ("each", "reason"),
    [
        ({"kind": "caption", "prompts": ["a", "b"]}, "expected one prompt and answers"),
        ({"kind": "caption", "answers": ["{answer}"], "text_dropout": 0.1}, "would drop the answers of a pair"),
    ],
)
def test_settings_that_do_not_fit_pairs(each: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PreferenceTemplate.model_validate({"each": each})


def test_ingest_stores_pairs_and_reports_unusable_ones(tmp_path: Path) -> None:
    rows = [FIELDS, {**FIELDS, "rejected": ""}, {**FIELDS, "rejected": FIELDS["chosen"]}, {**FIELDS, "path": "a.png"}]
    (tmp_path / "a.png").write_bytes(IMAGE.data)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ingest(tmp_path / "pairs.jsonl", tmp_path / "out", "pairs", on_error=OnError.SKIP)
    stored = list(read_samples(tmp_path / "out" / "pairs.manifest"))
    assert [each.fields for each in stored] == [FIELDS, FIELDS]
    assert [len(each.parts) for each in stored] == [0, 1]
    assert stored[0].texts == list(FIELDS.values())
    reasons = (tmp_path / "out" / "pairs.skipped.jsonl").read_text()
    assert "field 'rejected' is None, expected an answer" in reasons
    assert "chosen and rejected are equal" in reasons
