"""Read any range of any parameter from a checkpoint of any number of ranks, and verify checkpoints.

wanted            |-------------------)
rank 0  |--------------)
rank 1                 |--------------)      -> copy the overlaps; raise if a value is missing

The metadata of a rank is read when a range of that rank is needed. The ranges of ZeRO stages 0 and 3 follow from the
shape, so a resume reads the metadata of few ranks, and not of all ranks on each of thousands of ranks.
"""

from __future__ import annotations

import errno
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.io.checksums import crc32_of
from data_pipeline.io.untrusted import open_regular
from mmscale.checkpoint.contents import content_problems
from mmscale.checkpoint.manifest import (
    Manifest,
    RankMetadata,
    base_folder,
    missing_or_truncated,
    rank_files,
    read_manifest,
    read_rank_metadata,
    read_state,
)
from mmscale.dist import World, all_reduce_max, lowest_rank_error
from mmscale.engine.engine import FrozenSource
from mmscale.errors import CheckpointError, DamagedError
from mmscale.hf.tensor_file import FORMAT_NAMES
from mmscale.io.files import checksum_of

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)
"""Errors of a missing or irregular file, which mean damage. Others (no permission, disk error) may be temporary."""
_GOOD, _UNREADABLE, _DAMAGED = 0.0, 1.0, 2.0
"""Verdict of a rank. The maximum over all ranks decides."""


