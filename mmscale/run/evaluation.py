"""Held-out scores during and after training: when to score, which step is the best, and when the run ends early.

    step that is due --score_sets--> results --> metrics.jsonl, TensorBoard; drawings/
                                        |
                         best.metric ---+--> improved: the loop saves a checkpoint, which is kept
                                        +--> not improved stop_after times in a row: the run ends

``TrainState.extra`` holds what a restart needs: the step that was scored last, the best value and its step. A
checkpoint of a step is saved after the evaluation of that step, so a resume repeats and loses no evaluation. A stop
request may come in between; then the next start scores the step before it trains.

Not for: how a set is scored (``mmscale.evaluate``), or which checkpoints are removed (``checkpoint.save``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError
from zlib_ng.zlib_ng import crc32

from data_pipeline.io.strict import StrictConfig, first_fault
from data_pipeline.media_spec import Placement
from mmscale.checkpoint import TrainState
from mmscale.checkpoint.manifest import BEST, folder_name, is_whole
from mmscale.dist import World, any_rank, gather_numbers
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError
from mmscale.evaluate import EvaluationConfig, evaluate, unanswerable_sets
from mmscale.evaluate.answers import caption_images
from mmscale.evaluate.result import ANSWERS_FOLDER, HeldOutResult, curve_values
from mmscale.io.files import link_best
from mmscale.metrics.run_log import NullLog, RunLog
from mmscale.models.build import AnyModel
from mmscale.report.captions import save_captions
from mmscale.run.config import RunConfig
from mmscale.run.drawings import RunDrawings, drawing_context, undrawable_sets

_SCORED = "scored_step"
"""Key of ``TrainState.extra``: the step that was scored last."""


class Best(StrictConfig):
    """The best evaluation so far."""

    metric: str
    """``evaluation.best.metric``."""
    definition: int
    """Checksum of the set's configuration. Values of another definition cannot be compared."""
    step: int = Field(ge=0)
    value: float
    without: int = Field(default=0, ge=0)
    """Number of evaluations of the last stage since then."""


class Evaluations:
    """The evaluations of a run during training. All ranks must create one and make the same calls.

    Args:
        config: The run.
        world: This rank.
        log: Receives the results.
        state: State at the beginning of this start.
        checkpoints: Folder of the run's checkpoints.

    Attributes:
        best: The best evaluation so far; None before the first one, and if ``evaluation.best`` is null.
        drawings: The drawings of the report.

    Raises:
        CheckpointError: the state of the best evaluation is damaged.
    """

    def __init__(
        self, config: RunConfig, world: World, log: RunLog | NullLog, state: TrainState, checkpoints: Path
    ) -> None:
        self._config, self._world, self._log = config, world, log
        self._during = config.evaluation.during_training
        self._scored_step: int | None = state.extra.get(_SCORED)
        self._results: dict[str, HeldOutResult] = {}
        self._noted: set[int] = set()
        self.drawings = RunDrawings(config, world, log, state.step)
        self._last_stage = max(number for number, _ in config.stages_from(0))
        self.best = self._read_best(state, checkpoints)
        if config.evaluation.best is not None and world.is_main:
            link_best(checkpoints, checkpoints / folder_name(self.best.step) if self.best else None)

    def _read_best(self, state: TrainState, checkpoints: Path) -> Best | None:
        """Return the best evaluation in the state, unless it cannot be compared or its checkpoint is gone."""
        if state.extra.get(BEST) is None or self._config.evaluation.best is None:
            return None
        try:
            best = Best.model_validate(state.extra[BEST])
        except ValidationError as error:
            raise CheckpointError(f"step {state.step}: the best evaluation is damaged: {first_fault(error)}") from error
        if (best.metric, best.definition) != self._compared():
            self._log.print_line(f"{best.metric}: its set has changed; the best checkpoint is chosen anew")
            return None
        folder = checkpoints / folder_name(best.step)
        if any_rank(self._world, self._world.is_main and not is_whole(folder)):
            self._log.print_line(f"the best checkpoint {folder} is missing; the best checkpoint is chosen anew")
            return None
        return best

    def _compared(self) -> tuple[str, int]:
        """Return the compared metric, and a checksum of its set's configuration."""
        best = self._config.evaluation.best
        assert best is not None
        held = next(held for held in self._during.sets if held.name == best.set)
        return best.metric, crc32(held.model_dump_json().encode())

    def is_due(self, state: TrainState) -> bool:
        """Return whether the step of ``state`` is to be scored and is not scored yet."""
        every = self._config.evaluation.every_steps
        return every is not None and state.step > 0 and state.step % every == 0 and self._scored_step != state.step

    def run(self, engine: Engine, state: TrainState) -> bool:
        """Score the sets after the step of ``state``, and write the results to the step's line. All ranks must call.

        Weights, moments, gradients and random states are unchanged.

        Returns:
            Whether the step is the best one so far, so that its checkpoint must be kept.

        Raises:
            ConfigError, DataPipelineError: as ``evaluate``.
        """
        is_first = state.stage_index not in self._noted
        self._noted.add(state.stage_index)
        stage, print_line = state.stage_index, self._log.print_line if is_first else None
        evaluation = answerable(self._config, stage, self._during, print_line)
        with engine.inference(ema=engine.stage.ema is not None) as model:
            self._results = score_sets(self._config, stage, cast(AnyModel, model), evaluation, engine.world)
            self.drawings.draw(model, stage, state.step)
        self._scored_step = state.step
        for name, result in self._results.items():
            self._log.print_line(f"step {state.step}: held-out {name}: {result.summary}")
        self._log.amend(state.step, curve_values(self._results))
        is_best = self._compare(state)
        self._log.pause("evaluation")
        return is_best

    def _compare(self, state: TrainState) -> bool:
        config = self._config.evaluation.best
        if config is None or config.set not in self._results:
            return False
        own = getattr(self._results[config.set], config.value)
        value = gather_numbers(self._world, math.nan if own is None else own)[0]  # All ranks decide by rank 0's value.
        if config.improves(value, self.best.value if self.best else None):
            metric, definition = self._compared()
            self.best = Best(metric=metric, definition=definition, step=state.step, value=value)
            self._log.print_line(
                f"step {state.step}: {metric} {value:.4g} is the best so far; keeping {folder_name(state.step)}"
            )
            return True
        if self.best is not None and state.stage_index == self._last_stage:
            self.best = self.best.model_copy(update={"without": self.best.without + 1})
        return False

    def end_reason(self, state: TrainState) -> str | None:
        """Return why the run ends at ``state`` although steps are left; None if it continues."""
        config = self._config.evaluation.best
        if config is None or config.stop_after is None or self.best is None or state.stage_index != self._last_stage:
            return None
        if self.best.without < config.stop_after or state.step >= self._config.total_steps:
            return None
        return (
            f"{config.metric} did not improve in {self.best.without} evaluations (evaluation.best.stop_after="
            f"{config.stop_after}); the best is {self.best.value:.4g} at step {self.best.step}"
        )

    def extra_state(self) -> dict[str, Any]:
        """Return the entries of ``TrainState.extra`` that a restart needs."""
        return {_SCORED: self._scored_step, BEST: None if self.best is None else self.best.model_dump()}

    def known(self, state: TrainState) -> Mapping[str, HeldOutResult]:
        """Return the results of the sets that were scored as a whole after the step of ``state``, by name."""
        if self._scored_step != state.step:
            return {}
        whole = [held.name for held in self._config.evaluation.sets if held in self._during.sets]
        return {name: result for name, result in self._results.items() if name in whole}


