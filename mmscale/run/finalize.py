"""The end of a run: held-out scores, captions, ``result.json`` and the report.

``result.json`` marks a run as finished; only the report is written after it. A run that is killed earlier repeats all
of this from its last checkpoint.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from data_pipeline.media_spec import Placement
from mmscale.checkpoint import TrainState
from mmscale.dist import World, gather_numbers
from mmscale.engine.engine import Engine
from mmscale.engine.step_clock import peak_memory
from mmscale.evaluate import evaluate, unanswerable_sets
from mmscale.evaluate.answers import caption_images
from mmscale.evaluate.result import Efficiency, HeldOutResult, Memory, Params, RunResult, write_result
from mmscale.metrics.goodput import read_goodput
from mmscale.metrics.metrics_file import read_metrics
from mmscale.metrics.peaks import peak_of
from mmscale.metrics.run_log import NullLog, RunLog
from mmscale.models.build import AnyModel, count_parameters
from mmscale.report.build import build_report
from mmscale.report.captions import save_captions
from mmscale.run.config import RunConfig


def finalize_run(config: RunConfig, engine: Engine, state: TrainState, log: RunLog | NullLog) -> None:
    """Score the model, then write ``result.json`` and the report. All ranks must call."""
    world = engine.world
    heldout = score(config, engine, state.stage_index, log)
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
    )
    write_result(config.run_dir, result)
    log.print_line(f"wrote {build_report(config.run_dir, log.print_line)}")


def _efficiency(config: RunConfig, engine: Engine, records: Sequence[Mapping[str, Any]]) -> Efficiency:
    """Return the MFU over the steps in ``metrics.jsonl``, weighted by seconds, and the sum of their operations."""
    peak = peak_of(engine.world.device, engine.precision.dtype, config.metrics.peak_flops)
    known = [record for record in records if record.get("mfu") is not None]
    seconds = sum(record["seconds"] for record in known)
    mfu = sum(record["mfu"] * record["seconds"] for record in known) / seconds if seconds else None
    return Efficiency(mfu, peak.flops, peak.source, sum(record.get("model_flops", 0) for record in records))


def score(config: RunConfig, engine: Engine, stage: int, log: RunLog | NullLog) -> dict[str, HeldOutResult]:
    """Score the held-out sets with the engine's model and caption some of their images. All ranks must call.

    If the stage keeps an average of its weights, the average is scored. ``stage`` is the index of the model's stage.
    """
    data, spec = config.evaluation_data(stage), config.stage_media(stage)
    log.pause()
    evaluation = config.evaluation
    if left_out := unanswerable_sets(evaluation, spec):
        what = "takes no images" if spec.placement is Placement.NONE else "only compares images with texts"
        names = ", ".join(held.name for held in left_out)
        log.print_line(f"not scored: {names}; the model of stage {engine.stage.name} {what}")
        evaluation = evaluation.model_copy(
            update={"sets": tuple(one for one in evaluation.sets if one not in left_out)}
        )
    if evaluation.image_sets and evaluation.captions is not None and spec.placement is Placement.PAIR:
        log.print_line(f"no captions: the model of stage {engine.stage.name} writes no text")
    with engine.inference(ema=engine.stage.ema is not None) as model:
        results = evaluate(cast(AnyModel, model), evaluation, data, spec, engine.world)
        for name, result in results.items():
            log.print_line(f"held-out {name}: {result.summary}")
        captioned = caption_images(model, evaluation, data, spec, engine.world)
    if engine.world.is_main and captioned:
        save_captions(config.run_dir, captioned)
    log.pause("evaluation")
    return results


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
