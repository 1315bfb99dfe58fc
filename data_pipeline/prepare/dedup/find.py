"""Finds duplicates in data sets and among them, and lists the samples that a run need not see.

    manifests --signatures--> keys --search--> which sample goes, for which one that stays --> LIST

Criteria apply one after the other, each to the samples that are still there; of samples that are duplicates the first
stays. Samples of the sets ``against`` come before all others and are never listed: a training set is cleaned of an
evaluation set that way. The list is a line of JSON for each sample that goes, in the order of sets and samples, as
``data.faults.exclude`` reads it. It depends on data and criteria alone, not on the number of processes.

Memory: about 30 bytes for each sample (50 with ``largest``), 70 for each near pair, and 18 for each sample that goes;
beside that up to 4.3 GB a process while it sorts (``search.ROWS_AT_ONCE``). Keys lie on disk and are mapped, 8 to 16
bytes a sample and criterion. For 10^9 samples that is 30 GB, 4.3 GB a process, and 75 GB of disk.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataConfigError, FaultKind
from data_pipeline.io.atomic import replacing
from data_pipeline.io.ordered_pool import in_order
from data_pipeline.prepare.choices import Keep
from data_pipeline.prepare.dedup.search import MAX_DISTANCE, NearWork, Plan, Rows, equal_rows, greedy
from data_pipeline.prepare.dedup.signatures import (
    Criterion,
    ShardTask,
    Signatures,
    SignatureWork,
    State,
    read_signatures,
    signature_path,
)
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest

DEFAULT_DISTANCE = 4
DEFAULT_MAX_PIXELS = 89_478_485
_WRITTEN_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class NamedSet:
    """A manifest under the name that ``data.datasets`` gives it."""

    name: str
    manifest: Manifest


@dataclass(frozen=True)
class Question:
    """What is a duplicate, and which one stays."""

    criteria: tuple[Criterion, ...] = (Criterion.EXACT, Criterion.PERCEPTUAL)
    distance: int = DEFAULT_DISTANCE
    """Bits of 64 in which perceptual hashes may differ."""
    keep: Keep = Keep.FIRST
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Larger images are not decoded."""

    def check(self) -> None:
        """Raises DataConfigError if nothing can be found so."""
        if not self.criteria or len(set(self.criteria)) < len(self.criteria):
            raise DataConfigError("name each criterion once, at least one of: " + ", ".join(c.value for c in Criterion))
        if not 0 <= self.distance <= MAX_DISTANCE:
            raise DataConfigError(
                f"distance={self.distance}: must be 0 to {MAX_DISTANCE}; beyond, unrelated images are as near as copies"
            )


@dataclass
class Found:
    """What one criterion found. ``left_out`` is by data set."""

    compared: int = 0
    not_compared: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DuplicateReport:
    """Figures of a search. ``num_read`` counts the samples whose signatures were not there yet."""

    output: Path
    num_samples: int
    num_against: int
    num_read: int
    num_left_out: int
    criteria: dict[str, Found]


