"""The main job as a loop: stages, steps, checkpoints, and at the end a score and a report.

    choose the newest usable checkpoint
    for each stage:  model -> engine -> (resume | warm start)
        for each step:  batch -> engine.train_step -> log -> rejected? -> score and save when due -> stop if requested
    evaluate -> captions -> result.json -> report.html

The update of a bad step is rejected. Depending on ``bad_steps.policy``, the run then continues with the next step,
ends, or rolls back to an earlier checkpoint. After a roll back the loop opens everything again, as after a kill.

The run folder holds all state of a run. A restart with the same configuration resumes from the newest whole checkpoint,
whatever ended the previous process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from torch import profiler

from data_pipeline.errors import DataConfigError, TooManyFaultsError
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.media_spec import Placement
from mmscale import checkpoint
from mmscale.bad_steps.bad_steps import BadSteps
from mmscale.bad_steps.detector import BadStep, Policy
from mmscale.bad_steps.roll_back import is_abandoned, read_roll_backs
from mmscale.checkpoint import TrainState
from mmscale.checkpoint.manifest import folder_name
from mmscale.config import Loaded
from mmscale.dist import World, all_reduce_sum, init_distributed, shutdown
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine, StepReport
from mmscale.engine.memory import MemoryUse, explain_memory
from mmscale.engine.precision import choose_precision
from mmscale.engine.stop import StopRequest, listen_for_stop
from mmscale.engine.watchdog import Watchdog
from mmscale.errors import ConfigError, EngineError
from mmscale.metrics.faults import FaultList
from mmscale.metrics.peaks import peak_of
from mmscale.metrics.profiler import profile_steps
from mmscale.metrics.router_log import RouterLog
from mmscale.metrics.run_log import LoggedStage, NullLog, RunLog, open_run_log
from mmscale.metrics.sample_log import RunSampleLog
from mmscale.metrics.step_counts import count_step, document_stats, step_flops
from mmscale.metrics.trackers.trackers import Trackers
from mmscale.models.build import TrainedModel, build_unset, count_parameters
from mmscale.nn.init import initialise_
from mmscale.objectives.choice import Objective, choose_objective
from mmscale.run.before_start import check_before_start, check_resume, current_stage, open_loader
from mmscale.run.config import RunConfig, check_world
from mmscale.run.evaluation import Evaluations
from mmscale.run.finalize import finalize_run
from mmscale.run.folder import BAD_STEPS, CHECKPOINTS, FAULTS, SAMPLE_LOG, hold_folder
from mmscale.run.outcome import RunOutcome, recorded_outcome
from mmscale.run.rank_check import check_ranks
from mmscale.run.stage_teachers import open_teachers, record_teachers
from mmscale.run.stage_weights import load_stage_weights
from mmscale.run.starts import Start, reject_or_report_finished
from mmscale.run.step_images import StepImages
from mmscale.run.tracking import open_trackers, run_facts

Log = RunLog | NullLog


class Outcome(str, Enum):
    """How a call of ``train`` ended."""

    FINISHED = "finished"
    """Every step is done and the report is written."""
    STOPPED = "stopped"
    """A stop was requested and a checkpoint of the last step is saved. The same command resumes the run."""


class _StageEnd(Enum):
    """How the steps of a stage ended."""

    DONE = "done"
    """Every step of the stage, or of the run, is done and saved."""
    STOPPED = "stopped"
    """A signal or the end of the SLURM job requested a stop; the last step is saved."""
    ROLLED_BACK = "rolled back"
    """An update was rejected, and the run must restart from an earlier checkpoint."""


@dataclass(frozen=True)
class _Run:
    """The objects that every step uses, from a start or a roll back until the next roll back or the end."""

    config: RunConfig
    world: World
    log: Log
    sample_log: RunSampleLog
    router_log: RouterLog
    faults: FaultList
    bad_steps: BadSteps
    evaluations: Evaluations
    saver: checkpoint.Saver
    stop: StopRequest
    watchdog: Watchdog
    profiler: profiler.profile | None


def train(loaded: Loaded[RunConfig], *, profile: bool = False) -> Outcome:
    """Train a run, or resume it if its folder has a checkpoint. All ranks must call.

    Args:
        loaded: The configuration, and the origin of each value.
        profile: Whether to record a trace of a few steps (``metrics.profile_steps``) into ``RUN/profile``.

    Raises:
        MMScaleError, DataPipelineError: see ``mmscale.errors`` and ``data_pipeline.errors``.
    """
    config = loaded.value
    # Handle signals before set-up: a signal during set-up must stop the run after its next step, not kill the process.
    with listen_for_stop() as stop:
        notes = check_before_start(loaded)
        world = init_distributed(config.engine)
        limits = config.engine.watchdog.limits(config.engine.timeout_seconds)
        watchdog = Watchdog(config.run_dir, limits, world.rank, world.world_size)
        try:
            check_ranks(config, world)
            check_world(config, world.world_size)
            for line in notes if world.is_main else ():
                print(f"mmscale: warning: {line}", file=sys.stderr, flush=True)
            if reject_or_report_finished(config, world):
                if profile:
                    raise ConfigError(
                        f"--profile: the run in {config.run_dir} is finished; set another run_dir, or more steps"
                    )
                return Outcome.FINISHED
            with (
                hold_folder(config.run_dir, world),
                recorded_outcome(config.run_dir, world.is_main) as outcomes,
                closing(watchdog),
                open_trackers(config, world) as trackers,
            ):
                watchdog.start()
                start = Start(loaded, world)
                while True:  # Restart after each roll back.
                    try:
                        if (outcome := _run(start, world, stop, watchdog, trackers, profile)) is not None:
                            trackers.close(finished=outcome is Outcome.FINISHED)
                            outcomes.append(RunOutcome(outcome=outcome.value, message=stop.reason or ""))
                            return outcome
                    except (MemoryError, RuntimeError, OSError) as error:
                        phase = watchdog.current_phase
                        explained = explain_memory(error, config.engine, world, _memory_use(config), *phase)
                        if explained is not None:
                            raise explained from None
                        raise
        finally:
            shutdown(world)


def _memory_use(config: RunConfig) -> MemoryUse:
    """Return the largest sizes over all stages."""
    numbers = range(len(config.stages))
    data = [config.stage_data(number) for number in numbers]
    return MemoryUse(
        max_tokens=max(each.packing.max_tokens for each in data),
        lanes=min(each.lanes for each in data),
        parameters=max(count_parameters(config.stage_model(number)).total for number in numbers),
        tokens_per_forward=config.evaluation.tokens_per_forward,
    )


def _run(
    start: Start, world: World, stop: StopRequest, watchdog: Watchdog, trackers: Trackers, profile: bool
) -> Outcome | None:
    """Train from the newest usable checkpoint to the end. Return None after a roll back: the caller must call again."""
    config = start.config
    folder, checkpoints = config.run_dir / BAD_STEPS, config.run_dir / CHECKPOINTS
    roll_backs = read_roll_backs(folder)
    latest = checkpoint.choose(
        world,
        checkpoints,
        config.checkpoint,
        note=lambda text: print(text, file=sys.stderr) if world.is_main else None,
        passes=lambda path: not is_abandoned(path, roll_backs),
    )
    bad_steps = BadSteps(config.bad_steps, folder, checkpoints, world, roll_backs, latest)
    state, position = bad_steps.state, bad_steps.position
    check_resume(config, world, state, latest)
    sample_log = RunSampleLog(config.run_dir / SAMPLE_LOG, config.sample_log, world, state.step)
    router_log = RouterLog(config.run_dir, config.metrics.router_every, world, state.step, state.extra)
    log = open_run_log(config.run_dir, config.metrics, state.step, config.total_steps, world.rank, trackers)
    saver = checkpoint.Saver(world, checkpoints, config.checkpoint, log.print_line)
    profiling = profile_steps(config.run_dir, config.metrics, world.rank, state.step, log.print_line, enabled=profile)
    with closing(log), closing(saver), profiling as recorded:
        faults = FaultList(config.run_dir / FAULTS, world, state.step, log.print_line)
        evaluations = Evaluations(config, world, log, state, checkpoints)
        logs = (log, sample_log, router_log, faults)
        run = _Run(config, world, *logs, bad_steps, evaluations, saver, stop, watchdog, recorded)
        if latest:
            log.print_line(f"resuming from {latest} (step {state.step} of {config.total_steps})")
        if start.message:
            log.print_line(start.message)
        while True:
            state = current_stage(config, state)
            watchdog.begin_start()
            state = record_teachers(config, world, state)
            if state.stage_step == 0:
                bad_steps.detector.begin_stage()
            # Open the loader before the engine: an unusable data position then raises before the model is built.
            loader = open_loader(config, world, state, position)
            position = None
            with _stage_engine(run, state, latest) as engine:
                start.record(state.step)
                if trackers:
                    trackers.start(run_facts(config), log.print_line)
                state, end = _train_stage(run, engine, loader, state)
                if end is _StageEnd.ROLLED_BACK:
                    return None
                if end is _StageEnd.STOPPED:
                    return Outcome.STOPPED
                latest = checkpoints / folder_name(state.step)  # Just saved, or the checkpoint of this start.
                if state.step >= config.total_steps or evaluations.end_reason(state) is not None:
                    with watchdog.during("evaluation"):
                        finalize_run(config, engine, state, log, evaluations)
                    return Outcome.FINISHED


@contextmanager
def _stage_engine(run: _Run, state: TrainState, latest: Path | None) -> Iterator[Engine]:
    """Open the engine of the state's stage.

    Inside a stage the engine resumes weights, optimizer and random state. At the beginning of a stage it loads weights
    only.
    """
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
            run.log.print_line(f"precision {engine.precision.name}: {engine.precision.reason}")
        yield engine
    finally:
        engine.close()


def _objective(run: _Run, state: TrainState) -> Objective:
    """Return the loss of the state's stage."""
    model, stage = run.config.stage_model(state.stage_index), run.config.stages[state.stage_index]
    return choose_objective(model, stage, run.world, open_teachers(run.config, run.world, state))


