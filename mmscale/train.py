"""The main job as a loop: stages, steps, checkpoints, and at the end a score and a report.

    for each stage:  model -> engine -> (resume | warm start)
        for each step:  batch -> engine.train_step -> log -> save when due -> stop when asked
    evaluate -> captions -> result.json -> report.html

A run folder is all the memory there is: started again with the same configuration, the loop finds the newest whole
checkpoint and goes on from it, whatever ended the last attempt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path

from data_pipeline.batch import MultimodalBatch
from data_pipeline.errors import DataConfigError
from data_pipeline.loader import Loader, LoaderState, StepBatch
from data_pipeline.tokenizer import load_tokenizer
from mmscale import checkpoint
from mmscale.checkpoint import TrainState
from mmscale.config import Loaded
from mmscale.dist import World, init_distributed, shutdown, sum_float
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.engine.precision import choose_precision
from mmscale.engine.stop import StopRequest, listen_for_stop
from mmscale.errors import ConfigError
from mmscale.finish import finish, is_finished
from mmscale.metrics.config import MetricsConfig, due
from mmscale.metrics.datasets import figures, totals
from mmscale.metrics.efficiency import device_peak, flop_figures, ideal_seconds, span_figures, step_flops
from mmscale.metrics.faults import FaultList, fault_counts, fault_figures, known_lists
from mmscale.metrics.ledger import RunLedger
from mmscale.metrics.peaks import Peak
from mmscale.metrics.run_log import NullLog, RunLog, open_run_log
from mmscale.metrics.sample_images import CaptionedImage, batch_images
from mmscale.metrics.trace import Trace, open_trace
from mmscale.models.build import build_model
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.run_config import RunConfig, check_files, check_world
from mmscale.run_folder import CHECKPOINTS, FAULTS, LEDGER, open_run_folder

Log = RunLog | NullLog
Show = Callable[[MultimodalBatch, int], list[CaptionedImage]]


class Outcome(str, Enum):
    """How a call of ``train`` ended."""

    FINISHED = "finished"
    """Every step is done and the report is written."""
    STOPPED = "stopped"
    """Asked to stop; a checkpoint of the last step is saved. Run the same command again to go on."""


def train(loaded: Loaded[RunConfig], *, profile: bool = False) -> Outcome:
    """Trains, or goes on training, as the configuration says. All ranks must call.

    Args:
        loaded: The run.
        profile: Whether to record a trace of a few steps (``metrics.profile_steps``) into ``RUN/profile``.

    Raises:
        MMScaleError, DataPipelineError: see the trees; nothing half-written is left behind.
    """
    config = loaded.value
    # From the first moment: a signal during set-up must not end the process but stop the run after its next step.
    with listen_for_stop() as stop:
        check_files(config)
        world = init_distributed(config.engine)
        try:
            check_world(config, world.world_size)
            if is_finished(config):
                if profile:
                    raise ConfigError(
                        f"--profile: {config.run_dir} is finished; give it another run_dir, or more steps"
                    )
                return Outcome.FINISHED
            open_run_folder(loaded, world)
            return _run(config, world, stop, profile)
        finally:
            shutdown(world)


def _run(config: RunConfig, world: World, stop: StopRequest, profile: bool) -> Outcome:
    latest = checkpoint.find_latest(config.run_dir / CHECKPOINTS)
    state = checkpoint.read_state(latest) if latest else TrainState()
    ledger = RunLedger(config.run_dir / LEDGER, config.ledger, world, state.step)
    log = open_run_log(config.run_dir, config.metrics, state.step, config.total_steps, world.rank)
    tracing = open_trace(config.run_dir, config.metrics, world.rank, state.step, log.note, wanted=profile)
    with closing(log), tracing as trace:
        faults = FaultList(config.run_dir / FAULTS, world, state.step, log.note)
        if latest:
            log.note(f"going on from {latest} (step {state.step} of {config.total_steps})")
        while True:
            if state.stage_step == config.stages[state.stage_index].steps and state.step < config.total_steps:
                state = replace(state, stage_index=state.stage_index + 1, stage_step=0)
            with _stage_engine(config, state, latest, world, log) as engine:
                state, stopped = _train_stage(config, engine, state, log, ledger, faults, stop, trace)
                if stopped:
                    return Outcome.STOPPED
                latest = checkpoint.find_latest(config.run_dir / CHECKPOINTS)
                if state.step >= config.total_steps:
                    finish(config, engine, state, log)
                    return Outcome.FINISHED


@contextmanager
def _stage_engine(
    config: RunConfig, state: TrainState, latest: Path | None, world: World, log: Log
) -> Iterator[Engine]:
    """The engine of the state's stage: exactly as it was inside a stage, with weights only at its beginning."""
    stage = config.stages[state.stage_index]
    model = build(config, world)
    engine = Engine(model, NextToken(), stage, config.engine, world)
    try:
        if latest and state.stage_step:
            checkpoint.resume(engine, latest)
        elif latest and state.step:
            log.note(f"stage {stage.name}: {checkpoint.warm_start(engine, latest)}")
        if not state.step:
            log.note(f"precision {engine.precision.name}: {engine.precision.reason}")
        yield engine
    finally:
        engine.close()


