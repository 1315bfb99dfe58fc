"""Lists of bad samples on disk: samples that a run excludes from its first step on, and samples that it found bad.

    data.faults.exclude   lists of earlier runs or of dedup  --> Exclusions
    RUN/faults            the run's own quarantine list      --> RunFaults

A process remembers a limited number of quarantined samples, to bound its memory. The others are tried again, with the
same result (``fault_policy``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.io.untrusted import UntrustedError, parse_json, read_lines
from data_pipeline.order.fault_policy import Fault, FaultConfig, KnownFaults

_MAX_QUARANTINED = 16384
"""Most quarantined samples that a process remembers."""


@dataclass(frozen=True)
class Exclusions:
    """Excluded samples of one data set: their numbers, ascending, and the crc32 of the key of each."""

    indices: npt.NDArray[np.int64]
    key_crc32: npt.NDArray[np.uint32]

    def position(self, index: int) -> int | None:
        """Return the position of sample ``index`` in ``indices``; None if it is not excluded."""
        found = int(np.searchsorted(self.indices, index))
        return found if found < len(self.indices) and self.indices[found] == index else None


def read_exclusions(config: FaultConfig) -> dict[str, Exclusions]:
    """Read the lists of ``config.exclude``; returns and raises as ``read_lists``."""
    return read_lists(config.exclude, "data.faults.exclude")


def read_lists(paths: Sequence[Path], asked_by: str) -> dict[str, Exclusions]:
    """Return the samples that the lists name, by data set.

    Args:
        paths: Files of JSON lines with ``dataset``, ``index`` and ``key``, as runs and dedup write them, or folders of
            such ``*.jsonl`` files (``RUN/faults``). Lines about a lost shard are ignored: the shard may be available
            again.
        asked_by: The option that names the paths, for messages.

    Raises:
        DataConfigError: a list is missing or has a malformed line.
    """
    found: dict[str, dict[int, int]] = {}
    for path in _files(paths, asked_by):
        for number, line in enumerate(_lines(path, asked_by), 1):
            try:
                record: Any = parse_json(line)
                dataset, index, key = str(record["dataset"]), int(record["index"]), str(record["key"])
                if not 0 <= index < 2**63:
                    raise ValueError(f"index {index}")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise DataConfigError(
                    f"{asked_by}: {path}:{number} is no line of a quarantine list: expected a JSON object with "
                    "dataset, index and key"
                ) from error
            if record.get("kind") == FaultKind.SHARD.value:
                continue
            found.setdefault(dataset, {})[index] = crc32(key.encode())
    return {
        dataset: Exclusions(
            np.array(sorted(keys), np.int64), np.array([keys[index] for index in sorted(keys)], np.uint32)
        )
        for dataset, keys in sorted(found.items())
    }


def _files(paths: Sequence[Path], asked_by: str) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if not files:
                raise DataConfigError(f"{asked_by}: {path} contains no list (*.jsonl)")
            yield from files
        else:
            yield path


def _lines(path: Path, asked_by: str) -> Iterator[bytes]:
    try:
        yield from read_lines(path)
    except (OSError, UntrustedError) as error:
        raise DataConfigError(f"{asked_by}: {path}: cannot be read: {error}") from error


def exclusions_digest(config: FaultConfig) -> str:
    """Return a hash of the samples that ``config.exclude`` names, for the fingerprint of a run."""
    digest = hashlib.sha256()
    for dataset, exclusions in read_exclusions(config).items():
        digest.update(f"{dataset}:{len(exclusions.indices)};".encode())
        digest.update(exclusions.indices.tobytes())
    return digest.hexdigest()


@dataclass
class RunFaults:
    """The excluded and quarantined samples of all data sets, as far as this process knows.

    Attributes:
        config: The policy.
        exclusions: Samples of ``config.exclude``, by data set.
        quarantined: The fault of each remembered quarantined sample, by data set and sample.
    """

    config: FaultConfig
    exclusions: Mapping[str, Exclusions] = field(default_factory=dict)
    quarantined: dict[tuple[str, int], SampleError] = field(default_factory=dict)

    @classmethod
    def load(cls, config: FaultConfig, quarantine: Sequence[Path] = ()) -> RunFaults:
        """Read ``config.exclude`` and the quarantine lists that this run wrote.

        Raises:
            DataConfigError: a list of ``config.exclude`` is missing or malformed, or a quarantine list is not a regular
                file or contains a line that is too long.
            OSError: a quarantine list cannot be read.
        """
        remembered: dict[tuple[str, int], SampleError] = {}
        for path in quarantine:
            for dataset, index, error in _quarantined(path):
                if len(remembered) >= _MAX_QUARANTINED:
                    break
                if config.quarantines(error.kind):
                    remembered[dataset, index] = error
        return cls(config, read_exclusions(config), remembered)

    def excluded(self, dataset: str, sample: int, known: KnownFaults, made_for: str) -> Fault | None:
        """Return the fault of a sample that ``data.faults.exclude`` names; None if it does not name the sample.

        Args:
            dataset: Name of the data set.
            sample: Number of the sample.
            known: Finds shard and key of the sample.
            made_for: What a list with another key was made for, such as another manifest; for the message.

        Raises:
            DataConfigError: the list names this number with another key.
        """
        excluded = self.exclusions.get(dataset)
        position = None if excluded is None else excluded.position(sample)
        if excluded is None or position is None:
            return None
        shard, key = known.locate(sample)
        if key != "?" and crc32(key.encode()) != int(excluded.key_crc32[position]):
            raise DataConfigError(
                f"data.faults.exclude: sample {sample} of data set {dataset} is {shard}/{key}, "
                f"but the list names another key: it was made for {made_for}"
            )
        error = SampleError("named by data.faults.exclude", kind=FaultKind.EXCLUDED, shard=shard, key=key)
        return Fault(error, counts=False)

    def recall(self, dataset: str, sample: int) -> Fault | None:
        """Return the remembered fault of a quarantined sample; None if there is none."""
        error = self.quarantined.get((dataset, sample)) if self.quarantined else None
        return None if error is None else Fault(error, recalled=True)

    def remember(self, dataset: str, sample: int, error: SampleError) -> None:
        """Remember the fault of a quarantined sample, unless ``_MAX_QUARANTINED`` are remembered already."""
        if len(self.quarantined) < _MAX_QUARANTINED:
            self.quarantined[dataset, sample] = error


def _quarantined(path: Path) -> Iterator[tuple[str, int, SampleError]]:
    """Yield data set, number and fault of each sample of a run's own list. Malformed lines are ignored.

    A killed process may have left an incomplete line.
    """
    try:
        for line in read_lines(path):
            try:
                record = parse_json(line)
                kind, shard, key = FaultKind(record["kind"]), str(record["shard"]), str(record["key"])
                error = SampleError(str(record["reason"]), kind=kind, shard=shard, key=key)
                yield str(record["dataset"]), int(record["index"]), error
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
    except UntrustedError as error:
        raise DataConfigError(
            f"{path}: {error}; remove the file: it only saves the time to try bad samples again"
        ) from error
