"""The main job as a loop: stages, steps, checkpoints, and at the end a score and a report.

    for each stage:  model -> engine -> (resume | warm start)
        for each step:  batch -> engine.train_step -> log -> save when due -> stop when asked
    evaluate -> captions -> result.json -> report.html

A bad step may send the run back to an earlier checkpoint; then everything is opened again, as after a kill.

A run folder is all the memory there is: started again with the same configuration, the loop finds the newest whole
checkpoint and goes on from it, whatever ended the last attempt.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from data_pipeline.batch import MultimodalBatch
from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.media_spec import Placement
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale import checkpoint
from mmscale.checkpoint import TrainState
from mmscale.checkpoint.manifest import folder_name
from mmscale.config import Loaded
from mmscale.dist import World, all_reduce_sum_list, first_complaint, gather_rows, init_distributed, shutdown
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.engine.memory import explain_memory
from mmscale.engine.precision import choose_precision
from mmscale.engine.stop import StopRequest, listen_for_stop
from mmscale.engine.watchdog import Watchdog
from mmscale.errors import ConfigError
from mmscale.metrics.config import due
from mmscale.metrics.datasets import figures, totals
from mmscale.metrics.efficiency import device_peak, flop_figures, ideal_seconds, span_figures, step_flops
from mmscale.metrics.faults import FaultList, fault_counts, fault_figures, known_lists
from mmscale.metrics.ledger import RunLedger
from mmscale.metrics.peaks import Peak
from mmscale.metrics.run_log import NullLog, RunLog, open_run_log
from mmscale.metrics.sample_images import CaptionedImage, batch_images
from mmscale.metrics.trace import Trace, open_trace
from mmscale.metrics.unseen_images import UnseenImages
from mmscale.models.build import AnyModel, build_model
from mmscale.nn.dropout import step_key
from mmscale.nn.init import initialise_
from mmscale.objectives.choice import Objective, choose_objective
from mmscale.run.bad_steps import BadSteps, RolledBack
from mmscale.run.config import RunConfig, check_files, check_world
from mmscale.run.finish import finish
from mmscale.run.folder import CHECKPOINTS, FAULTS, LEDGER, check_position, hold_folder
from mmscale.run.rank_check import check_ranks
from mmscale.run.stage_teachers import check_teachers, note_teachers, open_teachers
from mmscale.run.stage_weights import check_stage_weights, take_stage_weights
from mmscale.run.starts import Start, refuse_or_report_finished

Log = RunLog | NullLog
Show = Callable[[MultimodalBatch, int], list[CaptionedImage]]


class Outcome(str, Enum):
    """How a call of ``train`` ended."""

    FINISHED = "finished"
    """Every step is done and the report is written."""
    STOPPED = "stopped"
    """Asked to stop; a checkpoint of the last step is saved. Run the same command again to go on."""


@dataclass(frozen=True)
class _Run:
    """What every step talks to, from one start (or roll back) to the end."""

    config: RunConfig
    world: World
    log: Log
    ledger: RunLedger
    faults: FaultList
    bad_steps: BadSteps
    saver: checkpoint.Saver
    stop: StopRequest
    watchdog: Watchdog
    trace: Trace


@dataclass(frozen=True)
class _Stage:
    """What is the same for all steps of a stage."""

    name: str
    engine: Engine
    datasets: Sequence[str]
    show: Show
    peak: Peak
    unseen_images: UnseenImages


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
        notes = check_files(config)
        world = init_distributed(config.engine)
        limits = config.engine.watchdog.limits(config.engine.timeout_seconds)
        watchdog = Watchdog(config.run_dir, limits, world.rank, world.world_size)
        try:
            check_ranks(config, world)
            check_world(config, world.world_size)
            for line in notes if world.is_main else ():
                print(f"mmscale: warning: {line}", file=sys.stderr, flush=True)
            if refuse_or_report_finished(config, world):
                if profile:
                    raise ConfigError(
                        f"--profile: {config.run_dir} is finished; give it another run_dir, or more steps"
                    )
                return Outcome.FINISHED
            with hold_folder(config.run_dir, world), closing(watchdog):
                watchdog.start()
                start = Start(loaded, world)
                while True:
                    try:
                        return _run(start, world, stop, watchdog, profile)
                    except RolledBack as request:
                        if world.is_main:
                            print(request, file=sys.stderr, flush=True)
                    except (MemoryError, RuntimeError, OSError) as error:
                        max_tokens = max(config.stage_data(n).packing.max_tokens for n in range(len(config.stages)))
                        explained = explain_memory(error, config.engine, world, max_tokens, *watchdog.moment)
                        if explained is not None:
                            raise explained from None
                        raise
        finally:
            shutdown(world)


def _run(start: Start, world: World, stop: StopRequest, watchdog: Watchdog, profile: bool) -> Outcome:
    config = start.config
    bad_steps = BadSteps(config, world)
    latest, state = bad_steps.checkpoint, bad_steps.state
    if latest:
        check_position(config, state, latest)
    check_stage_weights(config, world, state)
    check_teachers(config, world, state)
    ledger = RunLedger(config.run_dir / LEDGER, config.ledger, world, state.step)
    log = open_run_log(config.run_dir, config.metrics, state.step, config.total_steps, world.rank)
    saver = checkpoint.Saver(world, config.run_dir / CHECKPOINTS, config.checkpoint, log.note)
    tracing = open_trace(config.run_dir, config.metrics, world.rank, state.step, log.note, wanted=profile)
    with closing(log), closing(saver), tracing as trace:
        faults = FaultList(config.run_dir / FAULTS, world, state.step, log.note)
        run = _Run(config, world, log, ledger, faults, bad_steps, saver, stop, watchdog, trace)
        if latest:
            log.note(f"going on from {latest} (step {state.step} of {config.total_steps})")
        if start.note:
            log.note(start.note)
        while True:
            if state.stage_step == config.stages[state.stage_index].steps and state.step < config.total_steps:
                state = replace(state, stage_index=state.stage_index + 1, stage_step=0)
            watchdog.begin_start()
            state = note_teachers(config, world, state)
            # The data position is checked before the engine takes the time and memory of the model.
            loader = _open_loader(run, state)
            with _stage_engine(run, state, latest) as engine:
                stage = _open_stage(run, engine, state)
                start.record(state.step)
                state, stopped = _train_stage(run, stage, loader, state)
                if stopped:
                    return Outcome.STOPPED
                latest = config.run_dir / CHECKPOINTS / folder_name(state.step)  # Saved just now, or resumed from.
                if state.step >= config.total_steps:
                    with watchdog.during("evaluation"):
                        finish(config, engine, state, log)
                    return Outcome.FINISHED


@contextmanager
def _stage_engine(run: _Run, state: TrainState, latest: Path | None) -> Iterator[Engine]:
    """The engine of the state's stage: exactly as it was inside a stage, with weights only at its beginning."""
    stage = run.config.stages[state.stage_index]
    model = build(run.config, run.world, state.stage_index)
    engine = Engine(model, _objective(run, state), stage, run.config.engine, run.world)
    engine.clock.on_phase = run.watchdog.enter
    try:
        if latest and state.stage_step:
            checkpoint.resume(engine, latest, verified=True)
        else:
            _begin_stage(run, engine, latest)
        if not state.step:
            run.log.note(f"precision {engine.precision.name}: {engine.precision.reason}")
        yield engine
    finally:
        engine.close()


