"""For any JSON of a sample, a template returns pieces or raises ``SampleError``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.json_member import all_texts, text_bytes_of
from data_pipeline.sample import ImagePart, Provenance
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.text.templates import BranchPiece, TemplateConfig

TEMPLATES = [
    TypeAdapter(TemplateConfig).validate_python(config)
    for config in (
        {"kind": "caption"},
        {"kind": "caption", "answers": ["{a} {b.c}"]},
        {"kind": "interleaved", "separator": " "},
        {"kind": "text"},
        {"kind": "dialogue"},
        {"kind": "annotations"},
        {"kind": "annotations", "each": {"kind": "dialogue", "field": "messages"}},
    )
]
MEMBERS = {"0.png": b"x", "1.png": b"y"}

words = st.sampled_from(["", "x", "y z", "<image>", "<image-1>", "<image-9>", "0.png", "k.1.png", "https://a/0.png"])
leaves = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | words
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5
)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw a value of the right form in nine of ten cases."""
    return st.sampled_from([good] * 9 + [values]).flatmap(lambda chosen: chosen)


def objects(**names: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw objects with some of the fields."""
    return st.fixed_dictionaries({}, optional={name: mostly(value) for name, value in names.items()})


def lists(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return mostly(st.lists(mostly(items), min_size=1, max_size=3))


weights = st.sampled_from([0, 0.5, 1])
said = st.fixed_dictionaries({"type": st.just("text"), "text": words}) | st.fixed_dictionaries(
    {"type": st.just("image")}
)
turns = lists(
    st.fixed_dictionaries(
        {"role": mostly(st.sampled_from(["user", "assistant", "assistant", "system"])), "content": words | lists(said)},
        optional={"weight": mostly(weights)},
    )
)
asked = st.fixed_dictionaries({"question": mostly(words), "answer": mostly(words)})
samples = objects(
    parts=lists(objects(text=words, weight=weights) | objects(image=words)),
    caption=words,
    captions=lists(words),
    messages=turns,
    conversations=turns,
    annotations=lists(asked | st.fixed_dictionaries({"messages": turns})),
    a=values,
    b=objects(c=values),
) | objects(
    images=lists(words | st.none()),
    texts=lists(words | st.none()),
    text_list=lists(words),
    image_info=lists(objects(image_name=words, image_base64=words, matched_text_index=st.integers(0, 1))),
)


@pytest.mark.fault
@given(fields=samples, images=st.integers(0, 2), seed=st.none() | st.integers(0, 3))
def test_json_of_any_form_gives_pieces_or_a_fault_of_the_text(
    fields: dict[str, Any], images: int, seed: int | None
) -> None:
    members = dict(list(MEMBERS.items())[:images])
    written = json.dumps(fields).encode()
    text_bytes_of({"json": written})
    try:
        all_texts(json.loads(written))
        sample = assemble({**members, "json": written}, Provenance("d", "s", "k", 0))
    except SampleError as error:
        assert error.kind is FaultKind.TEXT  # noqa: PT017  Both outcomes are correct; the kind must match.
        return
    for template in TEMPLATES:
        try:
            pieces = template.pieces(sample, None if seed is None else np.random.default_rng(seed))
        except SampleError as error:
            assert error.kind is FaultKind.TEXT  # noqa: PT017
            continue
        assert pieces
        before = (
            [isinstance(piece, BranchPiece) for piece in pieces].index(True) if BranchPiece() in pieces else len(pieces)
        )
        assert not any(isinstance(piece, ImagePart) for piece in pieces[before:])
        assert all(piece.weight >= 0 for piece in pieces if not isinstance(piece, ImagePart | BranchPiece))
        try:
            template.prompt(sample)
        except SampleError as error:
            assert error.kind is FaultKind.TEXT  # noqa: PT017
