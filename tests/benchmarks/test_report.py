"""The output of every benchmark: ``--json`` prints an object of the same form."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter

from benchmarks import forward, loader, report, soak, torture, train_step, zero_memory
from benchmarks.peers.job import Scenario
from benchmarks.report import BenchmarkRow, Case

FOLDER = Path(report.__file__).parent
SERVERS = {"servers", "slow_link"}
"""Programs that benchmarks start; they are not benchmarks."""


class CaseForm(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    case: str
    ours: float
    peers: dict[str, float]
    unit: str
    ratio: float | None


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    benchmark: str
    machine: dict[str, Any]
    cases: list[CaseForm]


def benchmarks() -> list[str]:
    """Return every module of the folder that runs as a program and is not a server."""
    names = [path.stem for path in sorted(FOLDER.glob("*.py")) if 'if __name__ == "__main__":' in path.read_text()]
    return [name for name in names if name not in SERVERS]


def printed(rows: Iterable[BenchmarkRow], capsys: pytest.CaptureFixture[str]) -> Form:
    report.show("x", lambda: rows, True)
    return TypeAdapter(Form).validate_json(capsys.readouterr().out)


def test_every_benchmark_is_found() -> None:
    assert {"attention", "forward", "loader", "soak", "torture", "train_step", "zero_memory"} <= set(benchmarks())


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_prints_through_the_one_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, bool]] = []

    def show(
        benchmark: str, measure: Callable[[], Iterable[BenchmarkRow]], as_json: bool, settings: object = None
    ) -> list[BenchmarkRow]:
        shown.append((benchmark, as_json))
        return [soak.Soaked({"complaints": []})]

    monkeypatch.setattr(report, "show", show)
    monkeypatch.setattr(sys, "argv", [name, "--json"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert shown == [(name, True)]


@pytest.mark.parametrize("name", benchmarks())
def test_no_benchmark_makes_the_object_itself(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    keys = {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert not keys & {"benchmark", "machine", "cases", "rows"}


def test_the_ratio_is_that_to_the_best_peer(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        Case("time", 2.0, {"a": 3.0, "b": 1.0}, "s"),
        Case("speed", 2.0, {"a": 3.0, "b": 1.0}, "x/s", lower_is_better=False),
        Case("in turns", 2.0, {"a": 3.0}, "s", paired=1.75),
        Case("alone", 2.0, {}, "s"),
        Case("none", 0.0, {"a": 3.0}, "s"),
    ]
    form = printed(cases, capsys)
    assert [case.ratio for case in form.cases] == [0.5, 0.667, 1.75, None, None]
    assert [case.peers for case in form.cases][2:4] == [{"a": 3.0}, {}]
    report.show("x", lambda: cases, False)
    assert capsys.readouterr().out.splitlines() == [
        "time: ours 2 s; a 3, b 1; ratio 0.50",
        "speed: ours 2 x/s; a 3, b 1; ratio 0.67",
        "in turns: ours 2 s; a 3; ratio 1.75",
        "alone: ours 2 s",
        "none: ours 0 s; a 3",
    ]


STEP = train_step.TrainStepRow(
    "mllama",
    "mixed",
    2,
    3,
    tokens=100.0,
    tokens_per_second={"ours": 20.0, "hugging face": 10.0},
    step_ms={"ours": 5.0, "hugging face": 10.0},
    cpu_ms={"ours": 4.0, "hugging face": 8.0},
    padding={"ours": 0.0, "hugging face": 0.5, "ours, images": 0.1, "hugging face, images": 0.2},
    ratio={"hugging face": 2.1},
    loss_difference=1e-7,
)
MEMORY = zero_memory.MemoryRow(
    2, 3, "bf16", 10, zero_memory.Bytes(20.0, 40.0, 120.0), {"weights": 24.0, "optimizer": 120.0}, 1.0, 2.0
)
SOAKED = soak.Soaked(
    dict.fromkeys(soak.UNITS, 1)
    | {
        "workers": 2,
        "left_out": {"decode": 3},
        "answers": {"ok": 4},
        "memory": {"slope_mib_per_hour": 0.5, "most_mib": 7.0, "readings": 9},
        "complaints": ["sample 1 came a second time"],
    }
)
TORTURED = torture.Outcome(
    {
        "steps": 20,
        "kills": {"all": 2},
        "while_saving": 1,
        "lives_by_ranks": {"2": 3},
        "largest_loss_difference": 0.0,
        "largest_weight_difference": 0.0,
        "undisturbed_loss_difference": None,
        "undisturbed_weight_difference": None,
        "undisturbed_seconds": 10.0,
        "tortured_seconds": 20.0,
        "goodput": 0.5,
        "complaints": [],
    }
)
LOADED = loader.Table(
    [
        loader.LoaderRow(Scenario.EXACT, 2, "samples/s", {"ours": 8.0, "energon": 4.0, "bare": 10.0}),
        loader.LoaderRow(Scenario.RESUME, 2, "s", {"ours": 1.0}),
    ],
    [],
)
FORWARD = forward.ForwardRow(
    "qwen2", "forward", {"ours": 1.0, "transformers": 2.0}, 1.9, {"ours": 0.0, "transformers": 0.5}, 1e-6
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            STEP,
            [
                ("mllama, mixed, 2 ranks, ZeRO 3: speed at 100 useful tokens a step", 20.0, "useful tokens/s", 2.1),
                ("mllama, mixed, 2 ranks, ZeRO 3: step", 5.0, "ms", 2.1),
                ("mllama, mixed, 2 ranks, ZeRO 3: CPU time of a rank", 4.0, "ms", 2.0),
                ("mllama, mixed, 2 ranks, ZeRO 3: padding", 0.0, "share of rows", None),
                ("mllama, mixed, 2 ranks, ZeRO 3: padding, images", 0.1, "share of rows", 2.0),
                ("mllama, mixed, 2 ranks, ZeRO 3: difference of the losses", 1e-7, "relative", None),
            ],
        ),
        (
            MEMORY,
            [
                ("2 ranks, ZeRO 3, bf16, 0.0 M values: weights", 24.0, "bytes", 0.833),
                ("2 ranks, ZeRO 3, bf16, 0.0 M values: optimizer", 120.0, "bytes", 1.0),
                ("2 ranks, ZeRO 3, bf16, 0.0 M values: peak at start", 1.0, "bytes", 140.0),
                ("2 ranks, ZeRO 3, bf16, 0.0 M values: peak in steps", 2.0, "bytes", 90.0),
            ],
        ),
        (
            LOADED,
            [
                ("exact, 2 workers", 8.0, "samples/s", 2.0),
                ("exact, 2 workers, beside no loader", 8.0, "samples/s", 0.8),
                ("resume, 2 workers", 1.0, "s", None),
            ],
        ),
        (
            FORWARD,
            [
                ("qwen2, forward: time", 1.0, "ms", 1.9),
                ("qwen2, forward: padding", 0.0, "share of rows", None),
                ("qwen2, forward: difference of the outputs", 1e-6, "of the largest value", 100.0),
            ],
        ),
        (
            SOAKED,
            [
                *((key.replace("_", " "), 1.0, unit, None) for key, unit in soak.UNITS.items()),
                ("left out: decode", 3.0, "samples", None),
                ("answers: ok", 4.0, "answers", None),
                ("memory: slope mib per hour", 0.5, "MiB/h", None),
                ("memory: most mib", 7.0, "MiB", None),
                ("memory: readings", 9.0, "readings", None),
                ("complaints", 1.0, "complaints", None),
            ],
        ),
        (
            TORTURED,
            [
                ("kills: all", 2.0, "kills", None),
                ("kills while saving", 1.0, "kills", None),
                ("lives on 2 ranks", 3.0, "lives", None),
                ("largest loss difference", 0.0, "nats", None),
                ("largest weight difference", 0.0, "absolute", None),
                ("20 steps", 20.0, "s", 0.5),
                ("complaints", 0.0, "complaints", None),
            ],
        ),
    ],
    ids=lambda value: type(value).__module__.partition(".")[2] if not isinstance(value, list) else "",
)
def test_rows_become_cases(
    row: BenchmarkRow, expected: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    form = printed([row], capsys)
    assert [(case.case, case.ours, case.unit, case.ratio) for case in form.cases] == expected
    assert row.line()
