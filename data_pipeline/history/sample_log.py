"""The sample log of a run: the samples of every step, in the run folder.

    StepBatch --on every rank--> segment of its lanes --merge--> steps-A-B.samples --SampleLog--> rows of a step

A segment is a file of a few hundred steps, written atomically. It contains a row for each document (lane, data set,
epoch, sample, part, tokens, loss), the samples that were skipped, and the state of the loader after its last step (a
snapshot). A replay starts from a snapshot (``replay``), and ``sample_steps`` uses snapshots to find the steps of a
sample. Steps are numbered from 1, as in ``metrics.jsonl``; the segment of a step is found by file name. Reading takes
milliseconds. Not for: the content of a sample (``sample_lookup``).

    magic | header: one line of JSON | sections, each deflated: state, skipped, one for each column of the rows

A column is stored as byte planes: first the lowest bytes of all values, then the next ones. High bytes hardly change
and compress well: even in a data set of billions of samples, a row takes five bytes, and its loss three more.
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

from data_pipeline.errors import SampleLogError, StateError
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.columns import Column
from data_pipeline.io.untrusted import UntrustedError, open_regular, parse_json, read_bytes
from data_pipeline.order.state import LoaderState

_MAGIC = b"mmscale-sample log-1\n"
_NAME = re.compile(r"steps-(\d{10,})-(\d{10,})\.samples")
_MAX_HEADER_BYTES = 1 << 16
_MAX_SECTION_BYTES = 1 << 31
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, zlib.error, StateError)
_CACHED_SEGMENTS, _CACHED_STATES = 8, 64
COLUMNS: dict[str, np.dtype[Any]] = {
    "step": np.dtype("<u4"),  # Counted from the segment's first step.
    "lane": np.dtype("<u4"),
    "dataset": np.dtype("<u2"),
    "epoch": np.dtype("<u4"),
    "sample": np.dtype("<i8"),
    "part": np.dtype("<u4"),
    "tokens": np.dtype("<u4"),
    "loss": np.dtype("<f4"),  # NaN: not logged, or no token was learned.
}
"""Columns of the rows, in the order of the file."""


class LogRow(NamedTuple):
    """One document of one step, as logged.

    Attributes:
        step: Number of the step, from 1.
        lane: Lane of the pack.
        place: Position of the document in its pack, from 0. Dummy documents have no row.
        dataset: Name of the data set.
        epoch: Epoch of the data set, from 0.
        sample: Number of the sample in the data set.
        part: Number of the part if the sample was split, else 0.
        tokens: Number of tokens.
        loss: Weighted mean loss over its tokens; None if it was not logged or no token is learned.
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
class LogSegment:
    """A segment of the sample log: consecutive steps of some or all lanes.

    Attributes:
        first, last: First and last step, both included.
        stage: Index of the training stage.
        state: State of the loader after ``last``.
        rows: Columns (``COLUMNS``) of the rows, sorted by step, lane and position in the pack.
        skipped: ``Skipped.record()`` of each skipped sample, with the ``step`` in which it was skipped.
    """

    first: int
    last: int
    stage: int
    state: LoaderState
    rows: Mapping[str, Column]
    skipped: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def merge(cls, parts: Sequence[LogSegment]) -> LogSegment:
        """Merge the segments of all ranks.

        Raises:
            StateError: the segments differ in steps, stage or fingerprint, or two of them contain the same lane.
        """
        if len({(part.first, part.last, part.stage) for part in parts}) != 1:
            raise StateError("the ranks' segments of the sample log have different steps")
        rows = {name: np.concatenate([part.rows[name] for part in parts]) for name in COLUMNS}
        order = np.lexsort((rows["lane"], rows["step"]))  # Stable: keeps the order of the documents in a pack.
        skipped = [record for part in parts for record in part.skipped]
        return cls(
            parts[0].first,
            parts[0].last,
            parts[0].stage,
            LoaderState.merge([part.state for part in parts]),
            {name: column[order] for name, column in rows.items()},
            tuple(sorted(skipped, key=lambda record: (record["step"], record["lane"]))),
        )

    def rows_of_step(self, step: int, lanes: Collection[int] | None = None) -> list[LogRow]:
        """Return the rows of a step, sorted by lane and position; only those of ``lanes`` if given."""
        bounds = np.searchsorted(self.rows["step"], [step - self.first, step - self.first + 1])
        rows: list[LogRow] = []
        lane, place = -1, 0
        for number in range(*bounds.tolist()):
            place = place + 1 if self.rows["lane"][number] == lane else 0
            lane = int(self.rows["lane"][number])
            if lanes is None or lane in lanes:
                rows.append(self._row(number, place))
        return rows

    def rows_of_sample(self, dataset: str, sample: int, epoch: int | None = None) -> list[LogRow]:
        """Return the rows of a sample in one epoch, or in all epochs: one row per epoch and part."""
        if dataset not in self.state.datasets:
            return []
        rows, number = self.rows, self.state.datasets.index(dataset)
        found = np.flatnonzero(
            (rows["sample"] == sample) & (rows["dataset"] == number) & ((epoch is None) | (rows["epoch"] == epoch))
        )
        return [self._row(number, self._place(number)) for number in found.tolist()]

    def _place(self, number: int) -> int:
        step, lane = self.rows["step"], self.rows["lane"]
        first = number
        while first and step[first - 1] == step[number] and lane[first - 1] == lane[number]:
            first -= 1
        return number - first

    def _row(self, number: int, place: int) -> LogRow:
        step, lane, dataset, epoch, sample, part, tokens = (int(self.rows[n][number]) for n in list(COLUMNS)[:-1])
        loss = float(self.rows["loss"][number])
        name = self.state.datasets[dataset]
        return LogRow(self.first + step, lane, place, name, epoch, sample, part, tokens, None if loss != loss else loss)

    def to_bytes(self) -> bytes:
        """Return the content of the file. Equal segments give equal bytes."""
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
    def from_bytes(cls, data: bytes, what: str = "the segment") -> LogSegment:
        """Parse what ``to_bytes`` returned. ``what`` names the segment in messages.

        Raises:
            SampleLogError: the segment is damaged.
        """
        try:
            return _parse(data)
        except _DAMAGE as error:
            raise SampleLogError(f"{what}: damaged: {error}; other segments of the folder can still be read") from error

    def name(self) -> str:
        """Return the name of the file."""
        return f"steps-{self.first:010d}-{self.last:010d}.samples"