def _begin_stage(run: _Run, engine: Engine, latest: Path | None) -> None:
    """Load the weights of the previous stage, if any, then the weights that ``stages.*.weights`` names."""
    name = engine.stage.name
    if latest:
        report = checkpoint.warm_start(engine, latest, upcycle=engine.stage.upcycles_previous)
        run.log.print_line(f"stage {name}, weights of the previous stage: {report}")
    for source in engine.stage.weights:
        path, report = load_stage_weights(engine, source)
        run.log.print_line(f"stage {name}, weights of {path}: {report}")


def build(config: RunConfig, world: World, stage: int) -> TrainedModel:
    """Build the model of a stage with initial values that do not depend on the world size. All ranks must call."""
    precision = choose_precision(config.engine, world.device)
    model = config.stage_model(stage)
    return construct(
        functools.partial(build_unset, model, attention=config.engine.attention, dtype=precision.dtype),
        config.engine,
        world,
        functools.partial(initialise_, seed=config.seed),
    )


def _train_stage(run: _Run, engine: Engine, loader: Loader, state: TrainState) -> tuple[TrainState, _StageEnd]:
    """Run steps until the stage or the run ends, a stop is requested, or a bad step triggers a roll back.

    Close the loader. Return the state after the last step, which is saved except after a roll back.
    """
    config, world, log, detector = run.config, run.world, run.log, run.bad_steps.detector
    last = min(state.step + config.stages[state.stage_index].steps - state.stage_step, config.total_steps)
    stage = _logged_stage(config, engine, state.stage_index)
    images = StepImages(config, world, log, state.stage_index)
    log.begin_stage(stage)
    log.pause("setup")
    run.sample_log.begin_stage(state.step, state.stage_index)
    if run.evaluations.is_due(state):  # A stop request came before the evaluation of the last step.
        _evaluate(run, engine, state)
    stopped, ended = False, run.evaluations.end_reason(state) is not None
    with loader:
        batches = iter(loader)
        while state.step < last and not stopped and not ended:
            step = state.step + 1
            run.watchdog.begin_step(step)
            batch = _next_batch(run, batches, step)
            engine.clock.memory = due(config.metrics.memory_every, step)
            report = engine.train_step(
                [replace(microbatch, dropout_key=(config.seed, state.step)) for microbatch in batch.microbatches],
                rejection_reason=detector.reason,
                component_norms=due(config.metrics.grad_norms_every, step),
            )
            run.watchdog.end_step(report.spans.own_seconds)
            documents = document_stats(batch, report.document_losses)
            counts = count_step(batch, documents, stage.datasets)
            sums = all_reduce_sum(world, step_flops(engine, batch.microbatches) | counts)
            if not sums["samples"]:
                raise DataConfigError(
                    f"every data set gave all its epochs before step {step} (data.datasets.*.max_epochs): "
                    "set fewer steps, or more epochs"
                )
            bad = None
            # Ignore a step without loss weight, and one whose fp16 gradient overflowed: neither is a sign of bad data.
            if report.weight and not report.overflow:
                bad = detector.record(report.loss, report.grad_norm, report.applied)
            state = replace(
                state,
                step=step,
                stage_step=state.stage_step + 1,
                tokens=state.tokens + int(sums["tokens"]),
                samples=state.samples + int(sums["samples"]),
                loader=batch.state,
            )
            run.sample_log.step(batch, documents)
            counters: dict[str, float] = {"bad_steps": detector.num_bad, "roll_backs": run.bad_steps.num_roll_backs}
            counters |= run.router_log.step(step, report.router, engine.model)
            log.step(step, report, sums, counters, hold=run.evaluations.is_due(state))
            if bad is not None and _handle_bad_step(run, state, batch, report, bad):
                return state, _StageEnd.ROLLED_BACK
            images.show(engine, step, batch.microbatches[0])
            if run.profiler is not None:
                run.profiler.step()
            if run.saver.in_flight is not None:
                run.saver.poll()
            stopped, is_best = run.stop.should_stop(world), False
            # Stop at once, except at the end of a stage: the next start scores the step, but with the next engine.
            if run.evaluations.is_due(state) and (not stopped or step == last):
                is_best = _evaluate(run, engine, state)
                stopped = stopped or run.stop.should_stop(world)
                ended = run.evaluations.end_reason(state) is not None
            at_end = stopped or ended or step == last
            if at_end or is_best or due(config.checkpoint.every_steps, step):
                extra = run.bad_steps.extra_state() | run.evaluations.extra_state() | run.router_log.extra_state()
                state = replace(state, extra=state.extra | extra)
                with run.watchdog.during("checkpoint"):
                    run.sample_log.write()
                    run.router_log.write()
                    run.saver.save(engine, state, last=at_end, required=is_best)
                log.pause("checkpoint")
    if stopped:
        log.print_line(
            f"stopped at step {state.step} ({run.stop.reason}) and saved; the same command resumes from here"
        )
    return state, _StageEnd.STOPPED if stopped else _StageEnd.DONE


