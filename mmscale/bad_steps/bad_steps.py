"""The bad steps of a run: their number, the files with their samples, and the start of a roll back.

    detector.reason --before the update--> detector.record --> write_samples: RUN/bad_steps/step-N.json
                                                           --> add_roll_back: RUN/bad_steps/roll_backs.json

Not for: which steps are bad (``detector``), the list of roll backs (``roll_back``), or the choice between skipping,
halting and rolling back (``mmscale.run.train``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.loader.loader import StepBatch
from data_pipeline.order.state import LoaderState
from mmscale.bad_steps.detector import BadStep, BadStepsConfig, SpikeDetector
from mmscale.bad_steps.roll_back import (
    NUM_ROLL_BACKS,
    RollBack,
    apply_pending,
    pending_roll_back,
    plan_roll_back,
    remove_abandoned,
    resume_state,
    write_roll_backs,
)
from mmscale.checkpoint import TrainState
from mmscale.dist import World, gather_bytes, raise_on_any_rank
from mmscale.engine.engine import StepReport
from mmscale.errors import CheckpointError, EngineError

_KEY = "bad_steps"


class BadSteps:
    """The bad steps of a run, from one start until its end or its next roll back. All ranks must create one.

    If the run was rolled back, rank 0 updates the list of roll backs and removes the abandoned checkpoints.

    Args:
        config: The ``bad_steps`` block.
        folder: ``RUN/bad_steps``.
        checkpoints: The run's checkpoints.
        world: This rank.
        roll_backs: Roll backs of the run so far.
        latest: The checkpoint that the run resumes from; None at the beginning.

    Attributes:
        state: The state to resume from.
        position: Position of the loader if it differs from that in ``state``: after the data that a roll back skips.
        detector: Decides which steps are bad.
        num_roll_backs: Roll backs of the run so far.

    Raises:
        CheckpointError: the run was rolled back and no checkpoint of that stage is left, or the list of roll backs
            cannot be written; every rank raises.
    """

    def __init__(
        self,
        config: BadStepsConfig,
        folder: Path,
        checkpoints: Path,
        world: World,
        roll_backs: Sequence[RollBack],
        latest: Path | None,
    ) -> None:
        self._config, self._folder, self._checkpoints, self._world = config, folder, checkpoints, world
        state = resume_state(latest, roll_backs)
        entry = pending_roll_back(state, roll_backs)
        self.position: LoaderState | None = None if entry is None else entry.position
        self._roll_backs, self.state = apply_pending(state, roll_backs)
        self.num_roll_backs = len(self._roll_backs)
        message = None
        if self._roll_backs and world.is_main:
            try:
                write_roll_backs(folder, self._roll_backs)
                remove_abandoned(checkpoints, self._roll_backs)
            except (OSError, CheckpointError) as error:
                message = f"{folder}: {error}"
        if self._roll_backs:
            raise_on_any_rank(world, message, CheckpointError)
        self.detector = SpikeDetector(config, self.state.extra.get(_KEY))

    def extra_state(self) -> dict[str, Any]:
        """Return the entries of ``TrainState.extra`` that a resume needs to continue the detection exactly."""
        return {_KEY: self.detector.state(), NUM_ROLL_BACKS: self.num_roll_backs}

    def write_samples(self, step: int, bad: BadStep, batch: StepBatch, report: StepReport) -> Path:
        """Gather the documents of a bad step from all ranks, and write them on rank 0. All ranks must call.

        Documents whose loss is not finite come first, then the others from the highest to the lowest mean loss. Return
        the path of the file, on every rank.

        Raises:
            CheckpointError: the file cannot be written; every rank raises.
        """
        parts = gather_bytes(self._world, json.dumps(list(_documents(batch, report))).encode())
        after = f"-after-roll-back-{self.num_roll_backs}" if self._roll_backs else ""
        path, message = self._folder / f"step-{step:08d}{after}.json", None
        if self._world.is_main:
            record = {
                "step": step,
                "reason": bad.reason,
                "policy": self._config.policy.value,
                "loss": _finite(report.loss),
                "grad_norm": _finite(report.grad_norm),
                "thresholds": bad.thresholds,
                "documents": sorted((each for part in parts for each in json.loads(part)), key=_worst_first),
            }
            text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            try:
                write_whole(path, as_utf8(text), parents=True)
            except OSError as error:
                message = f"{self._folder}: {error}"
        raise_on_any_rank(self._world, message, CheckpointError)
        return path

    def add_roll_back(self, state: TrainState, loader: LoaderState, reason: str, what: str) -> RollBack | None:
        """Record a roll back from a bad step to an earlier checkpoint. All ranks must call.

        Args:
            state: State before the bad step.
            loader: State of this rank's lanes after the bad step.
            reason: Why the step is bad.
            what: A sentence about the bad step, for error messages.

        Returns:
            The roll back on rank 0; None on other ranks.

        Raises:
            CheckpointError: there is no checkpoint to roll back to, or the list cannot be written; every rank raises.
            EngineError: there were too many roll backs without progress; every rank raises.
        """
        parts = gather_bytes(self._world, loader.to_json().encode())
        entry = message = limit = None
        if self._world.is_main:
            merged = LoaderState.merge([LoaderState.from_json(part.decode()) for part in parts])
            try:
                entry = plan_roll_back(
                    self._checkpoints, self._roll_backs, state, self._config.roll_back_steps, reason, merged
                )
                if entry.in_row > self._config.max_in_row:
                    limit = (
                        f"{what}. After {entry.in_row - 1} roll backs the run has not passed step "
                        f"{max(earlier.at_step for earlier in self._roll_backs)} "
                        f"(bad_steps.max_in_row={self._config.max_in_row}): lower the learning rate, or check the data"
                    )
                else:
                    write_roll_backs(self._folder, [*self._roll_backs, entry])
            except (OSError, CheckpointError) as error:
                message = f"{self._folder}: {error}"
        raise_on_any_rank(self._world, message, CheckpointError)
        raise_on_any_rank(self._world, limit, EngineError)
        return entry


def _documents(batch: StepBatch, report: StepReport) -> Iterator[dict[str, Any]]:
    """Yield this rank's documents of a step, with their keys in the sample log and their mean loss."""
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
    """Return None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None
