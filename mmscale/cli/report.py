"""``mmscale report``: write the report of a run again, from its folder."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from mmscale.cli.console import emit

app = typer.Typer()

_RUN = typer.Argument(help="A run folder, finished or not.", metavar="RUN")


@app.command(epilog="Example: mmscale report runs/quickstart")
def report(
    run: Path = _RUN,
    json: bool = typer.Option(False, "--json", help="Print one JSON object: path and bytes of the report."),
) -> None:
    """Write report.html of a run: curves, samples, configuration, and a page of the samples of each loss spike."""
    from mmscale.report.build import build_report
    from mmscale.run.step_samples import write_spike_pages

    def note(line: str) -> None:
        print(f"mmscale: {line}", file=sys.stderr)

    if (run / "config.yaml").is_file():
        write_spike_pages(run, note)
    path = build_report(run, note)
    if json:
        emit({"report": str(path), "bytes": path.stat().st_size}, json=True)
    else:
        print(path)