def score_at_end(
    config: RunConfig, engine: Engine, state: TrainState, log: RunLog | NullLog, evaluations: Evaluations
) -> dict[str, HeldOutResult]:
    """Score the held-out sets with the engine's model, caption images and draw. All ranks must call.

    If the stage keeps an average of its weights, the average is scored.

    Args:
        config: The run.
        engine: Has the model of the last stage.
        state: The state after the last step.
        log: Receives the results.
        evaluations: Those during training. Sets that were scored after the last step are not scored again.
    """
    known = evaluations.known(state)
    step, stage = state.step, state.stage_index
    data, spec = config.evaluation_data(stage), config.stage_media(stage)
    log.pause()
    evaluation = answerable(config, stage, config.evaluation, log.print_line)
    if evaluation.image_sets and evaluation.captions is not None and spec.placement is Placement.PAIR:
        log.print_line(f"no captions: the model of stage {engine.stage.name} writes no text")
    missing = evaluation.model_copy(update={"sets": tuple(h for h in evaluation.sets if h.name not in known)})
    with engine.inference(ema=engine.stage.ema is not None) as model:
        results = {**known, **score_sets(config, stage, cast(AnyModel, model), missing, engine.world)}
        captioned = caption_images(model, evaluation, data, spec, engine.world)
        evaluations.drawings.draw(model, stage, step)
    results = {held.name: results[held.name] for held in evaluation.sets}
    for name, result in results.items():
        log.print_line(f"held-out {name}: {result.summary}")
    if engine.world.is_main and captioned:
        save_captions(config.run_dir, captioned)
        rows = [(name, expected, generated) for name, _, expected, generated in captioned]
        log.table(step, "captions", ("set", "expected", "generated"), rows)
    log.pause("evaluation")
    return results


def answerable(
    config: RunConfig, stage: int, evaluation: EvaluationConfig, print_line: Callable[[str], None] | None
) -> EvaluationConfig:
    """Return the block without the sets that the stage's model cannot answer; ``print_line`` receives a line on them.

    Args:
        config: The run.
        stage: Number of the stage.
        evaluation: The block.
        print_line: Called with the names of the sets and the reason; None prints nothing.
    """
    spec = config.stage_media(stage)
    what = "takes no images" if spec.placement is Placement.NONE else "only compares images with texts"
    unanswered = unanswerable_sets(evaluation, spec, config.evaluation_data(stage))
    undrawn = tuple(held for held in undrawable_sets(config, stage, evaluation) if held not in unanswered)
    model = f"the model of stage {config.stages[stage].name}" if config.stages else "the model"
    for left_out, reason in ((unanswered, what), (undrawn, "draws no images")):
        if left_out and print_line is not None:
            print_line(f"not scored: {', '.join(held.name for held in left_out)}; {model} {reason}")
    kept = tuple(held for held in evaluation.sets if held not in (*unanswered, *undrawn))
    return evaluation.model_copy(update={"sets": kept})


def score_sets(
    config: RunConfig, stage: int, model: AnyModel, evaluation: EvaluationConfig, world: World
) -> dict[str, HeldOutResult]:
    """Score the sets of ``evaluation`` with the model of a stage and write its answers to ``RUN/answers``.

    All ranks must call. Arguments, results and errors are otherwise those of ``evaluate``.
    """
    return evaluate(
        model,
        evaluation,
        config.evaluation_data(stage),
        config.stage_media(stage),
        world,
        drawing=drawing_context(config, stage, evaluation, world),
        answers_folder=config.run_dir / ANSWERS_FOLDER,
    )
