"""Find duplicates within and across data sets, and list the samples to leave out.

    manifests --signatures--> keys --search--> removed samples, each with the kept sample that it duplicates --> LIST

Each criterion is applied to the samples that the criteria before it kept. The search keeps the first of several
duplicates, or with ``largest`` the one with the most pixels. Samples of the data sets ``against`` come before all
others and are never listed, so a training set can be cleaned of an evaluation set. The list has one JSON line for each
removed sample, in the order of data sets and samples, in the format of ``data.faults.exclude``. It depends on the data
and the options, not on the number of processes.

Memory: about 30 bytes per sample (50 with ``largest``), 70 per near pair, and 18 per removed sample. Sorting takes up
to 4.3 GB more per process (``search.ROWS_AT_ONCE``). Keys are memory-mapped files of 8 to 16 bytes per sample and
criterion. 10^9 samples need 30 GB, 4.3 GB per process, and 75 GB of disk.
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
from data_pipeline.prepare.choices import KeepRule
from data_pipeline.prepare.dedup.search import MAX_DISTANCE, BlockPlan, Indices, NearWork, equal_rows, greedy
from data_pipeline.prepare.dedup.signatures import (
    Criterion,
    Signatures,
    SignatureTask,
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
    """A manifest, and the name of its data set in ``data.datasets``."""

    name: str
    manifest: Manifest


@dataclass(frozen=True)
class DedupOptions:
    """When two samples are duplicates, and which one is kept."""

    criteria: tuple[Criterion, ...] = (Criterion.EXACT, Criterion.PERCEPTUAL)
    distance: int = DEFAULT_DISTANCE
    """Largest number of differing bits, of 64, between perceptual hashes of duplicates."""
    keep: KeepRule = KeepRule.FIRST
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Images with more pixels are not decoded and count as damaged."""

    def check(self) -> None:
        """Raise DataConfigError if a criterion is missing or repeated, or ``distance`` is out of range."""
        if not self.criteria or len(set(self.criteria)) < len(self.criteria):
            raise DataConfigError("name each criterion once, at least one of: " + ", ".join(c.value for c in Criterion))
        if not 0 <= self.distance <= MAX_DISTANCE:
            raise DataConfigError(
                f"distance={self.distance}: must be 0 to {MAX_DISTANCE}; beyond, unrelated images are as near as copies"
            )


@dataclass
class CriterionResult:
    """Counts of one criterion.

    Attributes:
        compared: Samples that were compared.
        not_compared: Samples that could not be compared, by the lower-case name of their ``State``.
        left_out: Removed samples by data set.
    """

    compared: int = 0
    not_compared: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DuplicateReport:
    """Counts of a search. ``num_read`` is the number of samples whose signatures had to be computed."""

    output: Path
    num_samples: int
    num_against: int
    num_read: int
    num_left_out: int
    criteria: dict[str, CriterionResult]


