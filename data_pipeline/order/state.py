"""The position of a loader: a fingerprint of the settings that determine the order, and a small state per lane.

In JSON a lane is a list of integers:

    number of data sets | draws and cursor of each (4 integers) | phase of the mixture | bit mask of exhausted data sets
    | number of waiting documents | each as ``Drawn`` (4 integers) | counters of the fault policy

A state contains neither ranks nor workers, so it can be loaded with any number of either. It contains no list of the
samples that were read, so its size does not grow during a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.errors import StateError
from data_pipeline.io.untrusted import UntrustedError, parse_json


def _is_counts(values: Sequence[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


class Cursor(NamedTuple):
    """A position in one lane of one data set. Later positions are greater.

    The meaning of the fields depends on the source (``lanes``, ``front_to_back``, ``user_pipeline``).
    """

    epoch: int = 0
    window: int = 0
    offset: int = 0


class SamplePosition(NamedTuple):
    """The sample at a cursor, and its epoch."""

    sample: int
    epoch: int


class StreamPosition(NamedTuple):
    """The position of a lane in the mixture.

    Attributes:
        draws: Number of samples drawn from each data set in this phase of the mixture.
        cursors: Position in each data set.
        phase: Number of the phase of the schedule.
        exhausted: Bit mask; bit i is set if data set i has reached its ``max_epochs``.
    """

    draws: tuple[int, ...]
    cursors: tuple[Cursor, ...]
    phase: int = 0
    exhausted: int = 0

    @classmethod
    def start(cls, num_datasets: int) -> StreamPosition:
        """Return the position before the first sample."""
        return cls((0,) * num_datasets, (Cursor(),) * num_datasets)


class Drawn(NamedTuple):
    """A drawn document: data set, epoch, sample, and the number of its part if the sample was split."""

    dataset: int
    epoch: int
    sample: int
    part: int = 0


class LaneState(NamedTuple):
    """A lane between two packs.

    Attributes:
        position: Position of the next sample.
        waiting: Documents that were drawn but not packed yet, oldest first.
        faults: Counters of ``FaultPolicy.state``.
    """

    position: StreamPosition
    waiting: tuple[Drawn, ...] = ()
    faults: tuple[int, ...] = ()

    def to_integers(self) -> list[int]:
        """Return the integers of the JSON form, in the layout of the module's docstring."""
        position = self.position
        flat = [len(position.draws)]
        for draws, cursor in zip(position.draws, position.cursors, strict=True):
            flat.extend((draws, *cursor))
        flat.extend((position.phase, position.exhausted, len(self.waiting)))
        for drawn in self.waiting:
            flat.extend(drawn)
        return [*flat, *self.faults]

    @classmethod
    def from_integers(cls, integers: Sequence[int]) -> LaneState:
        """Read what ``to_integers`` returned.

        Raises:
            StateError: the list is too short, contains a value that is not an integer >= 0, or contains a waiting
                document of a data set that the lane does not have.
        """
        if not integers or not _is_counts(integers):
            raise StateError(f"a lane's state must be integers from 0 up, got {list(integers)[:8]}")
        count, rest = integers[0], integers[1:]
        if len(rest) < 4 * count + 3 or len(rest) < 4 * count + 3 + 4 * rest[4 * count + 2]:
            raise StateError(f"a lane's state of {count} data sets is cut short: {len(integers)} integers")
        rows = [rest[4 * i : 4 * i + 4] for i in range(count)]
        phase, exhausted, num_waiting = rest[4 * count : 4 * count + 3]
        position = StreamPosition(
            tuple(row[0] for row in rows), tuple(Cursor(*row[1:]) for row in rows), phase, exhausted
        )
        rest = rest[4 * count + 3 :]
        waiting = tuple(Drawn(*rest[4 * i : 4 * i + 4]) for i in range(num_waiting))
        if any(drawn.dataset >= count for drawn in waiting):
            largest = max(drawn.dataset for drawn in waiting)
            raise StateError(f"a lane's state of {count} data sets contains a document of data set number {largest}")
        return cls(position, waiting, tuple(rest[4 * num_waiting :]))

    def for_datasets(self, old: Sequence[str], new: Sequence[str]) -> LaneState:
        """Return the state for another list of data sets. A data set that is not in ``old`` starts at its beginning.

        Args:
            old: Names of the data sets of this state, in order.
            new: Names of the data sets of the result, in order. It must contain the data sets of waiting documents.
        """
        if tuple(old) == tuple(new):
            return self
        position = self.position
        old_number = {name: i for i, name in enumerate(old)}
        new_number = {old_number[name]: i for i, name in enumerate(new) if name in old_number}
        moved = StreamPosition(
            tuple(position.draws[old_number[name]] if name in old_number else 0 for name in new),
            tuple(position.cursors[old_number[name]] if name in old_number else Cursor() for name in new),
            position.phase,
            sum(1 << new_number[i] for i in new_number if position.exhausted >> i & 1),
        )
        return LaneState(moved, tuple(d._replace(dataset=new_number[d.dataset]) for d in self.waiting), self.faults)