def _planes(column: Column) -> bytes:
    return column.view(np.uint8).reshape(len(column), column.itemsize).T.tobytes()


def _from_planes(data: bytes, kind: np.dtype[Any], count: int) -> Column:
    planes = np.frombuffer(data, np.uint8).reshape(kind.itemsize, count)
    return np.ascontiguousarray(planes.T).view(kind).reshape(count)


def _parse(data: bytes) -> LogSegment:
    if not data.startswith(_MAGIC):
        raise ValueError("it does not begin like a segment of a sample log")
    end = data.find(b"\n", len(_MAGIC), len(_MAGIC) + _MAX_HEADER_BYTES)
    if end < 0:
        raise ValueError("its header is not terminated")
    header = parse_json(bytes(data[len(_MAGIC) : end]))
    sections, start = {}, end + 1
    for name, size, deflated_bytes, crc32 in header["sections"]:
        sections[name] = _inflate(data[start : start + deflated_bytes], size, crc32, name)
        start += deflated_bytes
    if start != len(data):
        raise ValueError(f"it has {len(data) - start} bytes after the last section")
    state = LoaderState.from_dict(parse_json(sections["state"]))
    rows = {name: _from_planes(sections[name], kind, header["rows"]) for name, kind in COLUMNS.items()}
    first, last, stage = (int(header[name]) for name in ("first", "last", "stage"))
    steps = rows["step"].astype(np.int64)
    if not 0 < first <= last or np.any(steps[1:] < steps[:-1]) or np.any(steps > last - first):
        raise ValueError(f"rows of other steps than {first} to {last}, or out of order")
    if np.any(rows["dataset"] >= len(state.datasets)):
        raise ValueError("a row has a data set that the state does not name")
    return LogSegment(first, last, stage, state, rows, tuple(parse_json(sections["skipped"])))


def _inflate(data: bytes, size: int, crc32: int, name: str) -> bytes:
    if zlib.crc32(data) != crc32:
        raise ValueError(f"the checksum of {name} does not match")
    if not 0 <= size <= _MAX_SECTION_BYTES:
        raise ValueError(f"{name} has {size} bytes, expected at most {_MAX_SECTION_BYTES}")
    inflater = zlib.decompressobj()
    plain = inflater.decompress(data, max(1, size))
    if len(plain) != size or not inflater.eof:
        raise ValueError(f"{name} does not have the expected {size} bytes")
    return plain