def find_duplicates(
    sets: Sequence[NamedSet],
    output: Path,
    question: Question,
    *,
    against: Sequence[NamedSet] = (),
    signatures: Path,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    searching: Callable[[int, int], None] | None = None,
) -> DuplicateReport:
    """Writes the list of samples to leave out, whole or not at all.

    Args:
        sets: Searched, and listed in.
        output: The list.
        question: What is looked for.
        against: Samples like these are listed too; they themselves never are.
        signatures: Folder that keeps what samples are compared by. A killed search goes on from what is there.
        workers: Processes; 0 works in this one.
        progress: Called with the number of samples read since the last call, those of earlier runs included.
        searching: Called with (parts done, parts to do) of the search for near hashes.

    Raises:
        DataConfigError: two sets have one name, or the question cannot be answered.
        ManifestError, ShardError, StorageError: a shard is missing, stale or truncated, or a server fails.
        WorkerError: a process died.
    """
    question.check()
    every = [*against, *sets]
    names = [each.name for each in every]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataConfigError(f"two data sets are called {twice[0]!r}; name them: NAME={every[0].manifest.path}")
    num_read = _read_all(every, question, signatures, workers, progress or (lambda count: None))
    folder = signatures / "search"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        search = Search(every, len(against), question, signatures, folder, workers, searching)
        found = {criterion.value: search.run(criterion) for criterion in question.criteria}
        search.write(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    num_samples = int(search.starts[-1] - search.num_protected)
    return DuplicateReport(output, num_samples, search.num_protected, num_read, len(search.gone), found)


def _read_all(
    sets: Sequence[NamedSet], question: Question, folder: Path, workers: int, progress: Callable[[int], None]
) -> int:
    folder.mkdir(parents=True, exist_ok=True)

    def tasks() -> Iterator[ShardTask]:
        seen: set[bytes] = set()
        for each in sets:
            for number in range(each.manifest.num_shards):
                sha256, count = each.manifest.shard_sha256(number), _num_samples(each.manifest, number)
                missing = tuple(c for c in question.criteria if read_signatures(folder, sha256, c, count) is None)
                if not missing or bytes.fromhex(sha256) in seen:
                    progress(count)
                    continue
                seen.add(bytes.fromhex(sha256))
                yield ShardTask(each.manifest.path, number, missing)

    num_read = 0
    for count in in_order(SignatureWork(folder, question.max_pixels), tasks(), workers):
        num_read += count
        progress(count)
    return num_read


def _num_samples(manifest: Manifest, number: int) -> int:
    return int(manifest.cu_samples[number + 1] - manifest.cu_samples[number])


class Search:
    """All samples in one row, those of ``against`` first, and which of them stay so far."""

    def __init__(
        self,
        sets: Sequence[NamedSet],
        num_against_sets: int,
        question: Question,
        signatures: Path,
        folder: Path,
        workers: int,
        searching: Callable[[int, int], None] | None = None,
    ) -> None:
        self._searching = searching or (lambda done, of: None)
        self._sets, self._question, self._signatures = sets, question, signatures
        self._folder, self._workers = folder, workers
        self.starts = np.cumsum([0, *(each.manifest.num_samples for each in sets)], dtype=np.int64)
        self.num_protected = int(self.starts[num_against_sets])
        self._stays = np.ones(int(self.starts[-1]), bool)  # By sample.
        self.gone, self._kept = array("q"), array("q")  # Samples, and what stays for them.
        self._why, self._bits = bytearray(), bytearray()

    def run(self, criterion: Criterion) -> Found:
        """Marks what goes by one criterion."""
        keys, state = self._load(criterion)
        counts = np.bincount(state[self._stays], minlength=len(State))
        found = Found(int(counts[State.COMPARED]))
        found.not_compared = {s.name.lower(): int(counts[s]) for s in State if s is not State.COMPARED and counts[s]}
        samples = self._in_turn(np.flatnonzero(self._stays & (state == State.COMPARED)))
        before = len(self.gone)
        later, first = equal_rows(keys, samples)
        self._leave_out(samples[later], samples[first], criterion, keys)
        if criterion is Criterion.PERCEPTUAL and self._question.distance:
            is_first = np.ones(len(samples), bool)
            is_first[later] = False
            samples = samples[is_first]
            self._leave_out(*self._near(keys, samples), criterion, keys)
        owners = np.searchsorted(self.starts, np.array(self.gone[before:]), side="right") - 1
        names = [each.name for each in self._sets]
        found.left_out = {names[i]: int(n) for i, n in enumerate(np.bincount(owners, minlength=len(names))) if n}
        return found

    def _near(self, keys: npt.NDArray[np.uint64], samples: Rows) -> tuple[Rows, Rows]:
        path = self._folder / "hashes.npy"
        np.save(path, keys[samples, 0])
        work = NearWork(path, Plan.of(len(samples), self._question.distance), self._question.distance)
        tasks, pieces = work.tasks(len(samples)), list[Rows]()
        self._searching(0, len(tasks))
        for piece in in_order(work, tasks, self._workers):
            pieces.append(piece.pairs)
            if piece.is_last:
                self._searching(piece.number + 1, len(tasks))
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *pieces])
        later, earlier = greedy(pairs, int((samples < self.num_protected).sum()))
        return samples[later], samples[earlier]

    def _leave_out(self, gone: Rows, kept: Rows, criterion: Criterion, keys: npt.NDArray[np.uint64]) -> None:
        chosen = gone >= self.num_protected
        gone, kept = gone[chosen], kept[chosen]
        bits = np.bitwise_count(keys[gone, 0] ^ keys[kept, 0]) if criterion is Criterion.PERCEPTUAL else 0 * gone
        self._stays[gone] = False
        self.gone.frombytes(gone.tobytes())
        self._kept.frombytes(kept.tobytes())
        self._why += bytes([list(Criterion).index(criterion)]) * len(gone)
        self._bits += bits.astype(np.uint8).tobytes()

    def _in_turn(self, samples: Rows) -> Rows:
        """Samples, ascending, in the order in which they are kept."""
        if self._question.keep is Keep.FIRST:
            return samples
        protected = int(np.searchsorted(samples, self.num_protected))
        others = samples[protected:]
        pixels = np.load(self._folder / "pixels.npy", mmap_mode="r", allow_pickle=False)[others]
        return np.concatenate([samples[:protected], others[np.argsort(-pixels, kind="stable")]])

    def _load(self, criterion: Criterion) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """Keys, mapped, and states of all samples, one shard after the other."""
        total = len(self._stays)
        files = {"keys": (np.uint64, (total, criterion.num_words)), "pixels": (np.int64, (total,))}
        maps = {
            name: np.lib.format.open_memmap(self._folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            if total
            else np.zeros(shape, dtype)
            for name, (dtype, shape) in files.items()
        }
        state = np.zeros(total, np.uint8)
        for start, found in self._shards(criterion):
            span = slice(start, start + len(found.state))
            maps["keys"][span], maps["pixels"][span], state[span] = found.key, found.pixels, found.state
        return maps["keys"], state

    def _shards(self, criterion: Criterion) -> Iterator[tuple[int, Signatures]]:
        for start, each in zip(self.starts[:-1].tolist(), self._sets, strict=True):
            for number in range(each.manifest.num_shards):
                sha256, count = each.manifest.shard_sha256(number), _num_samples(each.manifest, number)
                found = read_signatures(self._signatures, sha256, criterion, count)
                if found is None:
                    path = signature_path(self._signatures, sha256, criterion)
                    raise DataConfigError(f"{path}: gone or changed while it was needed; run the command again")
                yield start + int(each.manifest.cu_samples[number]), found

    def write(self, output: Path) -> None:
        """The list, sorted by sample."""
        gone, kept = np.array(self.gone, np.int64), np.array(self._kept, np.int64)
        order = np.argsort(gone)
        output.parent.mkdir(parents=True, exist_ok=True)
        keys = _Keys()
        with replacing(output) as file:
            for start in range(0, len(order), _WRITTEN_AT_ONCE):
                piece = order[start : start + _WRITTEN_AT_ONCE]
                for which, sample, like in zip(piece.tolist(), gone[piece].tolist(), kept[piece].tolist(), strict=True):
                    criterion = list(Criterion)[self._why[which]]
                    record = self._record(keys, sample, like, criterion, self._bits[which])
                    file.write(json.dumps(record).encode() + b"\n")

    def _record(self, keys: _Keys, sample: int, like: int, criterion: Criterion, bits: int) -> dict[str, Any]:
        dataset, index = self._owner(sample)
        other, at = self._owner(like)
        shard, key = keys.of(dataset, index)
        how = f"differs in {bits} of 64 bits from" if criterion is Criterion.PERCEPTUAL else "equals"
        return {
            "dataset": dataset.name,
            "index": index,
            "shard": shard,
            "key": key,
            "kind": FaultKind.EXCLUDED.value,
            "reason": f"duplicate ({criterion.value}): {how} sample {at} of {other.name}",
            "duplicate_of": {"dataset": other.name, "index": at},
            "criterion": criterion.value,
            "distance": bits,
        }

    def _owner(self, sample: int) -> tuple[NamedSet, int]:
        which = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self._sets[which], sample - int(self.starts[which])


class _Keys:
    """Shards and keys of samples that come in order: one index is open at a time."""

    def __init__(self) -> None:
        self._open: tuple[NamedSet, int, ShardIndex] | None = None

    def of(self, dataset: NamedSet, index: int) -> tuple[str, str]:
        number, row = dataset.manifest.locate(index)
        if self._open is None or self._open[0] is not dataset or self._open[1] != number:
            self._open = (dataset, number, dataset.manifest.open_index(number))
        return str(self._open[2].tar_path), self._open[2].row(row).key
