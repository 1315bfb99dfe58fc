"""Templates: read and learned text, and errors for missing fields."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import SampleError
from data_pipeline.sample import ImagePart, Sample, TextPart
from data_pipeline.text.templates import EndPiece, TemplateConfig, TextPiece

IMAGE = ImagePart(b"", "png")
SAMPLE = Sample(
    (IMAGE, TextPart("a caption")),
    {"name": "cat", "group": "animals", "tags": ["a", "b"], "captions": ["one", "two"], "more": {"de": "Katze"}},
)


def _template(**config: object) -> TemplateConfig:
    return TypeAdapter(TemplateConfig).validate_python(config)


def test_caption_learns_the_answer_alone() -> None:
    template = _template(kind="caption", prompts=["Name the {group}:"], answers=["{name}, {tags}, {more.de}"])
    assert template.pieces(SAMPLE, None) == [
        IMAGE,
        TextPiece("Name the animals:", 0.0),
        TextPiece("cat, a, b, Katze", 1.0),
        EndPiece(1.0),
    ]
    assert template.prompt(SAMPLE) == [IMAGE, TextPiece("Name the animals:", 0.0)]


def test_each_prompt_goes_with_its_answer() -> None:
    template = _template(kind="caption", prompts=["Name?", "Group?"], answers=["{name}", "{group}"])
    seen = {tuple(p.text for p in template.pieces(SAMPLE, np.random.default_rng(i))[1:3]) for i in range(30)}
    assert seen == {("Name?", "cat"), ("Group?", "animals")}


def test_answers_are_drawn_from_a_list_field() -> None:
    template = _template(kind="caption", field="captions")
    seen = {template.pieces(SAMPLE, np.random.default_rng(i))[-2].text for i in range(30)}
    assert seen == {"one", "two"}
    assert template.pieces(SAMPLE, None)[-2].text == "one"


def test_by_default_captions_are_taken_or_else_the_caption() -> None:
    template = _template(kind="caption")
    assert template.pieces(SAMPLE, None)[-2].text == "one"
    assert template.pieces(Sample((IMAGE,), {"caption": "stored"}), None)[-2].text == "stored"


def test_interleaved_keeps_the_order_and_learns_all_text() -> None:
    sample = Sample((TextPart("a"), IMAGE, IMAGE, TextPart("b")))
    template = _template(kind="interleaved")
    assert template.pieces(sample, None) == [TextPiece("a", 1.0), IMAGE, IMAGE, TextPiece("b", 1.0), EndPiece(1.0)]
    assert template.prompt(sample) == [TextPiece("a", 1.0), IMAGE, IMAGE]


@pytest.mark.parametrize("kind", ["caption", "interleaved", "text"])
def test_every_template_takes_text_alone(kind: str) -> None:
    sample = Sample((TextPart("words"),), {"caption": "words"})
    assert _template(kind=kind).pieces(sample, None)[-2:] == [TextPiece("words", 1.0), EndPiece(1.0)]


@pytest.mark.parametrize(
    ("config", "sample", "message"),
    [
        ({"kind": "caption", "answers": ["{nmae}"]}, SAMPLE, "'nmae' is missing; the sample has captions, group"),
        ({"kind": "caption", "answers": ["{more.fr}"]}, SAMPLE, "'more.fr' is missing"),
        ({"kind": "caption", "field": "more"}, SAMPLE, "expected a string or a list of strings"),
        ({"kind": "caption"}, Sample((IMAGE,), {"caption": "  "}), "answer is empty"),
        ({"kind": "text"}, SAMPLE, "would drop them"),
        ({"kind": "text"}, Sample(()), "no text"),
        ({"kind": "interleaved"}, Sample((IMAGE,)), "nothing to learn"),
    ],
)
def test_samples_that_lack_something_are_refused(config: dict, sample: Sample, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        _template(**config).pieces(sample, None)


@pytest.mark.parametrize(
    "config",
    [
        {"prompts": ["{"]},
        {"prompts": ["{}"]},
        {"answers": ["{name!r}"]},
        {"answers": ["{name:>9}"]},
        {"answers": ["{a.__class__[0]}"]},
        {"answers": []},
        {"answers": ["a"], "field": "b"},
        {"answers": ["a", "b", "c"], "prompts": ["x", "y"]},
    ],
)
def test_wrong_formats_are_refused_when_configured(config: dict) -> None:
    with pytest.raises(ValidationError):
        _template(kind="caption", **config)
