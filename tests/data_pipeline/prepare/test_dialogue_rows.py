"""Dialogues from lists: images are stored under every field name that other tools use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import SampleError
from data_pipeline.prepare.media_files import FileLoader
from data_pipeline.prepare.records import members_from_record
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.text.templates import DialogueTemplate
from tests.data_pipeline.conftest import picture

TURNS = [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "<image> q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def load(tmp_path: Path) -> FileLoader:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return FileLoader(tmp_path)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"conversations": TURNS, "image": "1.png"}, {"png": 1}),
        ({"conversations": TURNS, "image": ["1.png", "0.png"]}, {"0.png": 1, "1.png": 0}),
        ({"messages": MESSAGES, "images": ["0.png", "1.png"]}, {"0.png": 0, "1.png": 1}),
        ({"messages": MESSAGES, "images": [{"bytes": picture(1), "path": None}]}, {"0.png": 1}),
        ({"messages": MESSAGES, "path": "0.png"}, {"png": 0}),
        ({"annotations": ["x", "y"], "image": "0.png"}, {"png": 0}),
        ({"messages": MESSAGES, "images": []}, {}),
        ({"conversations": TURNS, "id": 3}, {}),
    ],
)
def test_images_of_a_dialogue_are_stored(load: FileLoader, row: dict[str, Any], names: dict[str, int]) -> None:
    members = members_from_record(row, load)
    fields = json.loads(members.pop("json"))
    assert members == {name: picture(number) for name, number in names.items()}
    assert fields == {name: value for name, value in row.items() if name not in ("image", "images", "path")}


@pytest.mark.parametrize(
    "shown",
    [
        {"type": "image", "image": "1.png"},
        {"type": "image", "path": "1.png"},
        {"type": "image", "url": "1.png"},
        {"type": "image_url", "image_url": {"url": "1.png"}},
        {"type": "image_url", "image_url": "1.png"},
    ],
)
def test_images_named_in_the_turns_are_stored(load: FileLoader, shown: dict[str, Any]) -> None:
    """The forms of Qwen2-VL's examples, of ``apply_chat_template`` and of OpenAI's API."""
    words = [{"type": "text", "text": "q"}, {"type": "image", "image": "0.png"}]
    row = {"messages": [{"role": "user", "content": [shown, *words]}, {"role": "assistant", "content": "a"}]}
    before = json.dumps(row)
    members = members_from_record(row, load)
    turns = json.loads(members.pop("json"))["messages"]
    assert members == {"0.png": picture(1), "1.png": picture(0)}
    assert turns[0]["content"] == [{"type": "image"}, words[0], {"type": "image"}]
    assert json.dumps(row) == before
    sample = Sample(
        (ImagePart(picture(1), "0.png"), ImagePart(picture(0), "1.png")), {"messages": turns}, Provenance("", "", "", 0)
    )
    images = [piece.data for piece in DialogueTemplate().pieces(sample, None) if isinstance(piece, ImagePart)]
    assert images == [picture(1), picture(0)]


def test_images_named_in_the_turns_beside_a_list_stay_references(load: FileLoader) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "image", "image": "png"}]}], "path": "0.png"}
    assert json.loads(members_from_record(row, load)["json"])["messages"] == row["messages"]


@pytest.mark.parametrize("answer", ["answer", "response", "output"])
def test_a_question_without_image_and_caption_is_a_sample(load: FileLoader, answer: str) -> None:
    row = {"question": "What is red?", answer: "Blood."}
    assert json.loads(members_from_record(row, load)["json"]) == row
    with pytest.raises(SampleError, match="neither an image"):
        members_from_record({"question": "What is red?"}, load)


def test_two_lists_of_images_are_refused(load: FileLoader) -> None:
    row = {"messages": MESSAGES, "path": "0.png", "images": ["1.png"]}
    with pytest.raises(SampleError, match="names its images in path and in images; keep one"):
        members_from_record(row, load)


def test_an_image_field_of_a_caption_is_a_field_like_any_other(load: FileLoader) -> None:
    members = members_from_record({"caption": "c", "path": "0.png", "image": "a name"}, load)
    assert json.loads(members["json"]) == {"caption": "c", "image": "a name"}