class SampleLog:
    """The segments of the sample log of a run.

    Args:
        folder: ``RUN/sample_log``; a missing folder is an empty log.

    Attributes:
        step_ranges: First and last step of each segment, ascending.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else iter(())
        self.step_ranges = sorted((int(name[1]), int(name[2])) for name in names if name is not None)
        self._segments: dict[int, LogSegment] = {}
        self._states: dict[int, LoaderState] = {}

    @property
    def last_step(self) -> int:
        """The last logged step; 0 if there is none."""
        return self.step_ranges[-1][1] if self.step_ranges else 0

    def segment(self, number: int) -> LogSegment:
        """Read a segment by its number in ``step_ranges``. The last few segments are cached.

        Raises:
            SampleLogError: the segment is damaged or cannot be read.
        """
        if number not in self._segments:
            first, last = self.step_ranges[number]
            path = self._path(number)
            try:
                segment = LogSegment.from_bytes(read_bytes(path, most_bytes=_MAX_SECTION_BYTES), str(path))
            except UntrustedError as error:
                raise SampleLogError(f"{path}: {error}") from error
            except OSError as error:
                raise SampleLogError(f"{path}: cannot be read: {error.strerror}") from error
            if (segment.first, segment.last) != (first, last):
                raise SampleLogError(
                    f"{path}: contains the steps {segment.first} to {segment.last}, unlike its name; was it renamed?"
                )
            self._segments = dict([*self._segments.items()][1 - _CACHED_SEGMENTS :])
            self._segments[number] = segment
        return self._segments[number]

    def state(self, number: int) -> LoaderState:
        """Read the snapshot of a segment, without its rows.

        Raises:
            SampleLogError: the segment is damaged or cannot be read.
        """
        if number not in self._states:
            self._states = dict([*self._states.items()][1 - _CACHED_STATES :])
            self._states[number] = self.segment(number).state if number in self._segments else self._read_state(number)
        return self._states[number]

    def _read_state(self, number: int) -> LoaderState:
        path = self._path(number)
        try:
            with open_regular(path) as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise ValueError("it does not begin like a segment of a sample log")
                name, size, deflated_bytes, crc32 = parse_json(file.readline(_MAX_HEADER_BYTES))["sections"][0]
                plain = _inflate(file.read(min(deflated_bytes, _MAX_SECTION_BYTES)), size, crc32, name)
            return LoaderState.from_json(plain.decode())
        except OSError as error:
            raise SampleLogError(f"{path}: cannot be read: {error.strerror}") from error
        except _DAMAGE as error:
            raise SampleLogError(f"{path}: damaged: {error}") from error

    def _path(self, number: int) -> Path:
        first, last = self.step_ranges[number]
        return self.folder / f"steps-{first:010d}-{last:010d}.samples"

    def number_of(self, step: int) -> int | None:
        """Return the number of the segment that contains a step; None if no segment does."""
        number = bisect.bisect_right(self.step_ranges, (step, 2**63)) - 1
        return number if number >= 0 and step <= self.step_ranges[number][1] else None

    def snapshot(self, step: int) -> LogSegment | None:
        """Return the last segment that ends at ``step`` or earlier; None if there is none."""
        number = bisect.bisect_right([last for _, last in self.step_ranges], step) - 1
        return self.segment(number) if number >= 0 else None


def write_segment(folder: Path, segment: LogSegment) -> Path:
    """Write a segment atomically, and return its path. Creates the folder.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / segment.name()
    write_whole(path, segment.to_bytes(), parents=True)
    return path


def cut_back(folder: Path, step: int) -> None:
    """Remove incomplete files and the segments with steps after ``step``, because the run repeats these steps.

    A segment that contains ``step`` and later steps is removed as a whole. Checkpoints are saved where segments end, so
    this only happens if a checkpoint was copied from another run.
    """
    for first, last in SampleLog(folder).step_ranges:
        if last > step:
            (folder / f"steps-{first:010d}-{last:010d}.samples").unlink()
    for partial in folder.glob(".steps-*.partial"):
        partial.unlink()
