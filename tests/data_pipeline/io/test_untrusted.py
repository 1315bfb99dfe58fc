"""Readers of untrusted files: bounds on size, depth and expansion, and a single error type."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.io import untrusted
from data_pipeline.io.untrusted import (
    MOST_DEPTH,
    BoundedYamlLoader,
    IrregularFileError,
    UntrustedError,
    append_regular,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_lines,
    read_yaml,
)

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def _nested(levels: int) -> str:
    return '{"a":[' * (levels // 2) + "1" + "]}" * (levels // 2)


def test_json_nests_up_to_the_bound_and_no_deeper() -> None:
    assert parse_json(_nested(MOST_DEPTH)) == json.loads(_nested(MOST_DEPTH))
    for text in (_nested(MOST_DEPTH + 2), "[" * 5_000_000, '{"a":' * 100_000):
        with pytest.raises(UntrustedError, match="nest deeper than 64 levels"):
            parse_json(text)


def test_brackets_in_texts_and_beside_one_another_are_no_depth() -> None:
    value = {"text": '[[{{"\\' * 1000, "many": [[{}] for _ in range(1000)]}
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "text",
    ["", "nul", "[1", "9" * 5000, b"\xff\xfe[\x00]\x00", b'"\xed\xa0\x80"', '"\\' * 50_000 + "[" * 100],
    ids=["empty", "word", "cut", "digits", "utf-16", "surrogate", "escapes"],
)
def test_text_that_is_no_json(text: str | bytes) -> None:
    with pytest.raises(UntrustedError):
        parse_json(text)


def test_a_byte_order_mark_is_passed_over_and_the_last_of_equal_keys_counts() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1, "a": 2}') == {"a": 2}


@settings(max_examples=40, deadline=None)
@given(_JSON)
@pytest.mark.long
def test_json_reads_as_the_standard_library_does(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == value
    assert parse_json(json.dumps(value, ensure_ascii=True).encode()) == value


@settings(deadline=None)
@given(st.binary() | st.text(alphabet='[]{}":,\\0aé-.eE ').map(lambda text: text.encode()))
def test_only_one_error_leaves_the_parsers(content: bytes) -> None:
    for parse in (parse_json, lambda text: parse_yaml(text, BoundedYamlLoader)):
        with contextlib.suppress(UntrustedError):
            parse(content)


def test_yaml_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MOST_YAML_NODES", 2000)
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    merges = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))
    many = "[" + "x," * 2001 + "]"
    for text in (laughs, merges, chain, many, "[" * 100_000, "a: &a [*a]", "&a {*a : 1}"):
        with pytest.raises(
            UntrustedError, match=r"YAML that is not read in line \d+: (nests deeper|an alias that contains)"
        ):
            parse_yaml(text.encode(), BoundedYamlLoader)


@pytest.mark.parametrize(
    "text",
    [
        "!!timestamp x",
        "!!bool x",
        '!!int ""',
        "!!float x",
        "9" * 5000,
        "!!python/object:os.x {}",
        "[a]: b\n? [b]",
        "\0",
    ],
)
def test_yaml_that_the_library_does_not_expect(text: str) -> None:
    with pytest.raises(UntrustedError):
        parse_yaml(text.encode(), BoundedYamlLoader)


@settings(max_examples=40, deadline=None)
@given(_JSON)
def test_yaml_reads_as_the_library_does(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text.encode(), BoundedYamlLoader) == yaml.safe_load(text)


def test_an_alias_stands_for_its_value() -> None:
    assert parse_yaml(b"a: &a [1, {b: 2}]\nc: [*a, *a]", BoundedYamlLoader)["c"] == [[1, {"b": 2}]] * 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", [read_bytes, read_json, read_yaml, lambda path: list(read_lines(path))])
def test_only_regular_files_are_read(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, what in (
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(UntrustedError, match=what):
            read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


@pytest.mark.timeout(20)
def test_only_regular_files_are_appended_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, what in ((tmp_path / "fifo", "not a regular file"), (tmp_path, "a folder"), (Path("/dev/zero"), "not a")):
        with pytest.raises(IrregularFileError, match=what) as raised:
            append_regular(path)
        assert raised.value.filename == str(path)
    # The system opens a FIFO for writing only if it has a reader.
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(IrregularFileError, match="not a regular file"):
        append_regular(tmp_path / "fifo")
    os.close(reader)
    for line in (b"one\n", b"two\n"):
        with append_regular(tmp_path / "new") as file:
            file.write(line)
    assert (tmp_path / "new").read_bytes() == b"one\ntwo\n"


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345\n123456\n")
    assert read_bytes(path, most_bytes=13) == path.read_bytes()
    assert list(read_lines(path, most_bytes=7)) == [b"12345\n", b"123456\n"]
    with pytest.raises(UntrustedError, match="larger than 12 bytes"):
        read_bytes(path, most_bytes=12)
    with pytest.raises(UntrustedError, match="a line is longer than 6 bytes"):
        list(read_lines(path, most_bytes=6))
