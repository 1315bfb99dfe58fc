"""The integers of a lane, and their conversion to another list of data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.errors import StateError
from data_pipeline.io.strict import StrictConfig
from data_pipeline.loader.fingerprint import _original_dump, fingerprint, schedule_of
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.state import (
    Cursor,
    Drawn,
    LaneState,
    LoaderState,
    StreamPosition,
    fingerprint_of,
)
from tests.data_pipeline.lane_states import toy_lane

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
    with pytest.raises(StateError, match="of 2 data sets contains a document of data set number"):
        LaneState.from_integers(bad)


@given(lane_states(), st.data())
def test_data_sets_keep_their_places_by_name(state: LaneState, data: st.DataObject) -> None:
    old = list("abcd"[: len(state.position.draws)])
    new = data.draw(st.permutations([*old, *data.draw(st.lists(st.sampled_from("xyz"), unique=True))]))
    moved = state.for_datasets(old, new)
    assert state.for_datasets(old, old) == state
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
    moved = state.for_datasets(["a", "b", "c"], ["c", "a"])
    assert moved == LaneState(StreamPosition((7, 5), (cursors[2], cursors[0]), 1, 0b01), (Drawn(0, 1, 4),), (9,))


def loader_state(lanes: dict[int, LaneState], **changes: Any) -> LoaderState:
    values = {"fingerprint": fingerprint_of({"seed": 1, "a.manifest": "x"}), "step": 4, "datasets": ("a", "b")}
    return LoaderState(lanes=lanes, **{**values, **changes})


def test_the_states_of_ranks_are_merged_if_they_are_of_one_moment() -> None:
    lanes = [toy_lane(number, datasets=2) for number in range(3)]
    one, two = loader_state({0: lanes[0], 2: lanes[2]}), loader_state({1: lanes[1]})
    merged = LoaderState.merge([one, two])
    assert merged == loader_state(dict(enumerate(lanes)))
    assert list(json.loads(merged.to_json())["lanes"]) == ["0", "1", "2"]
    assert LoaderState.from_json(LoaderState.merge([two, one]).to_json()) == merged
    assert LoaderState.merge([one]) == one
    assert LoaderState.from_json(one.to_json()).datasets == ("a", "b")
    for change in ({"step": 5}, {"fingerprint": "seed:0"}, {"datasets": ("b", "a")}):
        with pytest.raises(StateError, match="ranks disagree"):
            LoaderState.merge([one, loader_state({1: lanes[1]}, **change)])
    with pytest.raises(StateError, match="two ranks hold lane 2"):
        LoaderState.merge([one, loader_state({3: lanes[0], 2: lanes[2]})])
    with pytest.raises(StateError, match="no loader state to merge"):
        LoaderState.merge([])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": "", "step": "x", "datasets": [], "lanes": {}}'])
def test_a_text_that_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(StateError, match="no loader state: "):
        LoaderState.from_json(text)


def test_the_lanes_of_a_loader_are_read_in_the_order_of_its_data_sets() -> None:
    start = StreamPosition.start(2)
    assert start == ((0, 0), (Cursor(0, 0, 0), Cursor(0, 0, 0)), 0, 0)
    lanes = [LaneState(StreamPosition((n, 9), start.cursors), (Drawn(1, 0, n),), (4,)) for n in range(3)]
    state = loader_state(dict(enumerate(lanes)))
    assert state.lane_states([2, 0], ["a", "b"]) == {0: lanes[0], 2: lanes[2]}
    turned = LaneState(StreamPosition((9, 1), start.cursors), (Drawn(0, 0, 1),), (4,))
    assert state.lane_states([1], ["b", "a"]) == {1: turned}


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


DATASET_A = {"name": "a", "manifest": "a.manifest", "weight": 2.0, "template": {"kind": "caption"}, "max_epochs": 3}
DATASET_B = {
    "name": "b",
    "shards": ["x-{0..3}.tar"],
    "weight": [{"from_step": 10, "weight": 0.5}],
    "template": {"kind": "text"},
}
DATA = {
    "tokenizer": {"kind": "tokenizers", "path": "t.json"},
    "lanes": 4,
    "packing": {"max_tokens": 64},
    "datasets": [DATASET_A, DATASET_B],
}
SPEC = MediaSpec(Placement.EMBEDDING)
FIRST_STEPS = {
    "seed": "ef2d127de37b942b",
    "lanes": "4b227777d4dd1fc6",
    "order": "f94a70678d8caaca",
    "packing": "535874692a9b629b",
    "tokenizer": "185947a6316518ac",
    "model.media": "3d699351b864203e",
    "datasets": "0eb5b8d6f81bc677",
    "weights": "6df6ccbd2c1706f3",
    "a.manifest": "1f39ecf72d9e8782",
    "a.shards": "4f53cda18c2baa0c",
    "a.max_epochs": "4e07408562bedb8b",
    "a.template": "2644b005647c4e97",
    "a.transforms": "c394c8a171176092",
}
"""The fingerprint in checkpoints of version 1. With another value they could not be resumed."""
LATER_STEPS = {
    **FIRST_STEPS,
    "datasets": "3554d2b8a1e34099",
    "weights": "e28ff90cef4460d4",
    "b.manifest": "74234e98afe7498f",
    "b.shards": "e34c2ff38cf20ec2",
    "b.max_epochs": "74234e98afe7498f",
    "b.template": "c1a874b8c1551255",
    "b.transforms": "c394c8a171176092",
}


def _hashes(step: int, data: dict[str, Any], spec: MediaSpec = SPEC, **given: Any) -> dict[str, str]:
    config = DataConfig.model_validate(data)
    values = {"seed": 5, "manifests": {"a": "m1"}, "tokenizer": "tok", "schedule": schedule_of(config, {}), **given}
    return dict(part.split(":") for part in fingerprint(config, spec, step=step, **values).split())


@pytest.mark.parametrize(("step", "expected"), [(0, FIRST_STEPS), (10, FIRST_STEPS), (11, LATER_STEPS)])
def test_the_fingerprint_of_a_configuration_is_that_of_older_checkpoints(step: int, expected: dict[str, str]) -> None:
    assert _hashes(step, DATA) == expected
    # A data set that has not been drawn yet may be changed or removed.
    later = {**DATA, "datasets": [DATASET_A, {**DATASET_B, "max_epochs": 7}]}
    assert (_hashes(step, later) == expected) == (step <= 10)
    assert (_hashes(step, {**DATA, "datasets": [DATASET_A]}) == expected) == (step <= 10)
    # A data set that is drawn from step 1 on is part of the fingerprint after step 1.
    soon = {**DATA, "datasets": [DATASET_A, {**DATASET_B, "weight": [{"from_step": 1, "weight": 0.5}]}]}
    assert [_hashes(step, soon)["datasets"] == FIRST_STEPS["datasets"] for step in (0, 1, 2)] == [True, True, False]


def test_later_keys_change_no_fingerprint_at_their_default() -> None:
    media = {"video": {}, "audio": {}, "image_tokens": {"codebook_size": 8, "first_id": 5}}
    found = _hashes(1, {**DATA, "datasets": [{**DATASET_A, "template": {"kind": "dialogue"}, **media}]})
    assert {name: found[f"a.{name}"] for name in ("template", *media)} == {
        "template": "d72a73732068ef4e",
        "video": "e37c5703cb39c8fa",
        "audio": "9b369f755fa33928",
        "image_tokens": "ed738adfb7432e80",
    }


def test_each_part_of_the_fingerprint_is_named_after_what_it_hashes(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"dataset": "a", "index": 3, "key": "k", "kind": "image"}))

    def changed(spec: MediaSpec = SPEC, given: Any = None, **data: Any) -> set[str]:
        found = _hashes(11, {**DATA, **data}, spec, **(given or {}))
        return {name for name in found.keys() | LATER_STEPS.keys() if found.get(name) != LATER_STEPS.get(name)}

    def datasets(**values: Any) -> list[Any]:
        return [{**DATASET_A, **values}, DATASET_B]

    assert changed() == set()
    assert changed(lanes=8) == {"lanes"}
    assert changed(packing={"max_tokens": 65}) == {"packing"}
    assert changed(order={"window_blocks": 9}) == {"order"}
    assert changed(MediaSpec(Placement.HYBRID)) == {"model.media"}
    assert changed(given={"seed": 6}) == {"seed"}
    assert changed(given={"tokenizer": "other"}) == {"tokenizer"}
    assert changed(given={"manifests": {"a": "m2"}}) == {"a.manifest"}
    assert changed(datasets=datasets(weight=3.0)) == {"weights"}
    assert changed(datasets=datasets(manifest="elsewhere/a.manifest")) == set()
    assert changed(datasets=datasets(template={"kind": "text"})) == {"a.template"}
    assert changed(datasets=datasets(max_text_bytes=9)) == {"a.max_text_bytes"}
    assert changed(datasets=[DATASET_B, DATASET_A]) == {"datasets", "weights"}
    assert changed(faults={"exclude": [str(tmp_path / "list.jsonl")]}) == {"faults.exclude"}
    assert changed(faults={"on_error": "fail"}) == set()


def test_a_later_key_is_one_place_and_not_one_name() -> None:
    class Block(StrictConfig):
        images: str = "optional"
        max_text_bytes: int = 5

    class Other(Block):
        template: Block = Block()
        transforms: Block = Block()

    kept = _original_dump(Other(), Other().model_dump())
    assert kept == {
        "images": "optional",
        "template": {"max_text_bytes": 5},
        "transforms": {"images": "optional", "max_text_bytes": 5},
    }
    changed = Other(max_text_bytes=6, template=Block(images="required"))
    assert _original_dump(changed, changed.model_dump()) == changed.model_dump()
