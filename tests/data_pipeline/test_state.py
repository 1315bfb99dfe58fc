"""A lane's integers, and what becomes of them where the list of data sets has changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import StateError
from data_pipeline.lanes import Cursor
from data_pipeline.state import Drawn, LaneState, LoaderState, StreamPosition, fingerprint_of

COUNTS = st.integers(0, 10**12)


@st.composite
def lane_states(draw: Any) -> LaneState:
    count = draw(st.integers(1, 4))
    draws = tuple(draw(COUNTS) for _ in range(count))
    cursors = tuple(Cursor(draw(COUNTS), draw(COUNTS), draw(COUNTS)) for _ in range(count))
    position = StreamPosition(draws, cursors, draw(COUNTS), draw(st.integers(0, 2**count - 1)))
    drawn = st.builds(Drawn, st.integers(0, count - 1), COUNTS, COUNTS, COUNTS)
    return LaneState(position, tuple(draw(st.lists(drawn, max_size=3))), tuple(draw(st.lists(COUNTS, max_size=3))))


@given(lane_states())
def test_integers_are_read_back_and_a_part_of_them_is_refused(state: LaneState) -> None:
    integers = state.to_integers()
    assert LaneState.from_integers(integers) == state
    least = 4 + 4 * len(state.position.draws) + 4 * len(state.waiting)
    assert len(integers) == least + len(state.faults)
    assert LaneState.from_integers(integers[:least]) == state._replace(faults=())
    for length in range(least):
        with pytest.raises(StateError, match=r"cut short|from 0 up"):
            LaneState.from_integers(integers[:length])
    for wrong in (-1, 1.0, True, "1", None):
        for place in range(len(integers)):
            with pytest.raises(StateError, match="integers from 0 up"):
                LaneState.from_integers([*integers[:place], wrong, *integers[place + 1 :]])  # type: ignore[list-item]


def test_a_document_of_a_data_set_that_is_not_there_is_refused() -> None:
    position = StreamPosition.start(2)
    good = LaneState(position, (Drawn(1, 0, 0),)).to_integers()
    assert LaneState.from_integers(good).waiting == (Drawn(1, 0, 0),)
    bad = LaneState(position, (Drawn(0, 0, 0), Drawn(2, 0, 0))).to_integers()
    with pytest.raises(StateError, match="of 2 data sets holds a document of number"):
        LaneState.from_integers(bad)


@given(lane_states(), st.data())
def test_data_sets_keep_their_places_by_name(state: LaneState, data: st.DataObject) -> None:
    old = list("abcd"[: len(state.position.draws)])
    new = data.draw(st.permutations([*old, *data.draw(st.lists(st.sampled_from("xyz"), unique=True))]))
    moved = state.among(old, new)
    assert state.among(old, old) == state
    assert (moved.position.phase, moved.faults) == (state.position.phase, state.faults)
    assert [new[d.dataset] for d in moved.waiting] == [old[d.dataset] for d in state.waiting]
    assert [d[1:] for d in moved.waiting] == [d[1:] for d in state.waiting]
    for place, name in enumerate(new):
        known = old.index(name) if name in old else None
        draws, cursor, used_up = (
            (0, Cursor(), 0)
            if known is None
            else (state.position.draws[known], state.position.cursors[known], state.position.exhausted >> known & 1)
        )
        assert (moved.position.draws[place], moved.position.cursors[place]) == (draws, cursor)
        assert moved.position.exhausted >> place & 1 == used_up
    assert moved.position.exhausted < 2 ** len(new)


def test_a_data_set_that_is_gone_leaves_the_others_alone() -> None:
    cursors = (Cursor(1, 1, 1), Cursor(2, 2, 2), Cursor(3, 3, 3))
    state = LaneState(StreamPosition((5, 0, 7), cursors, 1, 0b110), (Drawn(2, 1, 4),), (9,))
    moved = state.among(["a", "b", "c"], ["c", "a"])
    assert moved == LaneState(StreamPosition((7, 5), (cursors[2], cursors[0]), 1, 0b01), (Drawn(0, 1, 4),), (9,))


def loader_state(lanes: dict[int, list[int]], **changes: Any) -> LoaderState:
    values = {"fingerprint": fingerprint_of({"seed": 1, "a.manifest": "x"}), "step": 4, "datasets": ("a", "b")}
    return LoaderState(lanes=lanes, **{**values, **changes})


def test_the_states_of_ranks_are_merged_if_they_are_of_one_moment() -> None:
    one, two = loader_state({0: [1], 2: [3]}), loader_state({1: [2]})
    merged = LoaderState.merge([one, two])
    assert merged == loader_state({0: [1], 1: [2], 2: [3]})
    assert list(json.loads(merged.to_json())["lanes"]) == ["0", "1", "2"]
    assert LoaderState.from_json(LoaderState.merge([two, one]).to_json()) == merged
    assert LoaderState.merge([one]) == one
    assert LoaderState.from_json(one.to_json()).datasets == ("a", "b")
    for change in ({"step": 5}, {"fingerprint": "seed:0"}, {"datasets": ("b", "a")}):
        with pytest.raises(StateError, match="ranks disagree"):
            LoaderState.merge([one, loader_state({1: [2]}, **change)])
    with pytest.raises(StateError, match="two ranks hold lane 2"):
        LoaderState.merge([one, loader_state({3: [1], 2: [3]})])
    with pytest.raises(StateError, match="no loader state to merge"):
        LoaderState.merge([])


def test_a_state_of_other_data_names_every_part_that_differs() -> None:
    state = loader_state({0: [1], 1: [2]})
    state.check(state.fingerprint, [0, 1])
    with pytest.raises(StateError, match="lacks lane 2"):
        state.check(state.fingerprint, [0, 2, 3])
    other = fingerprint_of({"a.manifest": "y", "seed": 1, "b.manifest": "z"})
    with pytest.raises(StateError, match=r"changed since: a\.manifest, b\.manifest; put them back"):
        state.check(other, [0, 1])
    with pytest.raises(StateError, match="changed since: seed;"):
        state.check(fingerprint_of({"a.manifest": "x"}), [])
    assert state.changed({"seed": 2, "a.manifest": "x", "b.manifest": "z"}) == ["seed"]
    assert state.changed({"a.manifest": 1, "seed": 2}) == ["a.manifest", "seed"]
    assert state.changed({"b.manifest": "z"}) == []


def test_a_fingerprint_is_of_values_and_not_of_the_order_of_their_keys() -> None:
    assert fingerprint_of({"seed": 1}) == "seed:6b86b273ff34fce1", "checkpoints of older versions hold it"
    assert fingerprint_of({"a": {"x": 1, "y": 2}}) == fingerprint_of({"a": {"y": 2, "x": 1}})
    assert fingerprint_of({"a": [1, 2]}) != fingerprint_of({"a": [2, 1]})