class CheckpointReader:
    """An open checkpoint. Use it as a context manager.

    Args:
        path: Checkpoint folder. The caller verifies the checksums of its files.
        follow: Open the other checkpoints that hold frozen parameters of this one. False: those cannot be read.
        check_sizes: Check the sizes of all files first. Pass False after ``verify_together``, which has read them all.
        near: Rank at which a search begins if the shape does not determine the rank.

    Values of frozen parameters that another checkpoint holds are read from there.

    Attributes:
        frozen_sources: The checkpoint that holds each of these parameters, by stored name.

    Raises:
        CheckpointError: the manifest is damaged, a file is missing or has the wrong size, or another checkpoint that
            holds frozen parameters is missing or has changed. Every method raises it for damaged metadata of a rank.
    """

    def __init__(self, path: Path, *, follow: bool = True, check_sizes: bool = True, near: int = 0) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.frozen_sources: dict[str, FrozenSource] = {}
        self._bases: dict[str, tuple[CheckpointReader, bool]] = {}
        for base in self.manifest.bases:
            folder = base_folder(base, path) if follow else Path(base.path)
            source = FrozenSource(str(folder.absolute()), base.checksum, base.ema)
            self.frozen_sources |= dict.fromkeys(base.parameters, source)
            if follow:  # A base's own bases are not followed: a warm start records the checkpoint that has the values.
                reader = CheckpointReader(folder, follow=False, check_sizes=check_sizes)
                self._bases |= dict.fromkeys(base.parameters, (reader, base.ema))
        if check_sizes and (problem := missing_or_truncated(path, self.manifest)) is not None:
            raise CheckpointError(f"{path} is damaged: {problem}; `mmscale checkpoint verify` lists all problems")
        self._near = min(near, self.manifest.world_size - 1)
        self._metadata: dict[int, RankMetadata] = {}
        self._files: dict[int, Any] = {}

    def rank_metadata(self, rank: int) -> RankMetadata:
        """Return the metadata of a rank. It is read once and cached."""
        if rank not in self._metadata:
            self._metadata[rank] = read_rank_metadata(self.path, rank)
        return self._metadata[rank]

    @property
    def num_read(self) -> int:
        """Number of ranks whose metadata has been read."""
        return len(self._metadata)

    def ranges(self, name: str, kind: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the stored ranges that overlap ``start:stop`` of a parameter, as (start, stop, rank).

        Reads the metadata of further ranks until the ranges cover all these values, or until all ranks are read.
        """
        key, found, missing = f"{name}|{kind}", list[tuple[int, int, int]](), stop - start
        for rank in self._likely_ranks(name, key, start, stop) if missing > 0 else ():
            entry = self.rank_metadata(rank).tensors.get(key)
            if entry is None or entry.whole:
                continue
            overlap = min(entry.stop, stop) - max(entry.start, start)
            if overlap > 0:
                found.append((entry.start, entry.stop, rank))
                missing -= overlap
                if missing <= 0:
                    break
        return found

    def _likely_ranks(self, name: str, key: str, start: int, stop: int) -> Iterator[int]:
        """Yield all ranks once; first those that hold the range if the save used ZeRO stage 0 or 3."""
        shape, world_size = self.manifest.parameters[name].shape, self.manifest.world_size
        seen = set[int]()

        def unseen(ranks: Iterable[int]) -> Iterator[int]:
            for rank in ranks:
                if 0 <= rank < world_size and rank not in seen:
                    seen.add(rank)
                    yield rank

        yield from unseen(_shard_owners(math.prod(shape), 1, world_size, start, stop))
        if world_size > 1:
            # With expert parallelism, rank 1 holds values of the second slice of the experts.
            second = self.rank_metadata(1).tensors.get(key)
            if second is not None and second.start and math.prod(shape) % second.start == 0:
                parts = math.prod(shape) // second.start
                if world_size % parts == 0:
                    yield from unseen(_shard_owners(math.prod(shape), parts, world_size, start, stop))
        yield from unseen(rank for step in range(world_size) for rank in (self._near - step, self._near + step))

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()
        for reader, _ in self._bases.values():
            reader._files.clear()

    def weights_kind(self, name: str, *, ema: bool = False) -> str:
        """Return the kind under which the weights of a stored parameter are saved: ``master``, ``frozen`` or ``ema``.

        Args:
            name: Stored name of a parameter.
            ema: Return ``ema`` for a trained parameter. A frozen one has no average of its own.
        """
        if not self.manifest.parameters[name].trained:
            return "frozen"
        return "ema" if ema else "master"

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Return the number format in which values of this kind are saved.

        Raises:
            CheckpointError: the checkpoint holds no such values.
        """
        if name in self._bases:
            return self._in_base(name)[0].dtype(*self._in_base(name)[1:])
        key, found = f"{name}|{kind}", self.ranges(name, kind, 0, 1)
        if not found:
            raise CheckpointError(f"{self.path} does not hold {key}; the checkpoint is damaged")
        stored = self.rank_metadata(found[0][2]).tensors[key].dtype
        return next(dtype for dtype, spelled in FORMAT_NAMES.items() if spelled == stored)

    def fill(self, target: Tensor, name: str, kind: str, start: int) -> None:
        """Fill ``target`` with consecutive values of a parameter, converted to the dtype of ``target``.

        Args:
            target: ``(n,)``, mutated.
            name: Stored name of a parameter.
            kind: ``master``, ``frozen``, ``ema`` or a kind of optimizer state such as ``exp_avg``.
            start: Index of the first value in the flattened parameter.

        Raises:
            CheckpointError: values are missing, or a file cannot be read.
        """
        if name in self._bases:
            reader, stored, theirs = self._in_base(name)
            reader.fill(target, stored, theirs, start)
            return
        stop, filled = start + target.numel(), 0
        key = f"{name}|{kind}"
        for low, high, rank in self.ranges(name, kind, start, stop):
            first, last = max(low, start), min(high, stop)
            values = self._read(rank, key, first - low, last - low)
            target[first - start : last - start].copy_(values)
            filled += last - first
        if filled != stop - start:
            raise CheckpointError(
                f"{self.path}: {key} has only {filled} of the values {start}:{stop}; the checkpoint is damaged"
            )

    def holds(self, name: str, kind: str, start: int = 0) -> bool:
        """Whether the checkpoint holds the value at ``start`` of this kind. ``gaps`` finds incomplete ones."""
        if name in self._bases:
            reader, stored, theirs = self._in_base(name)
            return kind == "frozen" and reader.holds(stored, theirs, start)
        return bool(self.ranges(name, kind, start, start + 1))

    def _in_base(self, name: str) -> tuple[CheckpointReader, str, str]:
        """Return the reader of the base that holds a parameter, and the parameter's name and kind there.

        Raises:
            CheckpointError: the base does not hold the parameter in this shape.
        """
        reader, ema = self._bases[name]
        stored = reader.manifest.stored_name(name)
        if stored is None or reader.manifest.parameters[stored].shape != self.manifest.parameters[name].shape:
            raise CheckpointError(f"{self.path}: {reader.path} does not hold {name} in its shape")
        return reader, stored, reader.weights_kind(stored, ema=ema)

    def whole_shape(self, key: str) -> tuple[int, ...] | None:
        """Return the shape of an unsharded tensor, which rank 0 stores; None if there is none. Reads the tensor.

        Raises:
            CheckpointError: the file cannot be read.
        """
        entry = self.rank_metadata(0).tensors.get(key)
        return None if entry is None or not entry.whole else tuple(self._read(0, key, None, None).shape)

    def buffer(self, name: str) -> Tensor:
        """Read a buffer.

        Raises:
            CheckpointError: the buffer is missing or cannot be read.
        """
        return self.whole(f"{name}|buffer")

    def whole(self, key: str) -> Tensor:
        """Read an unsharded tensor, which rank 0 stores.

        Raises:
            CheckpointError: the tensor is missing or cannot be read.
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
        """Yield a sentence for each kind of a parameter whose ranges do not cover all its values exactly once."""
        covered: dict[str, dict[str, array[int]]] = {}
        for rank in range(self.manifest.world_size):  # Keep 16 bytes of each range, not the metadata of all ranks.
            for key, entry in (self._metadata.get(rank) or read_rank_metadata(self.path, rank)).tensors.items():
                name, _, kind = key.rpartition("|")
                if not entry.whole:
                    covered.setdefault(name, {}).setdefault(kind, array("q")).extend((entry.start, entry.stop))
        for name, parameter in self.manifest.parameters.items():
            if name in self.frozen_sources:  # The gaps of the other checkpoint include those of its parameters.
                if name in self._bases and 0 not in parameter.shape and not self.holds(name, "frozen"):
                    yield f"{name}: {self._bases[name][0].path} does not hold it"
                continue
            size = math.prod(parameter.shape)
            averaged = ["ema"] if self.manifest.ema and parameter.trained else []
            kinds = covered.get(name, {})
            for kind in {self.weights_kind(name), *averaged, *kinds} if size else ():
                flat = kinds.get(kind, array("q"))
                ranges = sorted(zip(flat[::2], flat[1::2], strict=True))
                ends = [0, *(stop for _, stop in ranges)]
                if [start for start, _ in ranges] != ends[:-1] or ends[-1] != size:
                    yield f"{name}|{kind}: the ranks' ranges do not cover its {size} values exactly once"


def _shard_owners(size: int, parts: int, world_size: int, start: int, stop: int) -> Iterator[int]:
    """Yield the ranks that hold ``start:stop`` if ZeRO stage 3 cuts ``size`` values in ``parts`` slices.

    The rule is that of ``mmscale.engine.partition.own_range``.
    """
    length = size // parts
    shard = -(-length // (world_size // parts))
    while start < stop:
        part, inside = divmod(start, length)
        yield inside // shard * parts + part
        start = part * length + min((inside // shard + 1) * shard, length)


def verify(path: Path) -> list[str]:
    """Return the problems of a checkpoint; an empty list if it is good.

    Checks sizes and checksums, that headers, metadata and manifest agree, that all values are finite, that the ranges
    cover each parameter exactly once, and that the loader state can be read. Checkpoints that hold frozen weights of
    this one are checked too. Later checks run only if the earlier ones find no problem, so the list may be incomplete.
    If a file exists but cannot be read, the list has only that problem.
    """
    try:
        manifest = read_manifest(path)
        ranks = range(manifest.world_size)
        problems = [problem for rank in ranks for problem in rank_problems(path, manifest, rank)]
        for base in () if problems else manifest.bases:
            problems.extend(_base_problems(base_folder(base, path)))
        if not problems:
            with CheckpointReader(path) as reader:
                problems.extend(reader.gaps())
            read_state(path)
    except CheckpointError as error:
        return [str(error)]
    return problems


def _base_problems(folder: Path, ranks: range | None = None) -> Iterator[str]:
    """Yield the problems of a checkpoint that holds frozen weights of another one.

    Args:
        folder: The checkpoint.
        ranks: Ranks of the checkpoint whose files are read; None for all.

    Raises:
        CheckpointError: a file cannot be read, or the manifest or a rank's metadata is damaged.
    """
    manifest = read_manifest(folder)
    for rank in range(manifest.world_size) if ranks is None else ranks:
        yield from (f"{folder}: {problem}" for problem in rank_problems(folder, manifest, rank))
    yield from (f"{folder}: {problem}" for problem in CheckpointReader(folder, follow=False).gaps())


def rank_problems(path: Path, manifest: Manifest, rank: int) -> Iterator[str]:
    """Yield the problems of one rank's two files. Reads both in full; checks the content only if the checksums match.

    Raises:
        CheckpointError: a file exists but cannot be read.
    """
    problems = [problem for name in rank_files(rank) if (problem := file_problem(path, manifest, name)) is not None]
    yield from problems
    if problems:
        return
    try:
        yield from content_problems(path, manifest, rank)
    except (OSError, ValueError, SafetensorError) as error:
        yield f"{rank_files(rank)[0]}: {error}"


def file_problem(path: Path, manifest: Manifest, name: str) -> str | None:
    """Check size and checksum of one file, and name the damaged tensors. Reads all of it; returns None if it is good.

    Raises:
        CheckpointError: the file exists but cannot be read (no permission, disk error).
    """
    entry = manifest.files[name]
    try:
        open_regular(path / name).close()
        size = (path / name).stat().st_size
        if size != entry.bytes:
            return f"{name}: has {size} bytes, expected {entry.bytes}"
        checksum = crc32_of(path / name)
    except OSError as error:
        if error.errno not in _MISSING:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
        return f"{name}: {error.strerror}"
    if checksum == entry.crc32:
        return None
    damaged = ", ".join(_damaged_tensors(path, manifest, name))
    return f"{name}: has checksum {checksum:08x}, expected {entry.crc32:08x}; damaged: {damaged or 'not a tensor'}"


def _damaged_tensors(path: Path, manifest: Manifest, name: str) -> Iterator[str]:
    """Yield the keys of the tensors in a damaged file whose own checksum is wrong."""
    rank = next((r for r in range(manifest.world_size) if rank_files(r)[0] == name), None)
    if rank is None:
        return
    try:
        metadata = read_rank_metadata(path, rank)
    except CheckpointError:
        return
    if not metadata.tensors or not manifest.files[name].bytes:
        return
    ends = [*[entry.offset for entry in metadata.tensors.values()][1:], manifest.files[name].bytes]
    data = np.memmap(path / name, np.uint8, "r")
    for (key, entry), end in zip(metadata.tensors.items(), ends, strict=True):
        if checksum_of(data[entry.offset : end].data) != entry.crc32:
            yield key


def verify_together(world: World, path: Path) -> None:
    """Make the checks of ``verify``, with the files divided among the ranks. All ranks must call.

    Raises:
        DamagedError: a rank found damage. All ranks raise the same message, which has one problem.
        CheckpointError: some or all ranks cannot read a file, and no rank found damage. All ranks raise.
    """
    complaint, verdict = _base_complaint(world, path), _GOOD
    if complaint is not None:  # The checkpoint itself is not damaged, so it must not be set aside.
        verdict = _UNREADABLE
    try:
        manifest = read_manifest(path)
        mine = range(world.rank, manifest.world_size, world.world_size)
        problems = (problem for rank in mine for problem in rank_problems(path, manifest, rank))
        found = next(problems, None)
        if found is None and world.is_main and complaint is None:
            with CheckpointReader(path) as reader:
                found = next(reader.gaps(), None)
            read_state(path)
        if found is not None:
            complaint, verdict = f"{path} is damaged: {found}", _DAMAGED
    except CheckpointError as error:
        complaint, verdict = str(error), _DAMAGED
        if isinstance(cause := error.__cause__, OSError) and not (world.is_main and cause.errno in _MISSING):
            # Only rank 0 decides that the manifest is missing: the folder may be unavailable on another rank's machine.
            verdict = _UNREADABLE
    first = lowest_rank_error(world, complaint)
    if first is not None:
        raise DamagedError(first) if all_reduce_max(world, verdict) == _DAMAGED else CheckpointError(first)


def _base_complaint(world: World, path: Path) -> str | None:
    """Return the first problem that this rank finds in the checkpoints that hold frozen weights of ``path``.

    The ranks divide the files among them. Returns None if the manifest of ``path`` cannot be read.
    """
    try:
        bases = read_manifest(path).bases
    except CheckpointError:
        return None
    try:
        for base in bases:
            folder = base_folder(base, path)
            mine = range(world.rank, read_manifest(folder).world_size, world.world_size)
            if (problem := next(_base_problems(folder, mine), None)) is not None:
                return f"{path} needs the frozen weights of another checkpoint, which is damaged: {problem}"
    except CheckpointError as error:
        return str(error)
    return None


def whole_parameter(reader: CheckpointReader, name: str, *, ema: bool = False) -> Tensor:
    """Read the weights of one stored parameter as float32 in its shape; with ``ema`` the average of a trained one."""
    shape = reader.manifest.parameters[name].shape
    values = torch.empty(math.prod(shape), dtype=torch.float32)
    reader.fill(values, name, reader.weights_kind(name, ema=ema), 0)
    return values.view(shape)