def build(config: RunConfig, world: World) -> MultimodalModel:
    """The model with its first values, the same at every world size. All ranks must call."""
    precision = choose_precision(config.engine, world.device)
    return construct(
        functools.partial(
            build_model, config.model, attention=config.engine.attention, seed=None, dtype=precision.dtype
        ),
        config.engine,
        world,
        functools.partial(initialise_, seed=config.seed),
    )


def _train_stage(
    config: RunConfig,
    engine: Engine,
    state: TrainState,
    log: Log,
    ledger: RunLedger,
    faults: FaultList,
    stop: StopRequest,
    trace: Trace,
) -> tuple[TrainState, bool]:
    """Steps until the stage or the run ends, or somebody asks to stop.

    Returns:
        The state of the last step, and whether it was the last because of a request to stop. It is saved either way.
    """
    stage = config.stages[state.stage_index]
    last = min(state.step + stage.steps - state.stage_step, config.total_steps)
    stopped = False
    data = config.stage_data(state.stage_index)
    datasets = [dataset.name for dataset in data.datasets]
    decode = load_tokenizer(data.tokenizer).decode

    def show(microbatch: MultimodalBatch, limit: int) -> list[CaptionedImage]:
        return batch_images(microbatch, config.media_spec, decode, limit)

    peak = device_peak(engine, config.metrics.peak_flops)
    log.pause("setup")
    ledger.begin_stage(state.step, state.stage_index)
    with closing(_open_loader(config, engine.world, state)) as loader:
        batches = iter(loader)
        while state.step < last and not stopped:
            with log.waiting_for_data(), faults.noting_the_end(state.step + 1):
                batch = next(batches)
            faults.step(state.step + 1, batch.skipped)
            state = _step(engine, state, batch, stage.name, datasets, log, ledger, show, config.metrics, peak)
            trace.step()
            stopped = stop.should_stop(engine.world)
            if stopped or state.step == last or config.checkpoint.due(state.step):
                ledger.write()
                checkpoint.save(engine, state, config.run_dir / CHECKPOINTS, config.checkpoint)
                log.pause("checkpoint")
    if stopped:
        log.note(f"stopped at step {state.step} ({stop.reason}) and saved; the same command goes on from here")
    return state, stopped


def _step(
    engine: Engine,
    state: TrainState,
    batch: StepBatch,
    stage: str,
    datasets: Sequence[str],
    log: Log,
    ledger: RunLedger,
    show: Show,
    metrics: MetricsConfig,
    peak: Peak,
) -> TrainState:
    engine.clock.memory = due(metrics.memory_every, state.step + 1)
    report = engine.train_step(batch.microbatches, component_norms=due(metrics.grad_norms_every, state.step + 1))
    counts = [batch.num_tokens, batch.num_samples, batch.num_cut]
    left_out = fault_counts(batch.skipped)
    mine = [*counts, *step_flops(engine, batch.microbatches), *left_out]
    mine += totals(batch, report.document_losses, datasets)
    tokens, samples, cut, model_flops, hardware_flops, *rest = sum_float(engine.world, mine)
    flops = (model_flops, hardware_flops)
    by_kind, by_dataset = rest[: len(left_out)], rest[len(left_out) :]
    if not samples:
        raise DataConfigError(
            f"every data set gave all its epochs before step {state.step + 1} (data.datasets.*.max_epochs): "
            "plan fewer steps, or more epochs"
        )
    state = replace(
        state,
        step=state.step + 1,
        stage_step=state.stage_step + 1,
        tokens=state.tokens + int(tokens),
        samples=state.samples + int(samples),
        loader=batch.state,
    )
    ledger.step(batch, report.document_losses)
    log.step(
        state.step,
        report,
        num_tokens=int(tokens),
        num_samples=int(samples),
        stage=stage,
        ideal_seconds=ideal_seconds(flops, peak, engine.world),
        extra={
            "cut_documents": int(cut),
            **flop_figures(flops),
            **span_figures(report),
            **fault_figures(by_kind),
            **figures(datasets, by_dataset),
        },
    )
    log.images(state.step, functools.partial(show, batch.microbatches[0]))
    return state


def _open_loader(config: RunConfig, world: World, state: TrainState) -> Loader:
    """The stage's stream of batches: a new one where the stage has data of its own, else the running one."""
    data = config.stage_data(state.stage_index)
    fresh = state.stage_step == 0 and (state.stage_index == 0 or data != config.stage_data(state.stage_index - 1))
    position: LoaderState | None = None if fresh else state.loader
    return Loader(
        data,
        config.media_spec,
        seed=config.seed,
        rank=world.rank,
        world_size=world.world_size,
        micro_lanes=config.engine.micro_lanes,
        state=position,
        quarantine=known_lists(config.run_dir / FAULTS, data.faults),
    )
