"""``mmscale check``: prove before a run that its ranks cannot disagree on collectives."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from mmscale.cli.console import emit

app = typer.Typer()


@app.command(epilog="Example: mmscale check configs/quickstart.yaml")
def check(
    config: Path = typer.Argument(help="A run's YAML file.", metavar="CONFIG"),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    ranks: int | None = typer.Option(
        None, min=2, max=16, help="Number of simulated ranks; by default 2, or 4 with engine.expert_parallel."
    ),
    json: bool = typer.Option(
        False, "--json", help="Print one JSON object: ok, ranks, stages, collectives, difference."
    ),
) -> None:
    """Check that all ranks of a run make the same collectives, whatever their batches are.

    Ranks that make different collectives hang. The command trains every stage of a small copy of the model on simulated
    ranks, each with other batches: with and without images, for one expert, without data. It also evaluates and saves.
    It reads no data of the run. Exit code 0: all ranks agree. 1: it prints the first collective that differs.
    """
    from mmscale.check.check import check_run
    from mmscale.cli.run_file import load_run

    report = check_run(load_run(config, overrides or []).value, ranks=ranks)
    if json:
        emit(report.to_json(), json=True)
    elif report.ok:
        print(report)
    else:
        print(f"mmscale: {report}", file=sys.stderr)
    if not report.ok:
        raise typer.Exit(1)