@dataclass(frozen=True)
class LoaderState:
    """The state of some or all lanes after a step.

    Attributes:
        fingerprint: Hashes of the settings that determine the order: ``name:hash`` pairs joined by spaces.
        step: Number of steps done; the next batch has this number.
        lanes: State of each lane.
        datasets: Names of the data sets, in the order of the lanes' draws and cursors.
    """

    fingerprint: str
    step: int
    lanes: dict[int, LaneState]
    datasets: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; ``from_dict`` reads them."""
        lanes = {str(lane): self.lanes[lane].to_integers() for lane in sorted(self.lanes)}
        head = {"fingerprint": self.fingerprint, "step": self.step, "datasets": list(self.datasets)}
        return {**head, "lanes": lanes}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LoaderState:
        """Read what ``to_dict`` returned.

        Raises:
            StateError: the record is not a loader state.
        """
        try:
            fingerprint, step, names = record["fingerprint"], record["step"], record["datasets"]
            integers = {int(lane): list(values) for lane, values in record["lanes"].items()}
            if type(fingerprint) is not str or not _is_counts([step, *integers]):
                raise TypeError("the fingerprint must be a text, step and lanes integers from 0 up")
            if type(names) is not list or not all(type(name) is str for name in names):
                raise TypeError("datasets must be a list of names")
            lanes: dict[int, LaneState] = {}
            for lane, values in integers.items():
                try:
                    lanes[lane] = LaneState.from_integers(values)
                except StateError as error:
                    raise StateError(f"no loader state: lane {lane}: {error}") from error
                if len(lanes[lane].position.draws) != len(names):
                    raise TypeError(f"lane {lane} holds {values[0]} data sets, but {len(names)} are named")
            return cls(fingerprint, step, lanes, tuple(names))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise StateError(f"no loader state: {error!r:.200}") from error

    def to_json(self) -> str:
        """Return one line of JSON; ``from_json`` reads it."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LoaderState:
        """Read what ``to_json`` returned.

        Raises:
            StateError: the text is not a loader state.
        """
        try:
            record = parse_json(text)
        except UntrustedError as error:
            raise StateError(f"no loader state: {error}") from error
        return cls.from_dict(record)

    @classmethod
    def merge(cls, states: Sequence[LoaderState]) -> LoaderState:
        """Return one state with the lanes of all ranks.

        Raises:
            StateError: there is no state, the states differ in step or fingerprint, or two contain the same lane.
        """
        if not states:
            raise StateError("no loader state to merge")
        lanes: dict[int, LaneState] = {}
        for state in states:
            if state.head != states[0].head:
                raise StateError(f"ranks disagree: step {state.step} and step {states[0].step}, or other data")
            twice = sorted(lanes.keys() & state.lanes.keys())
            if twice:
                raise StateError(f"two ranks hold lane {twice[0]}")
            lanes.update(state.lanes)
        return cls(states[0].fingerprint, states[0].step, lanes, states[0].datasets)

    @property
    def head(self) -> tuple[str, int, tuple[str, ...]]:
        """Fingerprint, step and data sets, which are equal on all ranks after a step."""
        return self.fingerprint, self.step, self.datasets

    def lane_states(self, lanes: Sequence[int], datasets: Sequence[str]) -> dict[int, LaneState]:
        """Return the states of ``lanes`` for a loader with the data sets ``datasets``. Call ``check`` first."""
        return {lane: self.lanes[lane].for_datasets(self.datasets, datasets) for lane in lanes}

    def check(self, fingerprint: str, lanes: Sequence[int]) -> None:
        """Check that the state fits a loader with this fingerprint and these lanes.

        Raises:
            StateError: the message names each part of the fingerprint that differs, or a missing lane.
        """
        mine, theirs = _parts(fingerprint), _parts(self.fingerprint)
        changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if changed:
            follows = " (model.media follows from the model block)" if "model.media" in changed else ""
            raise StateError(
                f"the saved data position does not fit this run: changed since: {', '.join(changed)}{follows}; "
                "put them back, or start a new run"
            )
        missing = [lane for lane in lanes if lane not in self.lanes]
        if missing:
            raise StateError(f"the saved data position lacks lane {missing[0]}: was a rank's part of it lost?")

    def changed(self, parts: Mapping[str, object]) -> list[str]:
        """Return the names of ``parts`` whose hash in this state's fingerprint differs.

        Parts that the fingerprint does not contain are ignored.
        """
        theirs = _parts(self.fingerprint)
        mine = _parts(fingerprint_of(parts))
        return sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])


def _parts(fingerprint: str) -> dict[str, str]:
    return dict(part.rpartition(":")[::2] for part in fingerprint.split())


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_of(parts: Mapping[str, object]) -> str:
    """Return a string of named hashes, so that an error message can name the parts that changed."""
    return " ".join(f"{name}:{_hash(value)}" for name, value in parts.items())
