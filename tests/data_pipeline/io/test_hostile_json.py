"""For every JSON or YAML file that the data pipeline reads, hostile content raises an error that names the file."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataPipelineError
from data_pipeline.history.sample_log import COLUMNS, LogSegment, SampleLog, write_segment
from data_pipeline.io.columns import read_columns, write_columns
from data_pipeline.loader.iterable import open_loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import _quarantined, read_lists
from data_pipeline.order.state import LoaderState
from data_pipeline.prepare.energon_source import EnergonFolder
from data_pipeline.prepare.skipped import last_stored_row, read_skipped
from data_pipeline.prepare.stats.fertility import TextTokenizer, texts_of_file
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from tests.data_pipeline.lane_states import toy_lane

Read = Callable[[Path], Any]
_DEEP = b"[" * 100_000
_LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40))
_ODD: list[Any] = [None, "x", -1, 10**400, 2**64, float("nan"), float("inf"), [], {}, True, [[]], "\ud800"]


def _energon(path: Path) -> None:
    path.parent.joinpath(".nv-meta").mkdir(exist_ok=True)
    os.rename(path, path.parent / ".nv-meta" / "split.yaml")
    EnergonFolder.open(path.parent, "train")


_READERS: dict[str, Read] = {
    "exclusions": lambda path: read_lists([path], "data.faults.exclude"),
    "quarantine": lambda path: list(_quarantined(path)),
    "texts": lambda path: list(texts_of_file(path)),
    "tokenizer": lambda path: load_tokenizer(HuggingFaceTokenizerConfig(path=path)),
    "text tokenizer": TextTokenizer.open,
    "skipped": lambda path: list(read_skipped(path)),
    "rows": lambda path: last_stored_row(path, 1),
    "columns": lambda path: read_columns(path, {}, "format"),
    "data block": lambda path: open_loader(path, MediaSpec(), seed=1),
    "energon": _energon,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", _READERS.values(), ids=_READERS)
def test_a_hostile_file_is_one_sentence(tmp_path: Path, read: Read) -> None:
    path = tmp_path / ("x.jsonl" if read is _READERS["texts"] else "x.json")
    header = struct.pack("<Q", len(_DEEP)) + _DEEP + b"\n"
    for content in (_DEEP + b"\n", _LAUGHS, b"9" * 5000 + b"\n", b"\xff\xfe{\x00}\x00\n", b"null\n", header, None):
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
        if read is _READERS["quarantine"] and content is not None:
            assert read(path) == []  # This reader skips lines that are not its records.
        else:
            with pytest.raises(DataPipelineError) as caught:
                read(path)
            assert len(str(caught.value)) < 1000
        path.unlink(missing_ok=True)


def _changed(held: Any, odd: Iterator[Any]) -> list[Any]:
    """Yield copies of a tree, each with one node replaced by another value."""
    if isinstance(held, dict):
        return [next(odd), *(held | {key: inner} for key, child in held.items() for inner in _changed(child, odd))]
    if isinstance(held, list):
        return [[*held[:n], inner, *held[n + 1 :]] for n, child in enumerate(held) for inner in _changed(child, odd)]
    return [next(odd), next(odd)]


def _attempt(read: Callable[[], Any]) -> None:
    with contextlib.suppress(DataPipelineError):
        read()


def test_any_value_in_any_place_of_our_own_files(tmp_path: Path) -> None:
    odd = itertools.cycle(_ODD)
    note = {"dataset": "a", "index": 1, "key": "k", "shard": "s", "reason": "r", "kind": "text", "row": 3}
    for changed in [*_changed(note, odd), *_changed(note, odd)]:
        (tmp_path / "x.jsonl").write_text(json.dumps(changed) + "\n")
        for name in ("exclusions", "quarantine", "skipped", "rows"):
            _attempt(lambda name=name: _READERS[name](tmp_path / "x.jsonl"))
    state = LoaderState("f", 3, {0: toy_lane(1, 2, datasets=1)}, ("a",))
    for changed in _changed(json.loads(state.to_json()), odd):
        _attempt(lambda changed=changed: LoaderState.from_json(json.dumps(changed)))
    write_columns(tmp_path / "columns", {"a": np.arange(3)}, {"format": "f"})
    content = (tmp_path / "columns").read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    for changed in _changed(json.loads(content[8 : 8 + size]), odd):
        header = json.dumps(changed).encode()
        (tmp_path / "columns").write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
        _attempt(lambda: read_columns(tmp_path / "columns", {"a": ("<i8", 1)}, "f"))


def test_any_value_in_any_place_of_a_sample_log(tmp_path: Path) -> None:
    odd = itertools.cycle(_ODD)
    rows = {name: np.zeros(1, kind) for name, kind in COLUMNS.items()}
    state = LoaderState("f", 1, {0: toy_lane(1, 2, datasets=1)}, ("a",))
    path = write_segment(tmp_path, LogSegment(1, 1, 0, state, rows, ({"key": "k"},)))
    magic, header, rest = path.read_bytes().split(b"\n", 2)
    sections = json.loads(header)["sections"]
    contents: list[tuple[bytes, bytes]] = []
    for changed in [*_changed(json.loads(header), odd), *_changed(json.loads(header), odd)]:
        contents.append((json.dumps(changed).encode(), rest))
    plain = zlib.decompressobj().decompress(rest[: sections[0][2]])
    for changed in _changed(json.loads(plain), odd):
        text = json.dumps(changed).encode()
        deflated = zlib.compress(text)
        held = json.loads(header)
        held["sections"][0][1:] = [len(text), len(deflated), zlib.crc32(deflated)]
        contents.append((json.dumps(held).encode(), deflated + rest[sections[0][2] :]))
    for head, body in contents:
        path.write_bytes(b"\n".join((magic, head, body)))
        _attempt(lambda: SampleLog(tmp_path).segment(0))
        _attempt(lambda: SampleLog(tmp_path).state(0))
