"""Walk the control plane of a big run on one machine: all parts of a rehearsal, in order."""

from __future__ import annotations

import math
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from mmscale.engine.expert_parallel import check_ranks
from mmscale.errors import ConfigError
from mmscale.plan.checkpoints import FailurePreset
from mmscale.rehearse.checkpoint_files import rehearse_checkpoint
from mmscale.rehearse.data_order import RehearsedData, rehearse_order
from mmscale.rehearse.failures import (
    Hazards,
    IntervalRow,
    daly_interval,
    expected_failures,
    interval_table,
    spaced_intervals,
    spread,
    young_interval,
)
from mmscale.rehearse.rendezvous import rehearse_rendezvous
from mmscale.rehearse.report import Basis, Report
from mmscale.rehearse.run_files import rehearse_heartbeats, rehearse_lock, rehearse_logs
from mmscale.report.charts import Chart, Line
from mmscale.report.page import render_page
from mmscale.run.config import RunConfig

FAILURES = "failures"
_DAY = 86_400.0
NUM_PARTS = 6


@dataclass(frozen=True)
class BigRun:
    """The machines of the big run, and what interrupts it.

    Attributes:
        nodes: Number of machines.
        gpus_per_node: Ranks of a machine.
        preset: Published failure statistics.
        failures_per_node_day: Failures of a machine per day; None takes the preset's.
        preemptions_per_day: Preemptions of the whole job per day.
        grace_seconds: Time between the notice of a preemption and its end.
        restart_seconds: Time from an interruption to the first new step.
        storage_bytes_per_second: Bandwidth with which all ranks together write a checkpoint.
        copy_bytes_per_second: Bandwidth with which a rank copies its share to host memory before a background save.
        step_seconds: Duration of a step.
        days: Length of the run.
    """

    nodes: int
    gpus_per_node: int
    preset: FailurePreset
    failures_per_node_day: float | None
    preemptions_per_day: float
    grace_seconds: float
    restart_seconds: float
    storage_bytes_per_second: float
    copy_bytes_per_second: float
    step_seconds: float
    days: float

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Limits:
    """Values that a rehearsal may not exceed without a finding."""

    join_seconds: float = 60.0
    file_operations_per_second: float = 5_000.0
    merge_seconds: float = 60.0
    resume_opens: float = 1e6
    log_bytes_per_day: float = 50e9
    lost_goodput: float = 0.1


def rehearse(
    config: RunConfig,
    cluster: BigRun,
    seed: int,
    *,
    lanes: int | None = None,
    draws: int = 8,
    packed_lanes: int = 64,
    limits: Limits = Limits(),
    advance: Callable[[int, str], None] = lambda count, note: None,
) -> tuple[Report, list[IntervalRow]]:
    """Rehearse a run. Files go to a temporary folder, which is removed.

    Args:
        config: The run.
        cluster: Machines and hazards.
        seed: Seed of the simulated interruptions.
        lanes: Number of lanes to rehearse instead of that of each stage; None for the configured one.
        draws: Samples per lane and step, where samples are drawn without packing.
        packed_lanes: Lanes that are also packed.
        limits: Limits of the findings.
        advance: Called with 1 and the name of each of the ``NUM_PARTS`` parts when it ends, and with 0 in between.

    Raises:
        ConfigError: the run has no stage, or ``engine.expert_parallel`` does not divide the ranks.
        DataPipelineError: a manifest or a shard cannot be read.
        LaunchError: a process of the rehearsed rendezvous failed.
    """
    if not config.stages:
        raise ConfigError("stages: a rehearsal needs a run with a stage")
    check_ranks(config.engine.expert_parallel, cluster.world_size)
    report = Report()
    worlds = _worlds(cluster)
    blocks = [config.stage_data(number) for number in range(len(config.stages))]
    if lanes is not None:
        blocks = [block.model_copy(update={"lanes": lanes}) for block in blocks]
    data = rehearse_order(
        report,
        blocks[0],
        config.stage_media(0),
        config.seed,
        worlds,
        micro_lanes=config.engine.micro_lanes,
        draws=draws,
        packed_lanes=packed_lanes,
        advance=lambda: advance(0, "data order"),
    )
    for stage, block in zip(config.stages[1:], blocks[1:], strict=True):
        report.limit(
            "lanes-below-ranks",
            cluster.world_size,
            block.lanes,
            f"stage {stage.name}: data.lanes={block.lanes} for {cluster.world_size:,} ranks: every rank needs a lane; "
            f"raise data.lanes to a multiple of {cluster.world_size * config.engine.micro_lanes}",
        )
    advance(1, "data order")
    rehearse_rendezvous(report, cluster.world_size, most_seconds=limits.join_seconds)
    advance(1, "rendezvous")
    _rehearse_files(report, config, cluster, data, blocks[0].lanes, limits, advance)
    rows = _rehearse_failures(report, config, cluster, seed, limits)
    advance(1, "failures")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report.add("rehearsal", "peak memory of this process", peak, "bytes")
    return report, rows


