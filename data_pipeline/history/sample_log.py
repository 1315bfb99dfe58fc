"""What every step was fed, kept in the run folder and read back in milliseconds.

    StepBatch --on every rank--> segment of its lanes --merge--> steps-A-B.ledger --Ledger--> rows of a step

A segment is a file of a few hundred steps, whole or absent. It holds a row for each document (lane, data set, epoch,
sample, part, tokens, loss), the samples that were skipped, and the loader's integers after its last step: a snapshot to
replay from (``replay``) and to find a sample's step by (``sample_steps``). Steps are numbered as in ``metrics.jsonl``,
from 1, and a folder of a million of them is searched by file name. Not for: the content of a sample
(``sample_lookup``).

    magic | header: one line of JSON | sections, each deflated: state, skipped, one for each column of the rows

Columns are stored byte plane by byte plane, so that high bytes, which hardly change, take no room: five bytes
a document of a set of billions, and three more for its loss.
"""

from __future__ import annotations

import bisect
import json
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import LedgerError, StateError
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.columns import Column
from data_pipeline.io.untrusted import UntrustedError, open_regular, parse_json, read_bytes
from data_pipeline.order.state import LoaderState

_MAGIC = b"mmscale-ledger-1\n"
_NAME = re.compile(r"steps-(\d{10,})-(\d{10,})\.ledger")
_MAX_HEADER_BYTES = 1 << 16
_MAX_SECTION_BYTES = 1 << 31
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, zlib.error, StateError)
_HELD_SEGMENTS, _HELD_STATES = 8, 64
COLUMNS: dict[str, np.dtype[Any]] = {
    "step": np.dtype("<u4"),  # From the segment's first.
    "lane": np.dtype("<u4"),
    "dataset": np.dtype("<u2"),
    "epoch": np.dtype("<u4"),
    "sample": np.dtype("<i8"),
    "part": np.dtype("<u4"),
    "tokens": np.dtype("<u4"),
    "loss": np.dtype("<f4"),  # NaN: not logged, or nothing was learned.
}
"""What a row holds, in this order."""


