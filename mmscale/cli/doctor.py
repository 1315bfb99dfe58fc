"""``mmscale doctor``: examine this machine, or all machines of an allocation, before a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import emit, printable

if TYPE_CHECKING:
    from mmscale.doctor.lines import Line

app = typer.Typer()

_MOST_RANKS = 8


@app.command(epilog="Example: mmscale doctor --folder runs")
def doctor(
    folder: Path = typer.Option(Path("runs"), "--folder", help="A folder for runs; its storage is measured."),
    ranks: int | None = typer.Option(
        None, "--ranks", min=1, max=64, help="Ranks on this machine; by default one for each GPU, or two on a CPU."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu or cuda, as engine.device."),
    timeout: float = typer.Option(120.0, "--timeout", min=1.0, help="Seconds until a missing rank counts as lost."),
    output: Path = typer.Option(None, "--output", help="Write the JSON object to this file too."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object: status, lines."),
) -> None:
    """Check packages, devices, kernels, ranks, storage, limits and clocks.

    Started by srun, torchrun or MPI, each process is one rank, and the checks cover all machines. Alone, the command
    starts its ranks here. Each line is ok, a warning or a failure, the last two with a remedy. Exit code 0: no failure.
    1: a failure.
    """
    from data_pipeline.io.atomic import write_whole
    from mmscale.doctor.lines import worst
    from mmscale.doctor.ranks import Settings, examine
    from mmscale.errors import ConfigError
    from mmscale.io.rank_variables import NO_LAUNCHER, launched_rank

    launched = launched_rank(os.environ)
    if launched.launcher != NO_LAUNCHER and ranks is not None:
        raise ConfigError(
            f"--ranks {ranks}: this process is one of {launched.world_size} ranks already, by {launched.launcher}; "
            "leave it out"
        )
    if launched.launcher == NO_LAUNCHER and (count := ranks or _own_ranks(device)) > 1:
        words = ["doctor", "--folder", str(folder), "--device", device, "--timeout", str(timeout)]
        words += [] if output is None else ["--output", str(output)]
        raise typer.Exit(_launch([*words, "--json"] if json else words, count))
    lines = examine(Settings(device, timeout), folder)
    if lines is None:
        return
    status = worst(lines)
    found = {"status": status, "lines": [asdict(line) for line in lines]}
    if output is not None:
        write_whole(output, dumps(found).encode(), parents=True)
    if json:
        emit(found, json=True)
    else:
        _print(lines)
    if status == "failure":
        raise typer.Exit(1)


def _own_ranks(device: str) -> int:
    from mmscale.dist import device_type

    if device_type(device) == "cpu":
        return 2
    import torch

    return torch.cuda.device_count()


def _launch(words: Sequence[str], ranks: int) -> int:
    """Run this command line on several ranks of this machine and return their exit code."""
    from launchers.local import launch

    with tempfile.TemporaryDirectory(prefix="mmscale-doctor-") as folder:
        return launch(words, ranks, Path(folder))


def _print(lines: Sequence[Line]) -> None:
    several = len({rank for line in lines for rank in line.ranks}) > 1
    for line in lines:
        ranks = f" (rank{'s' * (len(line.ranks) > 1)} {_ranks(line.ranks)})" if several else ""
        print(f"{line.status:<8} {line.name}: {printable(line.found)}{ranks if line.status != 'ok' else ''}")
        if line.remedy:
            print(f"{'':<8} {printable(line.remedy)}")
    counts = {status: sum(line.status == status for line in lines) for status in ("failure", "warning")}
    print(f"{len(lines)} checks, {counts['failure']} failures, {counts['warning']} warnings")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_RANKS]))
    return shown + (f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else "")
