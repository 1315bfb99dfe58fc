"""A damaged file in a run folder removes its part from the report and adds a message; no exception is raised."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.errors import MMScaleError
from mmscale.evaluate.result import Memory, Params, PerplexityResult, RunResult, SetResult, read_result, write_result
from mmscale.metrics.goodput import read_goodput
from mmscale.metrics.metrics_file import cut_back, read_metrics
from mmscale.report.build import build_report, render
from mmscale.report.captions import CaptionRecord, read_captions, save_captions
from mmscale.report.configuration import save_origins
from tests.report.pages import Page

_DEEP = "[" * 100_000
_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
_STEP = {"step": 1, "loss": 2.0, "seconds": 0.5, "data_wait_seconds": 0.1, "time": 9.0, "lr": 1e-3, "mfu": 0.5}
_ROUTER = {"router/max_over_mean": 1.5, "router/dead": 1, "router/0/max_over_mean": 1.5, "router/0/entropy": 0.5}
_WINDOW = {"first": 1, "last": 2, "blocks": [0], "tokens": [[3, 2]], "entropy": [[1.5, 1.0]], "dropped": [1]}


def _run(folder: Path) -> Path:
    steps = [_STEP | {"step": step, "forward_seconds": 0.1, "tokens": 10, "samples": 2, **_ROUTER} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "router.json").write_text(json.dumps(_WINDOW | {"load": [[[2, 1], [0, 2]]]}))
    started = {"time": 1.0, "kind": "started", "seconds": 0.0, "step": 0}
    (folder / "goodput.jsonl").write_text(json.dumps(started) + "\n")
    sets = {
        "name": SetResult(0.5, 0.02, 0.02, 200, "name among 50", 0.035, 0.01),
        "text": PerplexityResult(2.0, 0.03, 7.389, 1.25, 12_345, 50_000, 17),
    }
    write_result(folder, RunResult(2, 3, "fp32", 2, 75.0, Params(7, 5, {"decoder": 7}), sets, memory=Memory((1, 2))))
    (folder / "captions.json").write_text(
        '{"captions": [{"set": "a", "image": "x.png", "expected": "b", "generated": "c", "right": true}]}'
    )
    (folder / "config.yaml").write_text("run_dir: x\ndata: {lanes: 8}\n")
    save_origins(folder, {"data.lanes": "x.yaml:3"})
    return folder


def test_a_whole_run_has_no_note(tmp_path: Path) -> None:
    notes: list[str] = []
    page = Page(render(_run(tmp_path), notes.append))
    assert notes == []
    assert "50.0" in page.text
    assert "dead experts" in page.text
    assert read_captions(tmp_path) == [CaptionRecord("a", "x.png", "b", "c", True)]


@pytest.mark.parametrize("name", ["result.json", "captions.json", "router.json", "config.yaml", "report/origins.json"])
@pytest.mark.parametrize("text", ["{", "[]", "3", _DEEP, _LAUGHS + "{", "\x80", None])
def test_a_damaged_file_is_named_and_the_rest_shown(tmp_path: Path, name: str, text: str | None) -> None:
    path = _run(tmp_path) / name
    path.unlink()
    if text is None:
        os.mkfifo(path)
    else:
        path.write_bytes(text.encode("latin-1"))
    notes: list[str] = []
    page = Page(render(tmp_path, notes.append))
    assert len(notes) == 1
    assert f"{path} is damaged: " in notes[0]
    assert len(notes[0]) < 400 + len(str(path))
    assert " ".join(notes[0].split()) in page.text
    assert "tokens per second" in page.text


_ODD: list[Any] = [None, "x", -1, 0, 10**400, 1e308, float("nan"), float("inf"), [], {}, True]


def test_any_value_in_any_place_of_a_file(tmp_path: Path) -> None:
    folder, odd = _run(tmp_path), itertools.cycle(_ODD)
    for name in ("result.json", "captions.json", "router.json", "metrics.jsonl", "goodput.jsonl"):
        whole = (folder / name).read_text()
        lines = name.endswith("l")
        held = [json.loads(line) for line in whole.splitlines()] if lines else json.loads(whole)
        for changed in _changed(held, odd)[::2]:
            text = "".join(json.dumps(line) + "\n" for line in changed) if lines else json.dumps(changed)
            (folder / name).write_text(text)
            render(folder)
        (folder / name).write_text(whole)


def _changed(held: Any, odd: Iterator[Any]) -> list[Any]:
    """Return copies of a tree, each with one node replaced by another value."""
    if isinstance(held, dict):
        return [next(odd), *(held | {key: inner} for key, child in held.items() for inner in _changed(child, odd))]
    if isinstance(held, list):
        return [[*held[:n], inner, *held[n + 1 :]] for n, child in enumerate(held) for inner in _changed(child, odd)]
    return [next(odd)]


def test_a_damaged_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(_STEP).encode() + b"\n"
    for bad in (
        b"\0" * 100,
        b'{"step": true}',
        b'{"step": 1e3}',
        b'{"step": 2, "seconds": "x"}',
        b'{"step": 2, "time": 1}',
        _DEEP.encode(),
    ):
        path.write_bytes(good + bad + b"\n" + good)
        assert read_metrics(path) == [_STEP, _STEP]
        assert cut_back(path, 5) == 2
        assert path.read_bytes() == good + good
    path.write_bytes(good + b" " * (2 << 20))
    for read in (read_metrics, lambda path: cut_back(path, 5), lambda path: read_goodput(path.parent)):
        with pytest.raises(MMScaleError, match=r"metrics.jsonl is damaged: a line is longer"):
            read(path)


def test_a_result_keeps_keys_that_this_version_does_not_know(tmp_path: Path) -> None:
    folder = _run(tmp_path)
    held = json.loads((folder / "result.json").read_text()) | {"new": [1]}
    held["heldout"]["name"]["new"] = {"a": np.pi}
    (folder / "result.json").write_text(json.dumps(held))
    assert read_result(folder) == held


def test_half_a_pair_of_utf_16_is_shown_escaped(tmp_path: Path) -> None:
    save_captions(_run(tmp_path), [("a", np.zeros((2, 2, 3), np.uint8), "half \ud800", "half \udfff")])
    assert read_captions(tmp_path)[0].generated == "half \udfff"
    page = build_report(tmp_path).read_text()
    assert "half \\ud800" in page
    assert "half \\udfff" in page


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("captions.json", ["captions", 0, "right"], "often", "captions.0.right: expected true or false"),
        ("captions.json", ["captions"], 3, "captions: expected a list"),
        ("captions.json", [], [], "expected a mapping"),
        ("result.json", ["heldout", "name", "score"], "x", "heldout.name.score: expected a number"),
        ("result.json", ["heldout", "name", "n"], None, "heldout.name.n: expected a whole number"),
        ("result.json", ["heldout", "text"], {"kind": "perplexity"}, "heldout.text.loss: required, and missing"),
        ("result.json", ["heldout", "text"], 3, "heldout.text: expected a mapping"),
        ("result.json", ["heldout", "text"], {"kind": "generation"}, "heldout.text.score: required, and missing"),
        ("result.json", ["heldout", "text"], {"kind": "drawings"}, "heldout.text.score: required, and missing"),
    ],
)
def test_a_wrong_value_is_named_in_words_of_files(
    tmp_path: Path, name: str, path: list[Any], value: Any, said: str
) -> None:
    file = _run(tmp_path) / name
    held = value
    if path:
        held = json.loads(file.read_text())
        inner = held
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    file.write_text(json.dumps(held))
    with pytest.raises(MMScaleError) as caught:
        read_captions(tmp_path) if name == "captions.json" else read_result(tmp_path)
    assert str(caught.value).startswith(f"{file} is damaged: {said}")