def _evaluate(run: _Run, engine: Engine, state: TrainState) -> bool:
    """Score the held-out sets. Return whether the step is the best so far. All ranks must call."""
    with run.watchdog.during("evaluation"):
        return run.evaluations.run(engine, state)


def _logged_stage(config: RunConfig, engine: Engine, index: int) -> LoggedStage:
    peak = peak_of(engine.world.device, engine.precision.dtype, config.metrics.peak_flops).flops
    return LoggedStage(
        name=engine.stage.name,
        datasets=[dataset.name for dataset in config.stage_data(index).datasets],
        peak_flops=engine.world.world_size * peak if peak else None,
        expects_images=config.stage_media(index).placement is not Placement.NONE,
    )


def due(every: int | None, step: int) -> bool:
    """Return whether ``step``, counted from 1, is a multiple of ``every``; False if ``every`` is None."""
    return every is not None and step % every == 0


def _next_batch(run: _Run, batches: Iterator[StepBatch], step: int) -> StepBatch:
    """Return the batch of a step. Record its skipped samples, also if the fault policy ends the run."""
    with run.log.waiting_for_data():
        try:
            batch = next(batches)
        except TooManyFaultsError as error:
            run.faults.record(step, error.skipped)
            raise
    run.watchdog.end_data()
    if batch.skipped:
        run.faults.record(step, batch.skipped)
    return batch


