"""Where a loader stands: a fingerprint of what decides the order, and a few integers per lane.

A lane's integers: the number d of data sets, for each of them draws and cursor, the mixture's phase and which data sets
are used up, the number of waiting documents and for each its place, then the counters of the fault policy. Ranks and
workers do not occur, so a state re-deals to any number of either; nothing is a list of what was seen, so it is as small
at sample 10^10 as at the start.
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
        """The layout that the module describes."""
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
        """Reads the layout back.

        Raises:
            StateError: too few integers, or not integers, or negative ones.
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
        lanes: Integers of each lane.
        datasets: Names of the data sets, in the order that the lanes' integers follow.
    """

    fingerprint: str
    step: int
    lanes: dict[int, list[int]]
    datasets: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them back."""
        lanes = {str(lane): self.lanes[lane] for lane in sorted(self.lanes)}
        head = {"fingerprint": self.fingerprint, "step": self.step, "datasets": list(self.datasets)}
        return {**head, "lanes": lanes}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LoaderState:
        """Reads ``to_dict``.

        Raises:
            StateError: the record is no loader state.
        """
        try:
            fingerprint, step, names = record["fingerprint"], record["step"], record["datasets"]
            lanes = {int(lane): list(integers) for lane, integers in record["lanes"].items()}
            if type(fingerprint) is not str or not _is_counts([step, *lanes]):
                raise TypeError("the fingerprint must be a text, step and lanes integers from 0 up")
            if type(names) is not list or not all(type(name) is str for name in names):
                raise TypeError("datasets must be a list of names")
            for lane, integers in lanes.items():
                if not _is_counts(integers):
                    raise TypeError(f"lane {lane} must hold integers from 0 up, got {integers[:8]}")
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
        lanes: dict[int, list[int]] = {}
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
        """The states of ``lanes`` for a loader with the data sets ``datasets``; ``check`` comes first."""
        return {lane: LaneState.from_integers(self.lanes[lane]).among(self.datasets, datasets) for lane in lanes}

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
