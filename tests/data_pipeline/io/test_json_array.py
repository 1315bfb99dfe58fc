"""The elements of a JSON array equal those of ``json``, whatever they hold and wherever a chunk ends."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.io import json_array
from data_pipeline.io.json_array import read_array
from data_pipeline.io.untrusted import UntrustedError

_TEXTS = st.text(alphabet='ab"\\[]{},:\n ü\u2028')
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(st.lists(_VALUES, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_elements_equal_those_of_json(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[Any],
    chunk: int,
    indent: int | None,
    escaped: bool,
    marked: bool,
) -> None:
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=escaped), "utf-8-sig" if marked else "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        # The first chunk must hold the opening bracket.
        patch.setattr(json_array, "_CHUNK_BYTES", chunk + 3)
        assert [json.loads(text) for text in read_array(path)] == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ('{"data": []}', "found an object"),
        ("7", "found '7'"),
        ("[1, 2", "the file ends within element 2 of the array"),
        ('[{"a": "}]', "the file ends within element 1"),
        ('["a\\', "the file ends within element 1"),
        ("[1, ]", "no element after element 1"),
        ("[, 1]", "no element after element 0"),
        ("[1]\n[2]", "goes on after the end"),
    ],
)
def test_what_is_no_array_raises(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UntrustedError, match=message):
        list(read_array(tmp_path / "x.json"))


def test_memory_is_bounded_by_one_element(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    rows = json.dumps([{"text": "x" * 1000}] * 400)[1:-1]
    path.write_text(f"[{','.join([rows] * 20)}]")  # 8 MB.
    tracemalloc.start()
    assert sum(1 for _ in read_array(path)) == 8_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    path.write_text(json.dumps(["short", "x" * 3_000_000]))
    with pytest.raises(UntrustedError, match="element 2 is longer than 1000000 bytes"):
        list(read_array(path, most_bytes=1_000_000))