def find_duplicates(
    sets: Sequence[NamedSet],
    output: Path,
    options: DedupOptions,
    *,
    against: Sequence[NamedSet] = (),
    signatures: Path,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    searching: Callable[[int, int], None] | None = None,
) -> DuplicateReport:
    """Write the list of samples to leave out, atomically.

    Args:
        sets: Data sets to search. Only their samples are listed.
        output: Path of the list.
        options: When two samples are duplicates, and which one is kept.
        against: Data sets whose samples are all kept; samples of ``sets`` that duplicate them are listed.
        signatures: Folder for signatures, created if missing. An interrupted search reuses the finished ones.
        workers: Number of processes; 0 works in this one. The list is the same.
        progress: Called with the number of samples done since the last call, including those of earlier searches.
        searching: Called with (tasks done, number of tasks) of the search for near hashes.

    Raises:
        DataConfigError: two data sets have one name, or ``options.check`` fails.
        ManifestError, ShardError, StorageError: a shard is missing, stale or truncated, or a server fails.
        WorkerError: a process died.
    """
    options.check()
    every = [*against, *sets]
    names = [each.name for each in every]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataConfigError(
            f"two data sets are called {repeated[0]!r}; give them names: NAME={every[0].manifest.path}"
        )
    num_read = _read_all(every, options, signatures, workers, progress or (lambda count: None))
    folder = signatures / "search"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        search = Search(every, len(against), options, signatures, folder, workers, searching)
        result = {criterion.value: search.run(criterion) for criterion in options.criteria}
        search.write(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    num_samples = int(search.starts[-1] - search.num_protected)
    return DuplicateReport(output, num_samples, search.num_protected, num_read, len(search.removed), result)


def _read_all(
    sets: Sequence[NamedSet], options: DedupOptions, folder: Path, workers: int, progress: Callable[[int], None]
) -> int:
    folder.mkdir(parents=True, exist_ok=True)

    def tasks() -> Iterator[SignatureTask]:
        seen: set[bytes] = set()
        for each in sets:
            for number in range(each.manifest.num_shards):
                sha256, count = each.manifest.shard_sha256(number), _num_samples(each.manifest, number)
                paths = {c: signature_path(folder, sha256, c, options.max_pixels) for c in options.criteria}
                missing = tuple(c for c, path in paths.items() if read_signatures(path, c, count) is None)
                if not missing or bytes.fromhex(sha256) in seen:
                    progress(count)
                    continue
                seen.add(bytes.fromhex(sha256))
                yield SignatureTask(each.manifest.path, number, missing)

    num_read = 0
    for count in in_order(SignatureWork(folder, options.max_pixels), tasks(), workers):
        num_read += count
        progress(count)
    return num_read


def _num_samples(manifest: Manifest, number: int) -> int:
    return int(manifest.cu_samples[number + 1] - manifest.cu_samples[number])


class Search:
    """All samples in one numbering, those of ``against`` first, and which of them remain after each criterion.

    Call ``run`` for each criterion, then ``write``.
    """

    def __init__(
        self,
        sets: Sequence[NamedSet],
        num_against_sets: int,
        options: DedupOptions,
        signatures: Path,
        folder: Path,
        workers: int,
        searching: Callable[[int, int], None] | None = None,
    ) -> None:
        self._searching = searching or (lambda done, of: None)
        self._sets, self._options, self._signatures = sets, options, signatures
        self._folder, self._workers = folder, workers
        self.starts = np.cumsum([0, *(each.manifest.num_samples for each in sets)], dtype=np.int64)
        self.num_protected = int(self.starts[num_against_sets])
        self._remaining = np.ones(int(self.starts[-1]), bool)  # By sample.
        self.removed, self._kept_for = array("q"), array("q")  # Removed samples, and the kept duplicate of each.
        self._criteria, self._bits = bytearray(), bytearray()

    def run(self, criterion: Criterion) -> CriterionResult:
        """Mark the duplicates of one criterion as removed."""
        keys, state = self._load(criterion)
        counts = np.bincount(state[self._remaining], minlength=len(State))
        result = CriterionResult(int(counts[State.COMPARED]))
        result.not_compared = {s.name.lower(): int(counts[s]) for s in State if s is not State.COMPARED and counts[s]}
        samples = self._in_keep_order(np.flatnonzero(self._remaining & (state == State.COMPARED)))
        before = len(self.removed)
        later, first = equal_rows(keys, samples)
        self._mark_removed(samples[later], samples[first], criterion, keys)
        if criterion is Criterion.PERCEPTUAL and self._options.distance:
            is_first = np.ones(len(samples), bool)
            is_first[later] = False
            samples = samples[is_first]
            self._mark_removed(*self._near(keys, samples), criterion, keys)
        owners = np.searchsorted(self.starts, np.array(self.removed[before:]), side="right") - 1
        names = [each.name for each in self._sets]
        result.left_out = {names[i]: int(n) for i, n in enumerate(np.bincount(owners, minlength=len(names))) if n}
        return result

    def _near(self, keys: npt.NDArray[np.uint64], samples: Indices) -> tuple[Indices, Indices]:
        path = self._folder / "hashes.npy"
        np.save(path, keys[samples, 0])
        work = NearWork(path, BlockPlan.of(len(samples), self._options.distance), self._options.distance)
        tasks, batches = work.tasks(len(samples)), list[Indices]()
        self._searching(0, len(tasks))
        for batch in in_order(work, tasks, self._workers):
            batches.append(batch.pairs)
            if batch.is_last:
                self._searching(batch.number + 1, len(tasks))
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *batches])
        later, earlier = greedy(pairs, int((samples < self.num_protected).sum()))
        return samples[later], samples[earlier]

    def _mark_removed(
        self, removed: Indices, kept_for: Indices, criterion: Criterion, keys: npt.NDArray[np.uint64]
    ) -> None:
        chosen = removed >= self.num_protected
        removed, kept_for = removed[chosen], kept_for[chosen]
        bits = (
            np.bitwise_count(keys[removed, 0] ^ keys[kept_for, 0]) if criterion is Criterion.PERCEPTUAL else 0 * removed
        )
        self._remaining[removed] = False
        self.removed.frombytes(removed.tobytes())
        self._kept_for.frombytes(kept_for.tobytes())
        self._criteria += bytes([list(Criterion).index(criterion)]) * len(removed)
        self._bits += bits.astype(np.uint8).tobytes()

    def _in_keep_order(self, samples: Indices) -> Indices:
        """Sort ascending samples so that, of several duplicates, the one to keep comes first."""
        if self._options.keep is KeepRule.FIRST:
            return samples
        protected = int(np.searchsorted(samples, self.num_protected))
        others = samples[protected:]
        pixels = np.load(self._folder / "pixels.npy", mmap_mode="r", allow_pickle=False)[others]
        return np.concatenate([samples[:protected], others[np.argsort(-pixels, kind="stable")]])

    def _load(self, criterion: Criterion) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """Load the memory-mapped keys and the states of all samples, in the order of the numbering."""
        total = len(self._remaining)
        files = {"keys": (np.uint64, (total, criterion.num_words)), "pixels": (np.int64, (total,))}
        maps = {
            name: np.lib.format.open_memmap(self._folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            if total
            else np.zeros(shape, dtype)
            for name, (dtype, shape) in files.items()
        }
        state = np.zeros(total, np.uint8)
        for start, result in self._shards(criterion):
            span = slice(start, start + len(result.state))
            maps["keys"][span], maps["pixels"][span], state[span] = result.key, result.pixels, result.state
        return maps["keys"], state

    def _shards(self, criterion: Criterion) -> Iterator[tuple[int, Signatures]]:
        for start, each in zip(self.starts[:-1].tolist(), self._sets, strict=True):
            for number in range(each.manifest.num_shards):
                sha256, count = each.manifest.shard_sha256(number), _num_samples(each.manifest, number)
                path = signature_path(self._signatures, sha256, criterion, self._options.max_pixels)
                result = read_signatures(path, criterion, count)
                if result is None:
                    raise DataConfigError(f"{path}: was deleted or changed during the search; run the command again")
                yield start + int(each.manifest.cu_samples[number]), result

    def write(self, output: Path) -> None:
        """Write the list of removed samples, in the order of data sets and samples."""
        removed, kept_for = np.array(self.removed, np.int64), np.array(self._kept_for, np.int64)
        order = np.argsort(removed)
        output.parent.mkdir(parents=True, exist_ok=True)
        keys = _KeyLookup()
        with replacing(output) as file:
            for start in range(0, len(order), _WRITTEN_AT_ONCE):
                batch = order[start : start + _WRITTEN_AT_ONCE]
                for number, sample, kept_sample in zip(
                    batch.tolist(), removed[batch].tolist(), kept_for[batch].tolist(), strict=True
                ):
                    criterion = list(Criterion)[self._criteria[number]]
                    record = self._record(keys, sample, kept_sample, criterion, self._bits[number])
                    file.write(json.dumps(record).encode() + b"\n")

    def _record(
        self, keys: _KeyLookup, sample: int, kept_sample: int, criterion: Criterion, bits: int
    ) -> dict[str, Any]:
        dataset, index = self._locate(sample)
        other, at = self._locate(kept_sample)
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

    def _locate(self, sample: int) -> tuple[NamedSet, int]:
        number = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self._sets[number], sample - int(self.starts[number])


class _KeyLookup:
    """Looks up shard and key of samples. It keeps one index open, so look them up in order."""

    def __init__(self) -> None:
        self._open: tuple[NamedSet, int, ShardIndex] | None = None

    def of(self, dataset: NamedSet, index: int) -> tuple[str, str]:
        number, row = dataset.manifest.locate(index)
        if self._open is None or self._open[0] is not dataset or self._open[1] != number:
            self._open = (dataset, number, dataset.manifest.open_index(number))
        return str(self._open[2].tar_path), self._open[2].row(row).key