def _objective(run: _Run, state: TrainState) -> Objective:
    """What the model of a stage is trained by."""
    model, stage = run.config.stage_model(state.stage_index), run.config.stages[state.stage_index]
    teachers = open_teachers(run.config, run.world, state) if model.predicts_tokens else ()
    return choose_objective(model, stage, run.world, functools.partial(gather_rows, run.world), teachers)


def _begin_stage(run: _Run, engine: Engine, latest: Path | None) -> None:
    """Hands on the weights of the stage before, if there is one, and takes what the stage wants from elsewhere."""
    name = engine.stage.name
    if latest:
        run.log.note(f"stage {name}, weights of the stage before: {checkpoint.warm_start(engine, latest)}")
    for source in engine.stage.weights:
        path, report = take_stage_weights(engine, source)
        run.log.note(f"stage {name}, weights of {path}: {report}")


def build(config: RunConfig, world: World, stage: int) -> AnyModel:
    """The model of a stage with its first values, the same at every world size. All ranks must call."""
    precision = choose_precision(config.engine, world.device)
    model = config.stage_model(stage)
    return construct(
        functools.partial(build_model, model, attention=config.engine.attention, seed=None, dtype=precision.dtype),
        config.engine,
        world,
        functools.partial(initialise_, seed=config.seed),
    )


