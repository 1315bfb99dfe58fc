"""The doctor finds what is planted: wrong kernels, packages, limits, storage, clocks and sums."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.cli.main import main
from mmscale.doctor import kernels as kernel_checks
from mmscale.doctor import machine
from mmscale.doctor.lines import Line, merge, read_lines, worst
from tests.engine.ranks import free_port

CPU = torch.device("cpu")


def by_name(lines: Any) -> dict[str, Line]:
    return {line.name: line for line in lines}


def test_the_kernels_of_this_machine_are_right() -> None:
    lines = by_name(kernel_checks.kernels(CPU))
    assert {line.status for line in lines.values()} == {"ok"}
    assert {"attention by sdpa in float16", "experts in bfloat16", "fused AdamW in float32"} <= lines.keys()


@pytest.mark.parametrize(
    ("kernel", "line", "value"),
    [
        ("varlen_attention", "attention by sdpa in bfloat16", 1.05),
        ("linear_cross_entropy", "head and loss in bfloat16", 1.05),
        ("_experts", "experts in bfloat16", 1.05),
        ("_norm", "norm in bfloat16", float("nan")),
    ],
)
def test_a_wrong_kernel_is_a_failure(monkeypatch: pytest.MonkeyPatch, kernel: str, line: str, value: float) -> None:
    right = getattr(kernel_checks, kernel)
    monkeypatch.setattr(kernel_checks, kernel, lambda *args: right(*args) * value)
    lines = by_name(kernel_checks.kernels(CPU))
    assert lines[line].status == "failure"
    assert "wrong values" in lines[line].remedy
    assert sum(each.status == "failure" for each in lines.values()) == 2, "in two precisions"


def test_a_wrong_gradient_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_checks._norm
    monkeypatch.setattr(
        kernel_checks, "_norm", lambda x: right({**x, "weight": x["weight"].detach() + 0 * x["weight"]})
    )
    assert by_name(kernel_checks.kernels(CPU))["norm in float16"].status == "failure"


def test_a_kernel_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(kernel_checks, "varlen_attention", broken)
    line = by_name(kernel_checks.kernels(CPU))["attention by sdpa in float16"]
    assert (line.status, line.found) == ("failure", "it failed: no kernel image is available")


def test_packages_outside_of_their_ranges_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name(machine.packages())["packages"].status == "ok"
    monkeypatch.setattr(machine, "version", lambda name: "0.0.1")
    line = by_name(machine.packages())["packages"]
    assert line.status == "failure"
    assert "torch 0.0.1 is not >=" in line.found


def test_a_driver_without_cuda_in_torch_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    monkeypatch.setattr(machine, "_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = by_name(machine.devices())["driver"]
    assert line.status == "failure"
    assert "550.54.15" in line.found


def test_limits_below_the_need_are_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert by_name(machine.limits(8))["open files"].status == "ok"
    line = by_name(machine.limits(1000))["open files"]
    assert (line.status, line.remedy) == ("failure", "ulimit -n 2512; the hard limit is 4,096")
    monkeypatch.setattr(machine, "_LEAST_SHARED_BYTES", 1 << 62)
    assert by_name(machine.limits(8))["shared memory"].status == "failure"


def test_storage_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STORAGE_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "_SLOW_STORAGE", 0.0)
    (line,) = machine.storage(tmp_path / "runs", 0)
    assert line.status == "ok", line
    assert not list((tmp_path / "runs").iterdir())


def test_storage_that_lies_or_refuses_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STORAGE_BYTES", 1 << 16)
    (tmp_path / "file").touch()
    (line,) = machine.storage(tmp_path / "file", 0)
    assert (line.status, "cannot be written" in line.found) == ("failure", True)
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"other")
    (line,) = machine.storage(tmp_path / "runs", 0)
    assert (line.status, "differ from those written" in line.found) == ("failure", True)


def test_equal_lines_of_ranks_are_one_line() -> None:
    good, bad = Line("norm", "ok", "1e-3"), Line("norm", "failure", "nan", "reinstall")
    last = Line("clocks", "ok", "0 s")
    merged = merge([[good, last], [bad], [good]])
    assert [(line.name, line.status, line.ranks) for line in merged] == [
        ("norm", "ok", (0, 2)),
        ("norm", "failure", (1,)),
        ("clocks", "ok", (0,)),
    ]
    assert worst(merged) == "failure"
    assert worst([]) == "ok"


@pytest.mark.parametrize(
    "data", [b"no json", b'[{"name": "x"}]', b'[{"name":"a","status":"fine","found":"","remedy":""}]']
)
def test_lines_of_a_broken_rank_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        read_lines(data)


WRONG_RANK = """
import os, time, torch.distributed as dist
from mmscale.cli.main import main
right_reduce, right_time = dist.all_reduce, time.time
def wrong_reduce(values, *args, **options):
    right_reduce(values, *args, **options)
    if values.numel() > 1000: values[7] += 1
if os.environ.get("RANK") == "1":
    dist.all_reduce, time.time = wrong_reduce, lambda: right_time() - 30
raise SystemExit(main(["doctor", "--folder", {folder!r}, "--json"]))
"""


def test_ranks_of_a_launcher_are_not_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["doctor", "--ranks", "2"]) == 2
    assert "--ranks 2: this process is one of 3 ranks already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_of_which_one_is_wrong(tmp_path: Path) -> None:
    """The process starts two ranks; rank 1 has a late clock and adds wrongly."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "mmscale.cli.main", "doctor", "--folder", str(tmp_path), "--json"]
    right = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    lines = by_name(Line(**line) for line in json.loads(right.stdout)["lines"])
    assert (right.returncode, lines["all-reduce"].status, lines["clocks"].status) == (0, "ok", "ok")
    assert tuple(lines["norm in float16"].ranks) == (0, 1)
    port, processes = free_port(), []
    for rank in range(2):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        own = environment | variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        program = WRONG_RANK.format(folder=str(tmp_path))
        processes.append(subprocess.Popen([sys.executable, "-c", program], env=own, stdout=subprocess.PIPE, text=True))
    printed, _ = [process.communicate(timeout=120)[0] for process in processes]
    lines = by_name(Line(**line) for line in json.loads(printed)["lines"])
    assert processes[0].returncode == 1
    assert (lines["all-reduce"].status, lines["all-reduce"].found) == ("failure", "wrong sums on ranks 1")
    assert lines["clocks"].status == "warning"
    assert "of rank" in lines["clocks"].remedy
