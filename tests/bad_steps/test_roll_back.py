"""Roll backs: which are effective, their checkpoints, and the checkpoints that they abandon."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order.state import LoaderState
from mmscale.bad_steps.roll_back import (
    FILE,
    NUM_ROLL_BACKS,
    RollBack,
    apply_pending,
    effective_roll_backs,
    is_abandoned,
    pending_roll_back,
    plan_roll_back,
    read_roll_backs,
    remove_abandoned,
    resume_state,
    write_roll_backs,
)
from mmscale.checkpoint import TrainState, list_checkpoints
from mmscale.checkpoint.manifest import SavedState
from mmscale.errors import CheckpointError
from tests.checkpoint.hand_made import whole_pieces, write_checkpoint
from tests.data_pipeline.lane_states import toy_lane

pytestmark = pytest.mark.usefixtures("no_sync")

WEIGHTS = {"w": torch.arange(4.0)}


def loader(step: int) -> LoaderState:
    return LoaderState("toy:1", step, {0: toy_lane(step)})


def entry(at_step: int, to_step: int, **changes: Any) -> RollBack:
    values = {"stage_begin": 0, "in_row": 1, "reason": "spike", "loader": loader(at_step).to_json()}
    return RollBack(at_step=at_step, to_step=to_step, **{**values, **changes})


def checkpoint(folder: Path, step: int, *, seen: int = 0, begin: int = 0) -> Path:
    """Write a checkpoint that counts ``seen`` roll backs, in a stage that begins after ``begin`` steps."""
    extra = {NUM_ROLL_BACKS: seen} if seen else {}
    state = SavedState(
        step=step, stage_index=int(begin > 0), stage_step=step - begin, tokens=10 * step, samples=step, extra=extra
    )
    loaders = [loader(step).to_json()]
    return write_checkpoint(folder, [whole_pieces(WEIGHTS)], {"w": (4,)}, step=step, loaders=loaders, state=state)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), max_size=7))
def test_a_later_roll_back_to_the_same_or_an_earlier_step_replaces_one(steps: list[tuple[int, int]]) -> None:
    listed = [entry(at, to) for at, to in steps]
    kept: list[RollBack] = []
    for each in listed:
        kept = [earlier for earlier in kept if earlier.to_step < each.to_step] + [each]
    assert effective_roll_backs(listed) == kept


@given(st.data())
@settings(max_examples=40)
def test_checkpoints_are_abandoned_whose_steps_the_run_left_behind(data: Any) -> None:
    """Simulate a run: each checkpoint is part of the current steps, or abandoned."""
    alive: dict[int, Path] = {0: Path()}
    left: list[Path] = []
    listed: list[RollBack] = []
    step = 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(data.draw(st.integers(1, 4))):
            for _ in range(data.draw(st.integers(1, 3))):
                step += 1
                alive[step] = checkpoint(Path(name) / str(number), step, seen=number)
            to_step = data.draw(st.sampled_from([*alive]))
            listed.append(entry(step + 1, to_step))
            left += [path for at, path in alive.items() if at > to_step]
            alive = {at: path for at, path in alive.items() if at <= to_step}
            step = to_step
        alive.pop(0)
        assert not any(is_abandoned(path, listed) for path in alive.values())
        assert all(is_abandoned(path, listed) for path in left)


def test_abandoned_checkpoints_are_removed_and_the_others_stay(tmp_path: Path) -> None:
    listed = [entry(9, 4)]
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 6, 8)]
    again = checkpoint(tmp_path, 7, seen=1)
    assert [is_abandoned(path, listed) for path in (*paths, again)] == [False, False, True, True, False]
    assert not any(is_abandoned(path, []) for path in paths)
    (paths[2] / "manifest.json").write_text("cut")
    assert not is_abandoned(paths[2], listed), "of a damaged one nothing is known"
    remove_abandoned(tmp_path, listed)
    assert list_checkpoints(tmp_path) == [paths[0], paths[1], paths[2], again]


@pytest.mark.parametrize(
    ("steps_back", "stage_begin", "to_step"),
    # At least this many steps before step 13, else the oldest. Step 0 is the beginning of the first stage.
    [
        *[(1, 0, 12), (2, 0, 10), (3, 0, 10), (4, 0, 6), (7, 0, 6), (8, 0, 0), (13, 0, 0), (40, 0, 0)],
        *[(1, 6, 12), (3, 6, 10), (7, 6, 6), (8, 6, 6), (3, 11, 12)],
    ],
)
def test_a_roll_back_goes_to_the_newest_checkpoint_that_is_far_enough_back(
    tmp_path: Path, steps_back: int, stage_begin: int, to_step: int
) -> None:
    for step in (6, 10, 12, 14):
        checkpoint(tmp_path, step)
    damaged = checkpoint(tmp_path, 11)
    (damaged / "rank-00000.json").write_text("cut")
    state = TrainState(step=12, stage_step=12 - stage_begin)
    found = plan_roll_back(tmp_path, [], state, steps_back, "why", loader(13))
    assert found == entry(13, to_step, stage_begin=stage_begin, reason="why")
    assert found.position == loader(13)


def test_a_stage_without_a_checkpoint_cannot_be_rolled_back(tmp_path: Path) -> None:
    checkpoint(tmp_path, 6)
    with pytest.raises(CheckpointError, match="step 13 cannot be rolled back"):
        plan_roll_back(tmp_path, [], TrainState(step=12, stage_step=5), 1, "why", loader(13))


def test_roll_backs_without_progress_are_counted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    earlier = [entry(9, 4, in_row=1), entry(8, 4, in_row=2)]
    for state_step, in_row in ((7, 3), (8, 3), (9, 1)):
        state = TrainState(step=state_step, stage_step=state_step)
        assert plan_roll_back(tmp_path, earlier, state, 1, "why", loader(1)).in_row == in_row
    abandoned = checkpoint(tmp_path, 6)
    assert plan_roll_back(tmp_path, earlier, TrainState(step=7, stage_step=7), 1, "why", loader(1)).to_step == 4
    assert is_abandoned(abandoned, earlier)


def test_the_data_go_on_behind_the_bad_step_until_a_checkpoint_has_been_saved(tmp_path: Path) -> None:
    listed = [entry(5, 2), entry(9, 4)]
    before, after = checkpoint(tmp_path, 4, seen=1), checkpoint(tmp_path, 7, seen=2)
    assert resume_state(None, []) == TrainState()
    assert pending_roll_back(resume_state(None, listed), listed) == listed[1]
    for path, waiting in ((before, listed[1]), (after, None)):
        state = resume_state(path, listed)
        assert state.step == int(path.name[5:])
        assert state.loader == loader(state.step)
        assert pending_roll_back(state, listed) == waiting
    with pytest.raises(CheckpointError, match=f"rolled back from step 9 to 6.*remove {FILE}.*from step 4"):
        resume_state(before, [listed[0], entry(9, 6, stage_begin=5)])
    resume_state(before, [listed[0], entry(9, 6, stage_begin=4)])


def test_the_list_says_where_the_run_really_went_back_to() -> None:
    listed = [entry(5, 2), entry(7, 3), entry(9, 4)]
    through = TrainState(step=7, extra={NUM_ROLL_BACKS: 3, "note": 1})
    assert apply_pending(through, listed) == (listed, through)
    for step, to_step in ((4, 4), (3, 3), (6, 4)):
        state = TrainState(step=step, tokens=8, extra={NUM_ROLL_BACKS: 2, "note": 1})
        moved, now = apply_pending(state, listed)
        assert moved == [*listed[:2], entry(9, to_step)]
        assert now == TrainState(step=step, tokens=8, extra={NUM_ROLL_BACKS: 3, "note": 1})


@pytest.mark.parametrize("text", ["", "[", "3", "[1]", '[{"at_step": 3}]', "null"])
def test_a_list_is_read_as_it_was_written_or_refused(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "run" / "bad_steps"
    assert read_roll_backs(folder) == []
    listed = [entry(5, 2), entry(9, 4, in_row=2, stage_begin=1)]
    write_roll_backs(folder, listed[:1])
    write_roll_backs(folder, listed)
    assert read_roll_backs(folder) == listed
    assert len(json.loads((folder / FILE).read_text())) == 2
    (folder / FILE).write_text(text)
    with pytest.raises(CheckpointError, match="does not know which data it skipped"):
        read_roll_backs(folder)