def _train_stage(run: _Run, stage: _Stage, loader: Loader, state: TrainState) -> tuple[TrainState, bool]:
    """Steps until the stage or the run ends, or somebody asks to stop. Closes the loader.

    Returns:
        The state of the last step, and whether it was the last because of a request to stop. It is saved either way.
    """
    config, log = run.config, run.log
    steps = config.stages[state.stage_index].steps
    last = min(state.step + steps - state.stage_step, config.total_steps)
    stopped = False
    log.pause("setup")
    run.ledger.begin_stage(state.step, state.stage_index)
    with loader:
        batches = iter(loader)
        while state.step < last and not stopped:
            run.watchdog.begin_step(state.step + 1)
            with log.waiting_for_data(), run.faults.noting_the_end(state.step + 1):
                batch = next(batches)
            run.faults.step(state.step + 1, batch.skipped)
            state = _step(run, stage, state, batch)
            run.trace.step()
            run.saver.poll()
            stopped = run.stop.should_stop(run.world)
            if stopped or state.step == last or config.checkpoint.due(state.step):
                with run.watchdog.during("checkpoint"):
                    run.ledger.write()
                    run.saver.save(stage.engine, state, last=stopped or state.step == last)
                log.pause("checkpoint")
    if stopped:
        log.note(f"stopped at step {state.step} ({run.stop.reason}) and saved; the same command goes on from here")
    return state, stopped


def _open_stage(run: _Run, engine: Engine, state: TrainState) -> _Stage:
    data, spec = run.config.stage_data(state.stage_index), run.config.stage_media(state.stage_index)
    decode = load_tokenizer(data.tokenizer).decode

    def show(microbatch: MultimodalBatch, limit: int) -> list[CaptionedImage]:
        return batch_images(microbatch, spec, decode, limit)

    names = [dataset.name for dataset in data.datasets]
    peak = device_peak(engine, run.config.metrics.peak_flops)
    unseen = UnseenImages(engine.stage.name, spec.placement is not Placement.NONE, run.log.note)
    return _Stage(engine.stage.name, engine, names, show, peak, unseen)


def _step(run: _Run, stage: _Stage, state: TrainState, batch: StepBatch) -> TrainState:
    """One step; the state after it."""
    engine, metrics = stage.engine, run.config.metrics
    engine.clock.memory = due(metrics.memory_every, state.step + 1)
    dropout_key = step_key(run.config.seed, state.step)
    report = engine.train_step(
        [replace(microbatch, dropout_key=dropout_key) for microbatch in batch.microbatches],
        run.bad_steps.why_refuse,
        component_norms=due(metrics.grad_norms_every, state.step + 1),
    )
    learned = sum(int(microbatch.loss_weights.count_nonzero()) for microbatch in batch.microbatches)
    num_images = sum(microbatch.num_images for microbatch in batch.microbatches)
    counts = [batch.num_tokens, batch.num_samples, batch.num_cut, learned, num_images]
    left_out = fault_counts(batch.skipped)
    mine = [*counts, *step_flops(engine, batch.microbatches), *left_out]
    mine += totals(batch, report.document_losses, stage.datasets)
    tokens, samples, cut, learned_tokens, images, model_flops, hardware_flops, *rest = all_reduce_sum_list(
        run.world, mine
    )
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
    state = run.bad_steps.take(state, report)
    run.ledger.step(batch, report.document_losses)
    run.log.step(
        state.step,
        report,
        num_tokens=int(tokens),
        num_samples=int(samples),
        stage=stage.name,
        ideal_seconds=ideal_seconds(flops, stage.peak, run.world),
        extra={
            "cut_documents": int(cut),
            "learned_tokens": int(learned_tokens),
            "images": int(images),
            **flop_figures(flops),
            **span_figures(report),
            **fault_figures(by_kind),
            **figures(stage.datasets, by_dataset),
            **run.bad_steps.figures(),
        },
    )
    stage.unseen_images.step(int(images))
    if (complaint := run.bad_steps.act(state, batch, report)) is not None:
        run.log.note(complaint)
    run.log.images(state.step, functools.partial(stage.show, batch.microbatches[0]))
    return state


def _open_loader(run: _Run, state: TrainState) -> Loader:
    """The stage's stream of batches: a new one where the stage has data or images of its own, else the running one.

    After a roll back it begins behind the data that the roll back leaves out. All ranks must call.

    Raises:
        DataPipelineError: the data cannot be opened, or the saved position does not fit them; every rank raises.
    """
    config, world = run.config, run.world
    data = config.stage_data(state.stage_index)
    fresh = state.stage_step == 0 and not config.continues(state.stage_index)
    position = run.bad_steps.begin_stage(state) or (None if fresh else state.loader)
    mine: DataPipelineError | None = None
    try:
        loader = Loader(
            data,
            config.stage_media(state.stage_index),
            seed=config.seed,
            rank=world.rank,
            world_size=world.world_size,
            micro_lanes=config.engine.micro_lanes,
            state=position,
            quarantine=known_lists(config.run_dir / FAULTS, data.faults),
        )
    except DataPipelineError as error:
        mine = error
    if (complaint := first_complaint(world, None if mine is None else str(mine))) is not None:
        raise mine or DataPipelineError(complaint)
    return loader
