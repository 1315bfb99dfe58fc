"""Reading any range of any parameter out of the files of however many ranks wrote them.

wanted            |-------------------)
rank 0  |--------------)
rank 1                 |--------------)      -> the overlaps are copied, a gap is an error
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.io.checksums import crc32_of
from data_pipeline.io.untrusted import open_regular
from mmscale.checkpoint.contents import content_problems
from mmscale.checkpoint.manifest import Manifest, missing_or_cut, rank_files, read_manifest, read_notes, read_state
from mmscale.dist import World, all_reduce_max, first_complaint
from mmscale.errors import CheckpointError, DamagedError
from mmscale.hf.tensor_file import FORMAT_NAMES
from mmscale.io.files import checksum_of

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)
"""Errors of a file that is missing or no regular file. Others (no permission, an error of the disk) may pass."""
_GOOD, _UNREADABLE, _DAMAGED = 0.0, 1.0, 2.0
"""Verdicts of the ranks; the largest decides."""


class CheckpointReader:
    """An open checkpoint. Use as a context manager.

    Args:
        path: Checkpoint folder.

    Raises:
        CheckpointError: it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        if (problem := missing_or_cut(path, self.manifest)) is not None:
            raise CheckpointError(f"{path} is damaged: {problem}; `mmscale checkpoint verify` lists what is left")
        self.notes = [read_notes(path, rank) for rank in range(self.manifest.world_size)]
        self._ranges: dict[str, list[tuple[int, int, int]]] = {}
        for rank, notes in enumerate(self.notes):
            for key, entry in notes.tensors.items():
                if entry.whole:
                    continue
                self._ranges.setdefault(key, []).append((entry.start, entry.stop, rank))
        self._files: dict[int, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()

    def weights_kind(self, name: str, *, ema: bool = False) -> str:
        """``master`` or ``frozen``: how the weights of a stored parameter are kept; ``ema`` for their average.

        A frozen parameter's average is its weights.
        """
        if not self.manifest.parameters[name].trained:
            return "frozen"
        return "ema" if ema else "master"

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Number format in which the values of a stored parameter are kept.

        Raises:
            CheckpointError: there are none.
        """
        key = f"{name}|{kind}"
        if key not in self._ranges:
            raise CheckpointError(f"{self.path}: {key} is not in it; the checkpoint is damaged")
        stored = self.notes[self._ranges[key][0][2]].tensors[key].dtype
        return next(dtype for dtype, spelled in FORMAT_NAMES.items() if spelled == stored)

    def fill(self, target: Tensor, name: str, kind: str, start: int) -> None:
        """Fills the flat ``target`` with the values from ``start`` on, converting to its number format.

        Args:
            target: ``(n,)``, mutated.
            name: Stored name of a parameter.
            kind: ``master``, ``frozen``, ``ema`` or one of the optimizer's, as ``exp_avg``.
            start: Index of the first wanted value in the flattened parameter.

        Raises:
            CheckpointError: values are missing or a file is damaged.
        """
        stop, filled = start + target.numel(), 0
        key = f"{name}|{kind}"
        for low, high, rank in self._ranges.get(key, []):
            first, last = max(low, start), min(high, stop)
            if first >= last:
                continue
            values = self._read(rank, key, first - low, last - low)
            target[first - start : last - start].copy_(values)
            filled += last - first
        if filled != stop - start:
            raise CheckpointError(
                f"{self.path}: {key} has {filled} of the values {start}:{stop}; the checkpoint is damaged"
            )

    def holds(self, name: str, kind: str) -> bool:
        """Whether any values of a stored parameter are kept in this kind; ``gaps`` finds those that are missing."""
        return f"{name}|{kind}" in self._ranges

    def whole_shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of a tensor that rank 0 wrote whole; None if there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        entry = self.notes[0].tensors.get(key)
        return None if entry is None or not entry.whole else tuple(self._read(0, key, None, None).shape)

    def buffer(self, name: str) -> Tensor:
        """A buffer, whole.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return self.whole(f"{name}|buffer")

    def whole(self, key: str) -> Tensor:
        """A tensor that rank 0 wrote whole.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return self._read(0, key, None, None)

    def _read(self, rank: int, key: str, first: int | None, last: int | None) -> Tensor:
        file = self.path / rank_files(rank)[0]
        try:
            if rank not in self._files:
                self._files[rank] = safe_open(file, "pt")
            if first is None:
                return self._files[rank].get_tensor(key)
            return self._files[rank].get_slice(key)[first:last]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {key} cannot be read: {error}") from error

    def gaps(self) -> Iterator[str]:
        """Complaints about parameters whose ranges do not cover them exactly once, of every kind they are kept in."""
        kinds: dict[str, list[str]] = {}
        for key in self._ranges:
            name, _, kind = key.rpartition("|")
            kinds.setdefault(name, []).append(kind)
        for name, entry in self.manifest.parameters.items():
            size = math.prod(entry.shape)
            averaged = ["ema"] if self.manifest.ema and entry.trained else []
            for kind in {self.weights_kind(name), *averaged, *kinds.get(name, [])} if size else ():
                ranges = sorted(self._ranges.get(f"{name}|{kind}", []))
                ends = [0, *(stop for _, stop, _ in ranges)]
                if [start for start, _, _ in ranges] != ends[:-1] or ends[-1] != size:
                    yield f"{name}|{kind}: the ranks' ranges do not cover its {size} values exactly once"


def verify(path: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; an empty list means it is good.

    Checks sizes, checksums, that headers, notes and manifest agree, that all values are finite, ranges, and that the
    position in the data can be read.
    """
    try:
        manifest = read_manifest(path)
        ranks = range(manifest.world_size)
        problems = [problem for rank in ranks for problem in rank_problems(path, manifest, rank)]
        if not problems:
            with CheckpointReader(path) as reader:
                problems.extend(reader.gaps())
            read_state(path)
    except CheckpointError as error:
        return [str(error)]
    return problems


def rank_problems(path: Path, manifest: Manifest, rank: int) -> Iterator[str]:
    """What is wrong with the two files of one rank, both read in full: first their bytes, then what they say."""
    problems = [problem for name in rank_files(rank) if (problem := file_problem(path, manifest, name)) is not None]
    yield from problems
    if problems:
        return
    try:
        yield from content_problems(path, manifest, rank)
    except (OSError, ValueError, SafetensorError) as error:
        yield f"{rank_files(rank)[0]}: {error}"


def file_problem(path: Path, manifest: Manifest, name: str) -> str | None:
    """What is wrong with the bytes of one file, and of which tensors; None if nothing is. Reads all of it.

    Raises:
        CheckpointError: the file is there, but it cannot be read (no permission, an error of the disk).
    """
    entry = manifest.files[name]
    try:
        open_regular(path / name).close()
        size = (path / name).stat().st_size
        if size != entry.bytes:
            return f"{name}: {size} bytes, {entry.bytes} were written"
        checksum = crc32_of(path / name)
    except OSError as error:
        if error.errno not in _GONE:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
        return f"{name}: {error.strerror}"
    if checksum == entry.crc32:
        return None
    damaged = ", ".join(_damaged_tensors(path, manifest, name))
    return f"{name}: checksum {checksum:08x}, {entry.crc32:08x} was written; damaged: {damaged or 'not a tensor'}"


def _damaged_tensors(path: Path, manifest: Manifest, name: str) -> Iterator[str]:
    """The tensors in a damaged file whose own checksum is wrong."""
    rank = next((r for r in range(manifest.world_size) if rank_files(r)[0] == name), None)
    if rank is None:
        return
    try:
        notes = read_notes(path, rank)
    except CheckpointError:
        return
    if not notes.tensors or not manifest.files[name].bytes:
        return
    ends = [*[entry.offset for entry in notes.tensors.values()][1:], manifest.files[name].bytes]
    data = np.memmap(path / name, np.uint8, "r")
    for (key, entry), end in zip(notes.tensors.items(), ends, strict=True):
        if checksum_of(data[entry.offset : end].data) != entry.crc32:
            yield key


def verify_together(world: World, path: Path) -> None:
    """Reads every byte of a checkpoint, each rank some files, before anything is taken from it. All ranks must call.

    Finds what ``verify`` finds.

    Raises:
        DamagedError: something is wrong with it; on every rank, with the same words.
        CheckpointError: it cannot be read, by all ranks or by some of them; likewise.
    """
    complaint, verdict = None, _GOOD
    try:
        manifest = read_manifest(path)
        mine = range(world.rank, manifest.world_size, world.world_size)
        problems = (problem for rank in mine for problem in rank_problems(path, manifest, rank))
        complaint = next(problems, None)
        if complaint is None and world.is_main:
            with CheckpointReader(path) as reader:
                complaint = next(reader.gaps(), None)
            read_state(path)
        if complaint is not None:
            complaint, verdict = f"{path} is damaged: {complaint}", _DAMAGED
    except CheckpointError as error:
        complaint, verdict = str(error), _DAMAGED
        if isinstance(cause := error.__cause__, OSError) and not (world.is_main and cause.errno in _GONE):
            verdict = _UNREADABLE  # A file that only another rank does not see is not gone.
    heard = first_complaint(world, complaint)
    if heard is not None:
        raise DamagedError(heard) if all_reduce_max(world, verdict) == _DAMAGED else CheckpointError(heard)


def whole_parameter(reader: CheckpointReader, name: str, *, ema: bool = False) -> Tensor:
    """Weights of one stored parameter, float32, in its shape; with ``ema`` their average if it was trained."""
    shape = reader.manifest.parameters[name].shape
    values = torch.empty(math.prod(shape), dtype=torch.float32)
    reader.fill(values, name, reader.weights_kind(name, ema=ema), 0)
    return values.view(shape)
