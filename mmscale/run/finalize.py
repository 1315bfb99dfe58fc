"""The end of a run: held-out scores, captions, ``result.json`` and the report.

``result.json`` marks a run as finished; only the report is written after it. A run that is killed earlier repeats all
of this from its last checkpoint.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmscale.checkpoint import TrainState
from mmscale.checkpoint.manifest import folder_name
from mmscale.dist import World, gather_numbers
from mmscale.engine.engine import Engine
from mmscale.engine.step_clock import peak_memory
from mmscale.evaluate.result import (
    BestRecord,
    EarlyStop,
    Efficiency,
    HeldOutResult,
    Memory,
    Params,
    RunResult,
    curve_values,
    write_result,
)
from mmscale.metrics.goodput import read_goodput
from mmscale.metrics.metrics_file import read_metrics
from mmscale.metrics.peaks import peak_of
from mmscale.metrics.run_log import NullLog, RunLog
from mmscale.models.build import count_parameters
from mmscale.report.build import build_report
from mmscale.run.config import RunConfig
from mmscale.run.evaluation import Evaluations, score_at_end
from mmscale.run.folder import CHECKPOINTS
from mmscale.run.step_samples import write_spike_pages


def finalize_run(
    config: RunConfig, engine: Engine, state: TrainState, log: RunLog | NullLog, evaluations: Evaluations
) -> None:
    """Score the model, then write ``result.json`` and the report. All ranks must call."""
    world = engine.world
    reason, best = evaluations.end_reason(state), evaluations.best
    if reason is not None:
        log.print_line(f"the run ends at step {state.step} of {config.total_steps}: {reason}")
    heldout = score_at_end(config, engine, state, log, evaluations)
    log_results(log, state.step, heldout)
    ranks_memory = _gather_memory(world)
    if not world.is_main:
        return
    count = count_parameters(config.stage_model(state.stage_index))
    records = read_metrics(config.run_dir / "metrics.jsonl")
    result = RunResult(
        world_size=world.world_size,
        zero_stage=engine.config.zero_stage,
        precision=engine.precision.name,
        precision_reason=engine.precision.reason,
        steps=state.step,
        train_seconds=sum(record["seconds"] for record in records),
        params=Params(count.total, count.active, count.components),
        heldout=heldout,
        tokens=state.tokens,
        samples=state.samples,
        memory=ranks_memory,
        machine=_machine(world),
        efficiency=_efficiency(config, engine, records),
        goodput=goodput.to_json() if (goodput := read_goodput(config.run_dir)) else None,
        best=BestRecord(best.metric, best.value, best.step, f"{CHECKPOINTS}/{folder_name(best.step)}")
        if best
        else None,
        early_stop=EarlyStop(reason, best.without) if best and reason is not None else None,
    )
    write_result(config.run_dir, result)
    write_spike_pages(config.run_dir, log.print_line)
    log.print_line(f"wrote {build_report(config.run_dir, log.print_line)}")


_COLUMNS = ("score", "control", "chance", "error", "loss", "perplexity", "bits_per_byte", "frechet", "near_copies", "n")


def log_results(log: RunLog | NullLog, step: int, results: Mapping[str, HeldOutResult]) -> None:
    """Send the scores of a finished run to TensorBoard and the trackers: scalars ``final/SET/VALUE``, and a table."""
    if not results:
        return
    values = {name.replace("heldout/", "final/", 1): value for name, value in curve_values(results).items()}
    log.scalars(step, "final", values)
    rows = [
        (name, result.metric, *(getattr(result, column, None) for column in _COLUMNS))
        for name, result in results.items()
    ]
    log.table(step, "heldout_results", ("set", "metric", *_COLUMNS), rows)


def _efficiency(config: RunConfig, engine: Engine, records: Sequence[Mapping[str, Any]]) -> Efficiency:
    """Return the MFU over the steps in ``metrics.jsonl``, weighted by seconds, and the sum of their operations."""
    peak = peak_of(engine.world.device, engine.precision.dtype, config.metrics.peak_flops)
    known = [record for record in records if record.get("mfu") is not None]
    seconds = sum(record["seconds"] for record in known)
    mfu = sum(record["mfu"] * record["seconds"] for record in known) / seconds if seconds else None
    return Efficiency(mfu, peak.flops, peak.source, sum(record.get("model_flops", 0) for record in records))


def _gather_memory(world: World) -> Memory:
    own = peak_memory()
    rss, device = gather_numbers(world, own.rss_bytes), gather_numbers(world, own.device_bytes or 0)
    on_device = tuple(int(value) for value in device) if world.device.type == "cuda" else None
    return Memory(tuple(int(value) for value in rss), on_device)


def _machine(world: World) -> str:
    if world.device.type == "cuda":
        import torch

        return f"{world.world_size} x {torch.cuda.get_device_name(world.device)}"
    return f"{_cpu_name()}, {world.world_size} rank{'s' if world.world_size > 1 else ''}"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
