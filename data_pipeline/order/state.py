"""The position of a loader: a fingerprint of the settings that determine the order, and a small state per lane.

In JSON a lane is a list of integers: the number of data sets; the draws and cursor of each; the mixture's phase; a bit
mask of the exhausted data sets; the number of waiting documents; the location of each; the fault policy's counters.

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
    """A place in one lane of one data set."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


class Place(NamedTuple):
    """What a cursor points at."""

    sample: int
    epoch: int


class StreamPosition(NamedTuple):
    """Where the next sample of a lane comes from.

    ``draws`` counts those of the phase; bit i of ``exhausted`` says that data set i gave all its epochs.
    """

    draws: tuple[int, ...]
    cursors: tuple[Cursor, ...]
    phase: int = 0
    exhausted: int = 0

    @classmethod
    def start(cls, num_datasets: int) -> StreamPosition:
        """Before the first sample."""
        return cls((0,) * num_datasets, (Cursor(),) * num_datasets)


class Drawn(NamedTuple):
    """A document that was drawn: data set, epoch, sample, and which part of a sample that was split."""

    dataset: int
    epoch: int
    sample: int
    part: int = 0


class LaneState(NamedTuple):
    """A lane between two packs: where it draws next, what it drew and did not pack yet, and its fault counters."""

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
            StateError: the list is too short, or contains a value that is not an integer >= 0.
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
            raise StateError(f"a lane's state of {count} data sets holds a document of number {waiting[0].dataset}")
        return cls(position, waiting, tuple(rest[4 * num_waiting :]))

    def among(self, old: Sequence[str], new: Sequence[str]) -> LaneState:
        """The same state where the data sets ``old`` have become ``new``: those added start at their beginning."""
        if tuple(old) == tuple(new):
            return self
        position = self.position
        at = {name: i for i, name in enumerate(old)}
        place = {at[name]: i for i, name in enumerate(new) if name in at}
        moved = StreamPosition(
            tuple(position.draws[at[name]] if name in at else 0 for name in new),
            tuple(position.cursors[at[name]] if name in at else Cursor() for name in new),
            position.phase,
            sum(1 << place[i] for i in place if position.exhausted >> i & 1),
        )
        return LaneState(moved, tuple(d._replace(dataset=place[d.dataset]) for d in self.waiting), self.faults)


@dataclass(frozen=True)
class LoaderState:
    """State of some or all lanes after a step.

    Attributes:
        fingerprint: What decides the order, ``part:hash`` joined by spaces.
        step: Steps done; the next batch has this number.
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
        """One line; ``from_json`` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LoaderState:
        """Reads ``to_json``.

        Raises:
            StateError: the text is no loader state.
        """
        try:
            record = parse_json(text)
        except UntrustedError as error:
            raise StateError(f"no loader state: {error}") from error
        return cls.from_dict(record)

    @classmethod
    def merge(cls, states: Sequence[LoaderState]) -> LoaderState:
        """The lanes of several ranks in one state.

        Raises:
            StateError: the states are of different steps or data, two hold one lane, or there is none.
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
        """What the states of all ranks after one step have in common."""
        return self.fingerprint, self.step, self.datasets

    def lane_states(self, lanes: Sequence[int], datasets: Sequence[str]) -> dict[int, LaneState]:
        """Return the states of ``lanes`` for a loader with the data sets ``datasets``. Call ``check`` first."""
        return {lane: self.lanes[lane].among(self.datasets, datasets) for lane in lanes}

    def check(self, fingerprint: str, lanes: Sequence[int]) -> None:
        """Refuses a state that belongs to another order.

        Raises:
            StateError: names each part that differs, or a lane that is missing.
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
        """Names of those parts of the fingerprint that this state knows with another value."""
        theirs = _parts(self.fingerprint)
        mine = _parts(fingerprint_of(parts))
        return sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])


def _parts(fingerprint: str) -> dict[str, str]:
    return dict(part.rpartition(":")[::2] for part in fingerprint.split())


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_of(parts: Mapping[str, object]) -> str:
    """One string of named hashes, so that what changed can be named."""
    return " ".join(f"{name}:{_hash(value)}" for name, value in parts.items())
