"""Lists of bad samples on disk: those that a run leaves out from its first step on, and those that it found itself.

    data.faults.exclude   lists of earlier runs or of dedup  --> Exclusions
    RUN/faults            the run's own quarantine list      --> RunFaults

Memory is bounded: of quarantined samples a few thousand are held, and one that is not held is tried again, which ends
alike (``fault_policy``).
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

_MAX_HELD = 16384


@dataclass(frozen=True)
class Exclusions:
    """Samples of one data set to leave out: ``indices`` ascending, and the crc32 of each one's key."""

    indices: npt.NDArray[np.int64]
    key_crc32: npt.NDArray[np.uint32]

    def position(self, index: int) -> int | None:
        """Where ``index`` stands in the list; None if it does not."""
        at = int(np.searchsorted(self.indices, index))
        return at if at < len(self.indices) and self.indices[at] == index else None


def read_exclusions(config: FaultConfig) -> dict[str, Exclusions]:
    """The samples that the lists of ``config.exclude`` name, by data set; raises as ``read_lists``."""
    return read_lists(config.exclude, "data.faults.exclude")


def read_lists(paths: Sequence[Path], asked_by: str) -> dict[str, Exclusions]:
    """The samples that lists name, by data set.

    Args:
        paths: Files of JSON lines with ``dataset``, ``index`` and ``key``, as runs and dedup write them, or folders of
            such ``*.jsonl`` files (``RUN/faults``). Lines about a lost shard are passed over: it may be back.
        asked_by: The option that names them, for messages.

    Raises:
        DataConfigError: a list is missing, or a line of it is no line of a quarantine list.
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
                raise DataConfigError(f"{asked_by}: {path}:{number} is no line of a quarantine list") from error
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
                raise DataConfigError(f"{asked_by}: {path} holds no list (*.jsonl)")
            yield from files
        else:
            yield path


def _lines(path: Path, asked_by: str) -> Iterator[bytes]:
    try:
        yield from read_lines(path)
    except (OSError, UntrustedError) as error:
        raise DataConfigError(f"{asked_by}: {path}: cannot be read: {error}") from error


def exclusions_digest(config: FaultConfig) -> str:
    """Hash of what ``config.exclude`` names, for the fingerprint of a run."""
    digest = hashlib.sha256()
    for dataset, exclusions in read_exclusions(config).items():
        digest.update(f"{dataset}:{len(exclusions.indices)};".encode())
        digest.update(exclusions.indices.tobytes())
    return digest.hexdigest()


@dataclass
class RunFaults:
    """What all data sets of a process share.

    Attributes:
        config: The policy.
        exclusions: By data set, from ``config.exclude``.
        quarantined: By data set and sample, the fault that put it there.
    """

    config: FaultConfig
    exclusions: Mapping[str, Exclusions] = field(default_factory=dict)
    quarantined: dict[tuple[str, int], SampleError] = field(default_factory=dict)

    @classmethod
    def load(cls, config: FaultConfig, quarantine: Sequence[Path] = ()) -> RunFaults:
        """Reads ``config.exclude`` and the quarantine lists that this run wrote.

        Raises:
            DataConfigError: a list of ``config.exclude`` cannot be read.
        """
        held: dict[tuple[str, int], SampleError] = {}
        for path in quarantine:
            for dataset, index, error in _quarantined(path):
                if len(held) >= _MAX_HELD:
                    break
                if config.quarantines(error.kind):
                    held[dataset, index] = error
        return cls(config, read_exclusions(config), held)

    def excluded(self, dataset: str, sample: int, known: KnownFaults, made_for: str) -> Fault | None:
        """The fault of a sample that ``data.faults.exclude`` names; None if it does not.

        Args:
            dataset: Its data set.
            sample: Its number.
            known: Finds its shard and key.
            made_for: What a list with another key was made for, for the message.

        Raises:
            DataConfigError: the list names another key.
        """
        excluded = self.exclusions.get(dataset)
        at = None if excluded is None else excluded.position(sample)
        if excluded is None or at is None:
            return None
        shard, key = known.locate(sample)
        if key != "?" and crc32(key.encode()) != int(excluded.key_crc32[at]):
            raise DataConfigError(
                f"data.faults.exclude: sample {sample} of data set {dataset} is {shard}/{key}, "
                f"the list names another key: it was made for {made_for}"
            )
        error = SampleError("named by data.faults.exclude", kind=FaultKind.EXCLUDED, shard=shard, key=key)
        return Fault(error, counts=False)

    def recall(self, dataset: str, sample: int) -> Fault | None:
        """The fault of a sample that is held as quarantined; None if it is not."""
        error = self.quarantined.get((dataset, sample)) if self.quarantined else None
        return None if error is None else Fault(error, again=True)

    def hold(self, dataset: str, sample: int, error: SampleError) -> None:
        """Holds a quarantined sample, while there is room."""
        if len(self.quarantined) < _MAX_HELD:
            self.quarantined[dataset, sample] = error


def _quarantined(path: Path) -> Iterator[tuple[str, int, SampleError]]:
    """Whole lines of a list that a run writes; a torn one was never finished."""
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
        raise DataConfigError(f"{path}: {error}; remove it: it only spares trying bad samples again") from error