def _handle_bad_step(run: _Run, state: TrainState, batch: StepBatch, report: StepReport, bad: BadStep) -> bool:
    """Write the samples of a bad step, then apply ``bad_steps.policy``. Return whether the run must roll back.

    All ranks must call. ``state`` is the state after the step.

    Raises:
        EngineError: the policy is ``halt``, or there were too many bad steps or roll backs in a row.
        CheckpointError: a file cannot be written, or there is no checkpoint to roll back to.
    """
    config = run.config.bad_steps
    path = run.bad_steps.write_samples(state.step, bad, batch, report)
    what = f"step {state.step}: {bad.reason}; its samples are in {path}"
    if config.policy is Policy.ROLL_BACK:
        before = replace(state, step=state.step - 1, stage_step=state.stage_step - 1)
        entry = run.bad_steps.add_roll_back(before, batch.state, bad.reason, what)
        if entry is not None:
            run.log.print_line(
                f"{what}; going back to step {entry.to_step}, then continuing with the data after step {entry.at_step}"
            )
        return True
    if config.policy is Policy.HALT:
        raise EngineError(
            f"{what}. The update was not applied (bad_steps.policy=halt). To resume from the last checkpoint, exclude "
            "the samples (data.faults.exclude) or set bad_steps.policy=skip"
        )
    if run.bad_steps.detector.in_row > config.max_in_row:
        raise EngineError(
            f"{what}. It is bad step {run.bad_steps.detector.in_row} in a row (bad_steps.max_in_row="
            f"{config.max_in_row}): lower the learning rate, or check the data"
        )
    run.log.print_line(f"{what}; the update was skipped")
    return False