class Row(NamedTuple):
    """One document of one step.

    Attributes:
        place: Its number in the pack, from 0; null documents, which close a pack, have no row.
        dataset: Name of the data set.
        sample: Its place in the manifest.
        part: Which part of its sample, if that was split.
        loss: Weighted mean over its tokens; None if it was not logged or nothing of it is learned.
    """

    step: int
    lane: int
    place: int
    dataset: str
    epoch: int
    sample: int
    part: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of some or all lanes.

    Attributes:
        first, last: Steps, both included.
        stage: Index of the stage they belong to.
        state: Of the loader after ``last``.
        rows: Columns, by step, lane and place.
        skipped: ``Skipped.record()`` of each sample that was left out, and its ``step``.
    """

    first: int
    last: int
    stage: int
    state: LoaderState
    rows: Mapping[str, Column]
    skipped: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def merge(cls, parts: Sequence[Segment]) -> Segment:
        """The segments of all ranks as one.

        Raises:
            StateError: they are of different steps, or two hold one lane.
        """
        if len({(part.first, part.last, part.stage) for part in parts}) != 1:
            raise StateError("ranks disagree about the steps of the ledger")
        rows = {name: np.concatenate([part.rows[name] for part in parts]) for name in COLUMNS}
        order = np.lexsort((rows["lane"], rows["step"]))  # Stable: places of a pack stay in order.
        skipped = [record for part in parts for record in part.skipped]
        return cls(
            parts[0].first,
            parts[0].last,
            parts[0].stage,
            LoaderState.merge([part.state for part in parts]),
            {name: column[order] for name, column in rows.items()},
            tuple(sorted(skipped, key=lambda record: (record["step"], record["lane"]))),
        )

    def of_step(self, step: int, lanes: Collection[int] | None = None) -> list[Row]:
        """The rows of a step, by lane and place; of ``lanes`` only, if given."""
        at = np.searchsorted(self.rows["step"], [step - self.first, step - self.first + 1])
        rows: list[Row] = []
        lane, place = -1, 0
        for number in range(*at.tolist()):
            place = place + 1 if self.rows["lane"][number] == lane else 0
            lane = int(self.rows["lane"][number])
            if lanes is None or lane in lanes:
                rows.append(self._row(number, place))
        return rows

    def of_sample(self, dataset: str, sample: int, epoch: int | None = None) -> list[Row]:
        """The rows of a sample, in one epoch or in any: one an epoch, or one of each part."""
        if dataset not in self.state.datasets:
            return []
        rows, number = self.rows, self.state.datasets.index(dataset)
        found = np.flatnonzero(
            (rows["sample"] == sample) & (rows["dataset"] == number) & ((epoch is None) | (rows["epoch"] == epoch))
        )
        return [self._row(at, self._place(at)) for at in found.tolist()]

    def _place(self, number: int) -> int:
        step, lane = self.rows["step"], self.rows["lane"]
        first = number
        while first and step[first - 1] == step[number] and lane[first - 1] == lane[number]:
            first -= 1
        return number - first

    def _row(self, number: int, place: int) -> Row:
        step, lane, dataset, epoch, sample, part, tokens = (int(self.rows[n][number]) for n in list(COLUMNS)[:-1])
        loss = float(self.rows["loss"][number])
        name = self.state.datasets[dataset]
        return Row(self.first + step, lane, place, name, epoch, sample, part, tokens, None if loss != loss else loss)

    def to_bytes(self) -> bytes:
        """The file; equal segments give equal bytes."""
        sections = {
            "state": self.state.to_json().encode(),
            "skipped": json.dumps([dict(record) for record in self.skipped]).encode(),
            **{name: _planes(self.rows[name].astype(kind)) for name, kind in COLUMNS.items()},
        }
        deflated = {name: zlib.compress(section) for name, section in sections.items()}
        header = {
            "first": self.first,
            "last": self.last,
            "stage": self.stage,
            "rows": len(self.rows["step"]),
            "sections": [[n, len(sections[n]), len(data), zlib.crc32(data)] for n, data in deflated.items()],
        }
        return b"".join([_MAGIC, json.dumps(header).encode(), b"\n", *deflated.values()])

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "the segment") -> Segment:
        """Reads ``to_bytes``.

        Raises:
            LedgerError: it is damaged.
        """
        try:
            return _parse(data)
        except _DAMAGE as error:
            raise LedgerError(f"{what}: damaged: {error}; the other segments of the folder can be read") from error

    def name(self) -> str:
        """What the file is called."""
        return f"steps-{self.first:010d}-{self.last:010d}.ledger"


def _planes(column: Column) -> bytes:
    return column.view(np.uint8).reshape(len(column), column.itemsize).T.tobytes()


def _from_planes(data: bytes, kind: np.dtype[Any], count: int) -> Column:
    planes = np.frombuffer(data, np.uint8).reshape(kind.itemsize, count)
    return np.ascontiguousarray(planes.T).view(kind).reshape(count)


def _parse(data: bytes) -> Segment:
    if not data.startswith(_MAGIC):
        raise ValueError("it does not begin like a segment")
    end = data.find(b"\n", len(_MAGIC), len(_MAGIC) + _MAX_HEADER_BYTES)
    if end < 0:
        raise ValueError("its header has no end")
    header = parse_json(bytes(data[len(_MAGIC) : end]))
    sections, start = {}, end + 1
    for name, size, deflated_bytes, crc32 in header["sections"]:
        sections[name] = _inflate(data[start : start + deflated_bytes], size, crc32, name)
        start += deflated_bytes
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes stand behind the last section")
    state = LoaderState.from_dict(parse_json(sections["state"]))
    rows = {name: _from_planes(sections[name], kind, header["rows"]) for name, kind in COLUMNS.items()}
    first, last, stage = (int(header[name]) for name in ("first", "last", "stage"))
    places = rows["step"].astype(np.int64)
    if not 0 < first <= last or np.any(places[1:] < places[:-1]) or np.any(places > last - first):
        raise ValueError(f"rows of other steps than {first} to {last}, or out of order")
    if np.any(rows["dataset"] >= len(state.datasets)):
        raise ValueError("a row of a data set that the state does not name")
    return Segment(first, last, stage, state, rows, tuple(parse_json(sections["skipped"])))


def _inflate(data: bytes, size: int, crc32: int, name: str) -> bytes:
    if zlib.crc32(data) != crc32:
        raise ValueError(f"the checksum of {name} is another one")
    if not 0 <= size <= _MAX_SECTION_BYTES:
        raise ValueError(f"{name} of {size} bytes")
    inflater = zlib.decompressobj()
    plain = inflater.decompress(data, max(1, size))
    if len(plain) != size or not inflater.eof:
        raise ValueError(f"{name} does not have the {size} bytes that it should")
    return plain


class Ledger:
    """The segments of a run folder.

    Args:
        folder: ``RUN/ledger``.

    Attributes:
        spans: First and last step of each segment, ascending.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else iter(())
        self.spans = sorted((int(name[1]), int(name[2])) for name in names if name is not None)
        self._held: dict[int, Segment] = {}
        self._states: dict[int, LoaderState] = {}

    @property
    def last_step(self) -> int:
        """The last step that is written down; 0 if there is none."""
        return self.spans[-1][1] if self.spans else 0

    def segment(self, number: int) -> Segment:
        """Reads a segment; the last few are held.

        Raises:
            LedgerError: it is damaged.
        """
        if number not in self._held:
            first, last = self.spans[number]
            path = self._path(number)
            try:
                segment = Segment.from_bytes(read_bytes(path, most_bytes=_MAX_SECTION_BYTES), str(path))
            except UntrustedError as error:
                raise LedgerError(f"{path}: {error}") from error
            except OSError as error:
                raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
            if (segment.first, segment.last) != (first, last):
                raise LedgerError(f"{path}: holds the steps {segment.first} to {segment.last}")
            self._held = dict([*self._held.items()][1 - _HELD_SEGMENTS :])
            self._held[number] = segment
        return self._held[number]

    def state(self, number: int) -> LoaderState:
        """The snapshot of a segment, without its rows.

        Raises:
            LedgerError: it is damaged.
        """
        if number not in self._states:
            self._states = dict([*self._states.items()][1 - _HELD_STATES :])
            self._states[number] = self.segment(number).state if number in self._held else self._read_state(number)
        return self._states[number]

    def _read_state(self, number: int) -> LoaderState:
        path = self._path(number)
        try:
            with open_regular(path) as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise ValueError("it does not begin like a segment")
                name, size, deflated_bytes, crc32 = parse_json(file.readline(_MAX_HEADER_BYTES))["sections"][0]
                plain = _inflate(file.read(min(deflated_bytes, _MAX_SECTION_BYTES)), size, crc32, name)
            return LoaderState.from_json(plain.decode())
        except OSError as error:
            raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
        except _DAMAGE as error:
            raise LedgerError(f"{path}: damaged: {error}") from error

    def _path(self, number: int) -> Path:
        first, last = self.spans[number]
        return self.folder / f"steps-{first:010d}-{last:010d}.ledger"

    def number_of(self, step: int) -> int | None:
        """Which segment holds a step; None if none does."""
        number = bisect.bisect_right(self.spans, (step, 2**63)) - 1
        return number if number >= 0 and step <= self.spans[number][1] else None

    def snapshot(self, step: int) -> Segment | None:
        """The last segment that ends at ``step`` or before."""
        number = bisect.bisect_right([last for _, last in self.spans], step) - 1
        return self.segment(number) if number >= 0 else None


def write_segment(folder: Path, segment: Segment) -> Path:
    """Writes a segment, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / segment.name()
    write_whole(path, segment.to_bytes())
    return path


def cut_back(folder: Path, step: int) -> None:
    """Removes what lies behind ``step``: those steps are done again. A segment that reaches over it goes wholly.

    What a killed process was writing goes too.

    Checkpoints are made where segments end, so one reaches over only if somebody moved a checkpoint from elsewhere.
    """
    for first, last in Ledger(folder).spans:
        if last > step:
            (folder / f"steps-{first:010d}-{last:010d}.ledger").unlink()
    for partial in folder.glob(".steps-*.partial"):
        partial.unlink()
