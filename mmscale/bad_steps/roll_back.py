"""Roll a run back to a checkpoint and continue with later data, also if the process is killed in between.

    step      1 .. to_step .. at_step (bad)          to_step + 1 ..
    data      1 .. to_step .. at_step (skipped)      at_step + 1 ..       steps and their data now have other numbers

A roll back is an entry of ``RUN/bad_steps/roll_backs.json`` with the loader's state after the bad step. The entry is
written atomically before anything else changes. Every checkpoint records how many roll backs happened before it
(``TrainState.extra``). From both, any later start derives which checkpoints are abandoned and where the data continue.

A checkpoint is abandoned if its step is after the ``to_step`` of a roll back that it does not count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field, ValidationError

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.strict import StrictConfig, first_fault
from data_pipeline.io.untrusted import read_json
from data_pipeline.order.state import LoaderState
from mmscale.checkpoint.manifest import (
    TrainState,
    is_whole,
    list_checkpoints,
    read_manifest,
    read_state,
)
from mmscale.errors import CheckpointError
from mmscale.io.files import remove_folder

FILE = "roll_backs.json"
NUM_ROLL_BACKS = "num_roll_backs"
"""Key of ``TrainState.extra``."""


class RollBack(StrictConfig):
    """One roll back.

    Attributes:
        at_step: The bad step.
        to_step: Step of the checkpoint that the run restarts from; 0 is the beginning of the run.
        stage_begin: Number of steps before the stage. A roll back does not leave the stage.
        in_row: Number of roll backs, including this one, without passing the furthest bad step.
        reason: Why the step was bad.
        loader: State of all lanes after the bad step, as JSON.
    """

    at_step: int = Field(ge=1)
    to_step: int = Field(ge=0)
    stage_begin: int = Field(ge=0)
    in_row: int = Field(ge=1)
    reason: str
    loader: str

    @property
    def position(self) -> LoaderState:
        """The state from which the loader continues."""
        return LoaderState.from_json(self.loader)


def read_roll_backs(folder: Path) -> list[RollBack]:
    """Return the roll backs of a run, in order; none if the list does not exist.

    Raises:
        CheckpointError: the list is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return [RollBack.model_validate(entry) for entry in read_json(path)]
    except (OSError, ValueError, TypeError) as error:
        said = first_fault(error) if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"{path} is damaged ({said}): without it the run does not know which data it skipped"
        ) from error


def write_roll_backs(folder: Path, roll_backs: Sequence[RollBack]) -> None:
    """Write the list atomically.

    Raises:
        OSError: the list cannot be written.
    """
    text = json.dumps([entry.model_dump() for entry in roll_backs], indent=1)
    write_whole(folder / FILE, text.encode(), parents=True)


def effective_roll_backs(roll_backs: Sequence[RollBack]) -> list[RollBack]:
    """Return the roll backs that are still in effect: a later one to the same or an earlier step replaces them."""
    return [
        entry
        for number, entry in enumerate(roll_backs)
        if all(later.to_step > entry.to_step for later in roll_backs[number + 1 :])
    ]


def plan_roll_back(
    checkpoints: Path, before: Sequence[RollBack], state: TrainState, steps: int, reason: str, loader: LoaderState
) -> RollBack:
    """Return a roll back from the step after ``state`` to the newest checkpoint at least ``steps`` steps before it.

    Only checkpoints of the current stage are used; the beginning of the run counts as one. If none is old enough, the
    oldest is used.

    Args:
        checkpoints: Folder of the run's checkpoints.
        before: Earlier roll backs.
        state: State before the bad step.
        steps: Smallest number of steps to roll back.
        reason: Why the step is bad.
        loader: State of all lanes after the bad step.

    Raises:
        CheckpointError: there is no checkpoint of the stage.
    """
    begin, at_step = state.step - state.stage_step, state.step + 1
    paths = [path for path in list_checkpoints(checkpoints) if is_whole(path) and not is_abandoned(path, before)]
    known = {read_manifest(path).state.step for path in paths}
    steps_there = sorted(step for step in ({0} | known if begin == 0 else known) if begin <= step < at_step)
    if not steps_there:
        raise CheckpointError(f"step {at_step} cannot be rolled back: {checkpoints} holds no checkpoint of its stage")
    far_enough = [step for step in steps_there if step <= at_step - steps]
    return RollBack(
        at_step=at_step,
        to_step=far_enough[-1] if far_enough else steps_there[0],
        stage_begin=begin,
        in_row=before[-1].in_row + 1 if at_step <= max((entry.at_step for entry in before), default=0) else 1,
        reason=reason,
        loader=loader.to_json(),
    )


def resume_state(path: Path | None, roll_backs: Sequence[RollBack]) -> TrainState:
    """Return the state in a checkpoint, or the state at the beginning of the run if ``path`` is None.

    If ``pending_roll_back`` returns a roll back for this state, the data continue from its position instead.

    Raises:
        CheckpointError: a roll back is pending, and no checkpoint of its stage is left.
    """
    state = TrainState() if path is None else read_state(path)
    entry = pending_roll_back(state, roll_backs)
    if entry is not None and state.step < entry.stage_begin:
        raise CheckpointError(
            f"the run was rolled back from step {entry.at_step} to {entry.to_step}, and no checkpoint of that stage is "
            f"left; remove {FILE} to train on from step {state.step} with all data"
        )
    return state


def pending_roll_back(state: TrainState, roll_backs: Sequence[RollBack]) -> RollBack | None:
    """Return the last roll back if the state does not count it yet, else None."""
    return roll_backs[-1] if roll_backs and int(state.extra.get(NUM_ROLL_BACKS, 0)) < len(roll_backs) else None


def is_abandoned(path: Path, roll_backs: Sequence[RollBack]) -> bool:
    """Return whether a roll back has abandoned a checkpoint; False for a damaged checkpoint."""
    try:
        state = read_manifest(path).state
    except CheckpointError:
        return False
    seen = int(state.extra.get(NUM_ROLL_BACKS, 0))
    return any(state.step > entry.to_step for entry in roll_backs[seen:])


def remove_abandoned(checkpoints: Path, roll_backs: Sequence[RollBack]) -> None:
    """Remove the abandoned checkpoints. Call it on one rank.

    Raises:
        OSError: a checkpoint cannot be removed.
    """
    for path in list_checkpoints(checkpoints):
        if is_abandoned(path, roll_backs):
            remove_folder(path)


def apply_pending(state: TrainState, roll_backs: Sequence[RollBack]) -> tuple[list[RollBack], TrainState]:
    """Return the list and the state with which the run resumes from ``state``.

    If the last roll back is pending, the new state counts it, and its ``to_step`` becomes the step of ``state``. That
    step is earlier than planned if the chosen checkpoint was damaged since.
    """
    entry = pending_roll_back(state, roll_backs)
    if entry is None:
        return list(roll_backs), state
    moved = entry.model_copy(update={"to_step": min(entry.to_step, state.step)})
    state = replace(state, extra={**state.extra, NUM_ROLL_BACKS: len(roll_backs)})
    return [*roll_backs[:-1], moved], state
