"""Going back to a checkpoint and on with later data, in a way that outlives the process.

    step      1 .. to_step .. at_step (bad)          to_step + 1 ..
    data      1 .. to_step .. at_step (left out)     at_step + 1 ..       a step's data are not those of its number

A roll back is an entry of ``RUN/bad_steps/roll_backs.json``, written whole before anything else happens, with the
loader's integers after the bad step. Every checkpoint says how many roll backs it has gone through
(``TrainState.extra``). So whoever starts the run, the same process or one after a kill, sees which checkpoints were
abandoned (they lie behind a point that was gone back from, and do not know of it) and from where the data go on.
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
        to_step: Step of the checkpoint that the run went back to; 0 is its beginning.
        stage_begin: Steps that were done before the stage; a roll back stays within it.
        in_row: This one and those before it since the run last got further than ever before.
        reason: Why the step was bad.
        loader: The loader's state of all lanes after the bad step.
    """

    at_step: int = Field(ge=1)
    to_step: int = Field(ge=0)
    stage_begin: int = Field(ge=0)
    in_row: int = Field(ge=1)
    reason: str
    loader: str

    @property
    def position(self) -> LoaderState:
        """Where the data go on."""
        return LoaderState.from_json(self.loader)


def read_roll_backs(folder: Path) -> list[RollBack]:
    """The roll backs of a run, in order.

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
            f"{path} is damaged ({said}): without it the run does not know which data it left out"
        ) from error


def write_roll_backs(folder: Path, roll_backs: Sequence[RollBack]) -> None:
    """Writes the list, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, json.dumps([entry.model_dump() for entry in roll_backs], indent=1).encode())


def in_force(roll_backs: Sequence[RollBack]) -> list[RollBack]:
    """Those that shaped the steps as they are now: a later one to the same or an earlier step replaces them."""
    return [
        entry
        for number, entry in enumerate(roll_backs)
        if all(later.to_step > entry.to_step for later in roll_backs[number + 1 :])
    ]


def plan(
    checkpoints: Path, before: Sequence[RollBack], state: TrainState, steps: int, reason: str, loader: LoaderState
) -> RollBack:
    """A roll back from the step after ``state``, to the newest checkpoint of its stage at least ``steps`` back.

    Where the stage is younger, or retention has removed what is that old, it goes to the oldest there is.

    Args:
        checkpoints: Folder of the run's checkpoints.
        before: Earlier roll backs.
        state: Before the bad step.
        steps: How far to go back at least.
        reason: Why the step is bad.
        loader: State of all lanes after the bad step.

    Raises:
        CheckpointError: there is no checkpoint of the stage to go back to.
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


def state_behind(path: Path | None, roll_backs: Sequence[RollBack]) -> TrainState:
    """The state to go on from after a checkpoint, or from the beginning.

    Where the checkpoint lies before a roll back, the data go on from ``pending``'s position.

    Raises:
        CheckpointError: the checkpoint that a run rolled back to is gone, with all others of its stage.
    """
    state = TrainState() if path is None else read_state(path)
    entry = pending(state, roll_backs)
    if entry is not None and state.step < entry.stage_begin:
        raise CheckpointError(
            f"the run was rolled back from step {entry.at_step} to {entry.to_step}, and no checkpoint of that stage is "
            f"left; remove {FILE} to train on from step {state.step} with all data"
        )
    return state


def pending(state: TrainState, roll_backs: Sequence[RollBack]) -> RollBack | None:
    """The roll back that a checkpoint's state lies before, if any; its ``position`` is where the data go on."""
    return roll_backs[-1] if roll_backs and int(state.extra.get(NUM_ROLL_BACKS, 0)) < len(roll_backs) else None


def is_abandoned(path: Path, roll_backs: Sequence[RollBack]) -> bool:
    """Whether a checkpoint lies behind a point that was gone back from; False for a damaged one."""
    try:
        state = read_manifest(path).state
    except CheckpointError:
        return False
    seen = int(state.extra.get(NUM_ROLL_BACKS, 0))
    return any(state.step > entry.to_step for entry in roll_backs[seen:])


def remove_abandoned(checkpoints: Path, roll_backs: Sequence[RollBack]) -> None:
    """Removes the checkpoints that a roll back has left behind; call on one rank.

    Raises:
        OSError: one cannot be removed.
    """
    for path in list_checkpoints(checkpoints):
        if is_abandoned(path, roll_backs):
            remove_folder(path)


def settled(state: TrainState, roll_backs: Sequence[RollBack]) -> tuple[list[RollBack], TrainState]:
    """List and state once the run goes on from ``state``: the last entry tells the step it really went back to.

    They differ where the checkpoint that was chosen has been damaged since, and an older one serves.
    """
    entry = pending(state, roll_backs)
    if entry is None:
        return list(roll_backs), state
    moved = entry.model_copy(update={"to_step": min(entry.to_step, state.step)})
    state = replace(state, extra={**state.extra, NUM_ROLL_BACKS: len(roll_backs)})
    return [*roll_backs[:-1], moved], state
