"""``mmscale launch rehearse``: walk the control plane of a big run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import console, emit, print_table, progress

if TYPE_CHECKING:
    from mmscale.rehearse.failures import IntervalRow
    from mmscale.rehearse.report import Report

app = typer.Typer()


@app.command(epilog="Example: mmscale launch rehearse configs/quickstart.yaml --nodes 1000 --lanes 16000")
def rehearse(
    config: Path = typer.Argument(help="A run's YAML file.", metavar="CONFIG"),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    nodes: int = typer.Option(..., "--nodes", min=1, max=100_000, help="Machines of the big run."),
    gpus_per_node: int = typer.Option(8, "--gpus-per-node", min=1, max=64, help="Ranks of each machine."),
    lanes: int = typer.Option(None, "--lanes", min=1, help="Rehearse with this data.lanes instead of the file's."),
    step_seconds: float = typer.Option(10.0, "--step-seconds", min=1e-3, help="Duration of a training step."),
    days: float = typer.Option(30.0, "--days", min=1e-3, help="Length of the run in days."),
    failures: str = typer.Option("llama-3", "--failures", help="Published failure rate: llama-3 or a100-cluster."),
    failures_per_node_day: float = typer.Option(
        None, "--failures-per-node-day", min=0, max=1e3, help="Failures of a machine per day, instead of a preset's."
    ),
    preemptions_per_day: float = typer.Option(
        0.0, "--preemptions-per-day", min=0, max=1e4, help="Preemptions of the whole job per day."
    ),
    grace_seconds: float = typer.Option(
        0.0, "--grace-seconds", min=0, help="Time from the notice of a preemption to its end."
    ),
    restart_minutes: float = typer.Option(
        10.0, "--restart-minutes", min=0, help="Time from an interruption to the first new step."
    ),
    storage_gb_per_second: float = typer.Option(
        100.0, "--storage-gb-per-second", min=1e-6, help="Bandwidth with which all ranks together write a checkpoint."
    ),
    copy_gb_per_second: float = typer.Option(
        5.0, "--copy-gb-per-second", min=1e-6, help="Bandwidth with which a rank copies its share to host memory."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the simulated interruptions."),
    html: Path | None = typer.Option(None, "--html", help="Write all figures and the curve of goodput as a page."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object: figures, findings, intervals."),
) -> None:
    """Rehearse a big run: the order of its data, rendezvous, checkpoints, logs and failures. Nothing is trained.

    Each line names its basis: real (this project's code ran for every rank), scaled (it ran for some ranks or steps) or
    simulated. Exit code 1: a value exceeds its limit; the findings name it and the remedy.
    """
    from dataclasses import asdict

    from mmscale.cli.run_file import load_run
    from mmscale.plan.checkpoints import PRESETS
    from mmscale.rehearse.rehearse import NUM_PARTS, BigRun, write_page
    from mmscale.rehearse.rehearse import rehearse as run_rehearsal

    if failures not in PRESETS:
        raise typer.BadParameter(f"{failures!r}: expected {' or '.join(PRESETS)}", param_hint="--failures")
    run = load_run(config, overrides or []).value
    cluster = BigRun(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        preset=PRESETS[failures],
        failures_per_node_day=failures_per_node_day,
        preemptions_per_day=preemptions_per_day,
        grace_seconds=grace_seconds,
        restart_seconds=60 * restart_minutes,
        storage_bytes_per_second=1e9 * storage_gb_per_second,
        copy_bytes_per_second=1e9 * copy_gb_per_second,
        step_seconds=step_seconds,
        days=days,
    )
    with progress("rehearse", NUM_PARTS) as meter:
        report, rows = run_rehearsal(run, cluster, seed, lanes=lanes, advance=meter.advance)
    if html is not None:
        title = f"{config.name} on {nodes:,} nodes with {gpus_per_node} ranks each"
        write_page(html, title, report, rows)
        console.print(f"wrote {html}", markup=False)
    if json:
        emit({"ranks": cluster.world_size, **report.to_json(), "intervals": [asdict(row) for row in rows]}, json=True)
    else:
        _print(report, rows)
    if report.findings:
        raise typer.Exit(1)


def _print(report: Report, rows: list[IntervalRow]) -> None:
    from dataclasses import asdict

    from mmscale.rehearse.rehearse import value_text

    print_table(
        [
            {"part": f.part, "figure": f.name, "value": value_text(f.value), "unit": f.unit, "basis": f.basis.value}
            for f in report.figures
        ]
    )
    print()
    print_table([asdict(row) for row in rows])
    print()
    for finding in report.findings:
        print(f"finding {finding.name}: {finding.message}")
    print(f"findings: {len(report.findings)}")