def _rehearse_files(
    report: Report,
    config: RunConfig,
    cluster: BigRun,
    data: RehearsedData | None,
    num_lanes: int,
    limits: Limits,
    advance: Callable[[int, str], None],
) -> None:
    """Rehearse the parts that write files, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mmscale-rehearsal-") as name:
        folder = Path(name)
        watched = config.engine.watchdog.limits(config.engine.timeout_seconds)
        most = limits.file_operations_per_second
        rehearse_heartbeats(report, folder / "run", watched, cluster.world_size, most_per_second=most)
        rehearse_lock(report, folder / "locked")
        advance(1, "heartbeats and lock")
        saved = folder / "step-00000001"
        saved.mkdir()
        rehearse_checkpoint(
            report,
            config,
            _worlds(cluster),
            saved,
            data.states if data is not None else None,
            most_seconds=limits.merge_seconds,
            most_opens=limits.resume_opens,
            advance=lambda: advance(0, "checkpoint"),
        )
        advance(1, "checkpoint")
        (folder / "logs").mkdir()
        rehearse_logs(
            report,
            config,
            data,
            folder / "logs",
            num_lanes=num_lanes,
            step_seconds=cluster.step_seconds,
            world_size=cluster.world_size,
            most_bytes_per_day=limits.log_bytes_per_day,
        )
        advance(1, "logs")


def _worlds(cluster: BigRun) -> list[int]:
    """Return the numbers of ranks of the rehearsed steps: all, one node fewer, one."""
    fewer = (cluster.nodes - 1) * cluster.gpus_per_node
    return [cluster.world_size, *([fewer] if 1 < fewer < cluster.world_size else []), 1]


def hazards_of(cluster: BigRun, checkpoint_bytes: float, *, background: bool) -> Hazards:
    """Return what interrupts the job. A background save blocks the steps only while the share is copied."""
    rate = cluster.failures_per_node_day
    rate = cluster.preset.per_node_day if rate is None else rate
    write = checkpoint_bytes / cluster.storage_bytes_per_second
    copy = checkpoint_bytes / cluster.world_size / cluster.copy_bytes_per_second
    return Hazards(
        mtbf=_DAY / (rate * cluster.nodes) if rate else math.inf,
        preemption_interval=_DAY / cluster.preemptions_per_day if cluster.preemptions_per_day else math.inf,
        grace=cluster.grace_seconds,
        restart=cluster.restart_seconds,
        blocked=copy if background else write,
        written=write if background else 0.0,
    )


def _rehearse_failures(
    report: Report, config: RunConfig, cluster: BigRun, seed: int, limits: Limits
) -> list[IntervalRow]:
    """Simulate interruptions, and add the goodput of the configured and of the best interval."""
    size = report.value("checkpoint", "bytes of a checkpoint")
    hazards = hazards_of(cluster, size, background=config.checkpoint.background)
    simulated = Basis.SIMULATED

    def add(name: str, value: float, unit: str) -> None:
        report.add(FAILURES, name, value, unit, simulated)

    add("mean time between failures of the job", hazards.mtbf / 3600, "h")
    low, high = spread(hazards, cluster.days, seed)
    add(f"interruptions in {cluster.days:g} days, 5th percentile", low, "interruptions")
    add(f"interruptions in {cluster.days:g} days, 95th percentile", high, "interruptions")
    if cluster.failures_per_node_day is None:
        for cause, count in expected_failures(cluster.preset, cluster.nodes, cluster.days).items():
            add(f"expected failures in {cluster.days:g} days: {cause}", count, "failures")
    add("a save blocks the steps for", hazards.blocked, "s")
    add("a save is complete after", hazards.blocked + hazards.written, "s")
    daly, young = daly_interval(hazards), young_interval(hazards)
    configured, step = config.checkpoint.every_steps, cluster.step_seconds
    center = daly / step if math.isfinite(daly) else (configured or config.total_steps)
    rows = interval_table(hazards, step, spaced_intervals(max(center, 1.0), configured), seed)
    best = max(rows, key=lambda row: row.simulated)
    add("best interval of the table", best.seconds, "s")
    add("best interval of the table, in steps", best.every_steps, "steps")
    add("Young's optimum", young, "s")
    add("Daly's optimum", daly, "s")
    add("goodput with the best interval", best.simulated, "")
    report.limit(
        "goodput",
        1 - best.simulated,
        limits.lost_goodput,
        f"even with the best interval {1 - best.simulated:.1%} of the time makes no lasting step: shorten the restart "
        f"({cluster.restart_seconds:.0f} s) or the save ({hazards.blocked + hazards.written:.0f} s)",
    )
    now = next((row for row in rows if row.every_steps == configured), None)
    if now is None:
        report.limit(
            "no-interval", 1, 0, "checkpoint.every_steps is null: a failure loses all steps since the stage began"
        )
        return rows
    add("goodput with checkpoint.every_steps", now.simulated, "")
    report.limit(
        "checkpoint-interval",
        best.simulated - now.simulated,
        0.01,
        f"checkpoint.every_steps={configured} has a goodput of {now.simulated:.1%}, "
        f"every_steps={best.every_steps} one of {best.simulated:.1%}",
    )
    report.limit(
        "save-longer-than-interval",
        hazards.written,
        now.seconds,
        f"a save takes {hazards.written:.0f} s, longer than the {now.seconds:.0f} s between two saves: raise "
        "checkpoint.every_steps, or use faster storage",
    )
    return rows


def write_page(path: Path, title: str, report: Report, rows: list[IntervalRow]) -> None:
    """Write figures, findings and the curve of goodput as an HTML page without other files.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [
        Line("simulated", [(row.seconds, 100 * row.simulated) for row in rows], 1),
        Line("formula, failures only", [(row.seconds, 100 * row.formula) for row in rows], 2),
    ]
    optimum = report.value(FAILURES, "Daly's optimum")
    marks = [(optimum, "Daly's optimum")] if math.isfinite(optimum) else []
    note = "Share of the time that made lasting steps; simulated."
    chart = Chart("Goodput", note, lines, axis="seconds between saves", unit=" %", marks=marks, is_log=True)
    figures: list[dict[str, Any]] = [
        {"part": f.part, "name": f.name, "text": value_text(f.value), "unit": f.unit, "basis": f.basis.value}
        for f in report.figures
    ]
    text = render_page(
        Path(__file__).parent / "page.html.jinja",
        title=title,
        chart=chart,
        rows=rows,
        figures=figures,
        findings=report.findings,
    )
    write_whole(path, as_utf8(text), parents=True)


def value_text(value: float | int | str | bool) -> str:
    """Return a value as text: whole numbers with separators, others with four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (math.isfinite(value) and (value.is_integer() or abs(value) >= 1000)):
        return f"{value:,.0f}"
    return f"{value:.4g}"
