"""What follows from a bad step: a file that names its samples, and the policy.

    why_refuse --before the update, agreed by all ranks--> no update --> RUN/bad_steps/step-N.json
                                                                            --> skip | halt | roll back

Not for: which steps are bad (``mmscale.engine.guard``), what a roll back means on the disk (``checkpoint.roll_back``).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.loader.loader import StepBatch
from data_pipeline.order.state import LoaderState
from mmscale.checkpoint import TrainState, choose
from mmscale.checkpoint.roll_back import (
    NUM_ROLL_BACKS,
    RollBack,
    is_abandoned,
    pending,
    plan,
    read_roll_backs,
    remove_abandoned,
    settled,
    state_behind,
    write_roll_backs,
)
from mmscale.dist import World, first_complaint, gather_bytes
from mmscale.engine.engine import StepReport
from mmscale.engine.guard import Policy, StepGuard
from mmscale.errors import CheckpointError, EngineError
from mmscale.run.config import RunConfig
from mmscale.run.folder import BAD_STEPS, CHECKPOINTS

_KEY = "bad_steps"


class RolledBack(Exception):  # noqa: N818 - no error: the run goes on from an earlier checkpoint.
    """The run is to go on from where ``start`` says; every rank raises it together."""


class BadSteps:
    """Guard and policy of a run, from one start to the end or the next roll back.

    Args:
        config: The run's.
        world: This rank.

    Attributes:
        checkpoint: Where to go on; None at the beginning.
        state: The state to go on from.

    Raises:
        CheckpointError: a checkpoint or the list of roll backs is damaged; every rank raises.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._world = config, world
        self._folder = config.run_dir / BAD_STEPS
        self._checkpoints = config.run_dir / CHECKPOINTS
        self._roll_backs = read_roll_backs(self._folder)
        self.checkpoint = choose(
            world,
            self._checkpoints,
            config.checkpoint,
            partial(print, file=sys.stderr) if world.is_main else lambda text: None,
            lambda path: not is_abandoned(path, self._roll_backs),
        )
        state = state_behind(self.checkpoint, self._roll_backs)
        entry = pending(state, self._roll_backs)
        self._position: LoaderState | None = None if entry is None else entry.position
        self._roll_backs, self.state = settled(state, self._roll_backs)
        if self._roll_backs:
            self._together(self._settle)
        self._guard = StepGuard(config.bad_steps, self.state.extra.get(_KEY))
        self._reason: str | None = None
        self._limits: Mapping[str, float | None] = {}

    def _settle(self) -> None:
        write_roll_backs(self._folder, self._roll_backs)
        remove_abandoned(self._checkpoints, self._roll_backs)

    def begin_stage(self, state: TrainState) -> LoaderState | None:
        """Call before the first step of a start and of a stage.

        Returns:
            Where the data go on if not where ``state`` says: behind those that a roll back leaves out.
        """
        if state.stage_step == 0:
            self._guard.begin_stage()
        position, self._position = self._position, None
        return position

    def why_refuse(self, loss: float, norm: float) -> str | None:
        """For ``Engine.train_step``."""
        return self._guard.reason(loss, norm)

    def take(self, state: TrainState, report: StepReport) -> TrainState:
        """Judges a step; ``state`` after it, with what a resume needs to judge the next."""
        self._limits = self._guard.thresholds()
        if report.weight and not report.overflow:
            self._reason = self._guard.take(report.loss, report.grad_norm, report.applied)
        else:
            self._reason = None
        extra = {_KEY: self._guard.state(), NUM_ROLL_BACKS: len(self._roll_backs)}
        return replace(state, extra={**state.extra, **extra})

    def figures(self) -> dict[str, int]:
        """Counters for the metrics: bad steps that were skipped, and roll backs, so far."""
        return {"bad_steps": self._guard.num_bad, "roll_backs": len(self._roll_backs)}

    def act(self, state: TrainState, batch: StepBatch, report: StepReport) -> str | None:
        """Names the samples of a bad step and does what the policy says. All ranks must call.

        Args:
            state: After the step.
            batch: What this rank was fed.
            report: What came of it.

        Returns:
            A line for the log if the step was bad and was skipped.

        Raises:
            EngineError: the policy is to halt, or there were too many bad steps in a row.
            RolledBack: the run goes on from an earlier checkpoint.
        """
        if self._reason is None:
            return None
        path = self._dump(state.step, batch, report)
        what = f"step {state.step}: {self._reason}; its samples are in {path}"
        config = self._config.bad_steps
        if config.policy is Policy.ROLL_BACK:
            self._roll_back(state, batch, what)
        if config.policy is Policy.HALT:
            raise EngineError(
                f"{what}. The update was not made (bad_steps.policy=halt); to go on from the last checkpoint leave the "
                "samples out (data.faults.exclude) or set bad_steps.policy=skip"
            )
        if self._guard.in_row > config.max_in_row:
            raise EngineError(
                f"{what}. It is bad step {self._guard.in_row} in a row (bad_steps.max_in_row={config.max_in_row}): "
                "lower the learning rate, or look at the data"
            )
        return f"{what}; the update was skipped"

    def _roll_back(self, state: TrainState, batch: StepBatch, what: str) -> None:
        config, roll_backs = self._config.bad_steps, self._roll_backs
        before = replace(state, step=state.step - 1, stage_step=state.stage_step - 1)
        parts = gather_bytes(self._world, batch.state.to_json().encode())
        limit = None

        def write() -> None:
            nonlocal limit
            loader = LoaderState.merge([LoaderState.from_json(part.decode()) for part in parts])
            steps, reason = config.roll_back_steps, str(self._reason)
            entry = plan(self._checkpoints, roll_backs, before, steps, reason, loader)
            if entry.in_row > config.max_in_row:
                limit = (
                    f"{what}. After {entry.in_row - 1} roll backs the run has not got past step "
                    f"{max(earlier.at_step for earlier in roll_backs)} (bad_steps.max_in_row={config.max_in_row}): "
                    "lower the learning rate, or look at the data"
                )
            else:
                write_roll_backs(self._folder, [*roll_backs, entry])

        self._together(write)
        limit = first_complaint(self._world, limit)
        if limit is not None:
            raise EngineError(limit)
        raise RolledBack(self._describe(read_roll_backs(self._folder)[-1], what))

    @staticmethod
    def _describe(entry: RollBack, what: str) -> str:
        return f"{what}; going back to step {entry.to_step} and on behind the data of step {entry.at_step}"

    def _dump(self, step: int, batch: StepBatch, report: StepReport) -> str:
        parts = gather_bytes(self._world, json.dumps(list(_documents(batch, report))).encode())
        after = f"-after-roll-back-{len(self._roll_backs)}" if self._roll_backs else ""
        path = self._folder / f"step-{step:08d}{after}.json"

        def write() -> None:
            documents = [document for part in parts for document in json.loads(part)]
            record = {
                "step": step,
                "reason": self._reason,
                "policy": self._config.bad_steps.policy.value,
                "loss": _finite(report.loss),
                "grad_norm": _finite(report.grad_norm),
                "thresholds": self._limits,
                "documents": sorted(documents, key=_worst_first),
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, as_utf8(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"))

        self._together(write)
        return str(path)

    def _together(self, work: Any) -> None:
        """Does ``work`` on rank 0 and lets all ranks fail together."""
        complaint = None
        if self._world.is_main:
            try:
                work()
            except (OSError, CheckpointError) as error:
                complaint = f"{self._folder}: {error}"
        heard = first_complaint(self._world, complaint)
        if heard is not None:
            raise CheckpointError(heard)


def _documents(batch: StepBatch, report: StepReport) -> Iterator[dict[str, Any]]:
    """This rank's documents of a step, with what the ledger calls them and their mean loss."""
    drawn = iter([(lane, place, drawn) for lane, pack in batch.drawn.items() for place, drawn in enumerate(pack)])
    for microbatch, losses in zip(batch.microbatches, report.document_losses, strict=True):
        bounds = microbatch.segments.bounds
        for number, origin in enumerate(microbatch.provenance):
            if origin is None:
                continue
            lane, place, known = next(drawn)
            weight = float(microbatch.loss_weights[bounds[number] : bounds[number + 1]].sum())
            yield {
                "lane": lane,
                "place": place,
                "dataset": origin.dataset,
                "epoch": origin.epoch,
                "index": origin.index,
                "part": known.part,
                "shard": origin.shard,
                "key": origin.key,
                "tokens": bounds[number + 1] - bounds[number],
                "loss": _finite(losses[number] / weight) if weight else None,
                "finite": math.isfinite(losses[number]),
            }


def _worst_first(document: Mapping[str, Any]) -> tuple[bool, float]:
    return bool(document["finite"]), -(document["loss"] or 0.0)


def _finite(value: float) -> float | None:
    """JSON has no NaN or infinity: null."""
    return value if math.isfinite(value) else None
