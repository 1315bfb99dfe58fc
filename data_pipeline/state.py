"""Where a loader stands: a fingerprint of what decides the order, and a few integers per lane.

A lane's integers are ``[d, draws_1, epoch_1, window_1, offset_1, ..., draws_d, ..., done_1, done_2, ...]``: for each of
d data sets the draws and the cursor at the document that waits longest, then the following ordinals that are done.
Ranks and workers do not occur, so a state re-deals to any number of either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.config import DataConfig
from data_pipeline.errors import StateError
from data_pipeline.lanes import Cursor
from data_pipeline.media_spec import MediaSpec


class StreamPosition(NamedTuple):
    """Where the next sample of a lane comes from."""

    draws: tuple[int, ...]
    cursors: tuple[Cursor, ...]

    @classmethod
    def start(cls, num_datasets: int) -> StreamPosition:
        """Before the first sample."""
        return cls((0,) * num_datasets, (Cursor(),) * num_datasets)


class LaneState(NamedTuple):
    """A packer's state: a position, and which ordinals after it are done."""

    position: StreamPosition
    done: tuple[int, ...] = ()

    def to_integers(self) -> list[int]:
        """The layout that the module describes."""
        flat = [len(self.position.draws)]
        for draws, cursor in zip(self.position.draws, self.position.cursors, strict=True):
            flat.extend((draws, *cursor))
        return [*flat, *self.done]

    @classmethod
    def from_integers(cls, integers: Sequence[int]) -> LaneState:
        """Reads the layout back.

        Raises:
            StateError: too few integers, or not integers, or negative ones.
        """
        if not integers or any(type(number) is not int or number < 0 for number in integers):
            raise StateError(f"a lane's state must be integers from 0 up, got {list(integers)[:8]}")
        count, numbers = integers[0], integers[1:]
        if len(numbers) < 4 * count:
            raise StateError(f"a lane's state of {count} data sets needs {4 * count} integers, got {len(numbers)}")
        rows = [numbers[4 * i : 4 * i + 4] for i in range(count)]
        position = StreamPosition(tuple(row[0] for row in rows), tuple(Cursor(*row[1:]) for row in rows))
        return cls(position, tuple(numbers[4 * count :]))


@dataclass(frozen=True)
class LoaderState:
    """State of some or all lanes after a step.

    Attributes:
        fingerprint: What decides the order, ``part:hash`` joined by spaces.
        step: Steps done; the next batch has this number.
        lanes: Integers of each lane.
    """

    fingerprint: str
    step: int
    lanes: dict[int, list[int]]

    def to_json(self) -> str:
        """One line; ``from_json`` reads it back."""
        lanes = {str(lane): self.lanes[lane] for lane in sorted(self.lanes)}
        return json.dumps({"fingerprint": self.fingerprint, "step": self.step, "lanes": lanes})

    @classmethod
    def from_json(cls, text: str) -> LoaderState:
        """Reads ``to_json``.

        Raises:
            StateError: the text is no loader state.
        """
        try:
            record = json.loads(text)
            lanes = {int(lane): list(integers) for lane, integers in record["lanes"].items()}
            return cls(str(record["fingerprint"]), int(record["step"]), lanes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"no loader state: {error!r}") from error

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
            if (state.step, state.fingerprint) != (states[0].step, states[0].fingerprint):
                raise StateError(f"ranks disagree: step {state.step} and step {states[0].step}, or other data")
            twice = sorted(lanes.keys() & state.lanes.keys())
            if twice:
                raise StateError(f"two ranks hold lane {twice[0]}")
            lanes.update(state.lanes)
        return cls(states[0].fingerprint, states[0].step, lanes)

    def check(self, fingerprint: str, lanes: Sequence[int]) -> None:
        """Refuses a state that belongs to another order.

        Raises:
            StateError: names each part that differs, or a lane that is missing.
        """
        mine, theirs = _parts(fingerprint), _parts(self.fingerprint)
        changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if changed:
            raise StateError(
                f"the saved data position does not fit this run: changed since: {', '.join(changed)}; "
                "put them back, or start a new run"
            )
        missing = [lane for lane in lanes if lane not in self.lanes]
        if missing:
            raise StateError(f"the saved data position lacks lane {missing[0]}: was a rank's part of it lost?")


def _parts(fingerprint: str) -> dict[str, str]:
    return dict(part.rpartition(":")[::2] for part in fingerprint.split())


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(config: DataConfig, spec: MediaSpec, seed: int, manifests: Mapping[str, str], tokenizer: str) -> str:
    """Hash of everything that decides which sample sits where; ranks, workers and prefetch are not in it.

    Args:
        config: The data block.
        spec: The model's side: patch counts decide what fits into a pack.
        seed: Seed of the run.
        manifests: Fingerprint of the manifest of each data set.
        tokenizer: Fingerprint of the tokenizer.
    """
    parts: dict[str, object] = {
        "seed": seed,
        "lanes": config.lanes,
        "order": config.order.model_dump(mode="json"),
        "packing": config.packing.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "model.media": repr(spec),
        "datasets": [(dataset.name, dataset.weight) for dataset in config.datasets],
    }
    for dataset in config.datasets:
        parts[f"{dataset.name}.manifest"] = manifests[dataset.name]
        parts[f"{dataset.name}.template"] = dataset.template.model_dump(mode="json")
        parts[f"{dataset.name}.transforms"] = dataset.transforms.model_dump(mode="json")
    return " ".join(f"{name}:{_hash(value)}" for name, value in parts.items())
