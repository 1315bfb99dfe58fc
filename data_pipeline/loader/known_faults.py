"""What a process knows of the bad samples of a data set, so that it does not try in vain.

    quarantine lists of the run --> SetFaults <-- lost shards, faults met by this process
    data.faults.exclude  ---------^

Memory is bounded: of quarantined samples a few thousand are held, and one that is not held is tried again, which ends
alike (``fault_policy``). Not for: deciding what a fault does (``fault_policy``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import (
    DataConfigError,
    FaultKind,
    ManifestError,
    ReplacedError,
    SampleError,
    ShardError,
    TooManyFaultsError,
)
from data_pipeline.io.untrusted import UntrustedError, parse_json, read_lines
from data_pipeline.order.exclusions import Exclusions, read_exclusions
from data_pipeline.order.fault_policy import Fault, FaultConfig
from data_pipeline.shards.sample_reader import SampleReader

_MAX_HELD = 16384
_FAILED_READS = 3


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

    def hold(self, dataset: str, sample: int, error: SampleError) -> None:
        """Holds a quarantined sample, while there is room."""
        if len(self.quarantined) < _MAX_HELD:
            self.quarantined[dataset, sample] = error


class SetFaults:
    """Bad samples and lost shards of one data set, as far as this process knows.

    Args:
        run: What the data sets share.
        reader: Of this data set.

    Raises:
        DataConfigError: every sample of the data set is excluded.
    """

    def __init__(self, run: RunFaults, reader: SampleReader) -> None:
        self._run, self._reader = run, reader
        self._excluded = run.exclusions.get(reader.dataset)
        self._lost: dict[int, SampleError] = {}
        self._lost_samples = 0
        self._failed_reads: dict[int, int] = {}
        if self._excluded is not None and len(self._excluded.indices) >= reader.manifest.num_samples:
            raise DataConfigError(f"data set {reader.dataset}: data.faults.exclude names every sample of it")

    def of(self, sample: int) -> KnownSample:
        """The view that ``FaultPolicy.attempt`` takes."""
        return KnownSample(self, sample)

    def recall(self, sample: int) -> Fault | None:
        """The fault of a sample that need not be tried."""
        if self._excluded is not None and (at := self._excluded.position(sample)) is not None:
            return self._exclude(sample, int(self._excluded.key_crc32[at]))
        if self._lost:
            error = self._lost.get(self._reader.manifest.locate(sample)[0])
            if error is not None:
                return Fault(error, counts=False, again=True)
        if self._run.quarantined:
            error = self._run.quarantined.get((self._reader.dataset, sample))
            if error is not None:
                return Fault(error, again=True)
        return None

    def _exclude(self, sample: int, key_crc32: int) -> Fault:
        try:
            shard, key = self._reader.where(sample)
        except (ShardError, ManifestError):  # Its shard is lost; left out it is all the same.
            shard, key = self._shard_name(sample), "?"
        if key != "?" and crc32(key.encode()) != key_crc32:
            raise DataConfigError(
                f"data.faults.exclude: sample {sample} of data set {self._reader.dataset} is {shard}/{key}, "
                "the list names another key: it was made for another manifest"
            )
        reason = "named by data.faults.exclude"
        return Fault(SampleError(reason, kind=FaultKind.EXCLUDED, shard=shard, key=key), counts=False)

    def locate(self, sample: int) -> tuple[str, str]:
        """Shard and key, the key unknown if the shard is lost."""
        try:
            return self._reader.where(sample)
        except (ShardError, ManifestError):
            return self._shard_name(sample), "?"

    def offset(self, sample: int) -> int | None:
        """First byte of a sample in its shard; None if the shard is lost, which is not opened again for this."""
        if self._lost and self._reader.manifest.locate(sample)[0] in self._lost:
            return None
        try:
            return self._reader.offset(sample)
        except (ShardError, ManifestError):
            return None

    def _shard_name(self, sample: int) -> str:
        manifest = self._reader.manifest
        return str(manifest.shard_location(manifest.locate(sample)[0]))

    def shard_failed(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """A shard that cannot be opened anew, was replaced, or fails three reads in a row, is lost; else one sample is.

        Raises:
            TooManyFaultsError: lost shards hold more than ``max_share`` of the data set.
        """
        number = self._reader.manifest.locate(sample)[0]
        self._reader.forget(number)
        key = "?"
        try:
            key = self._reader.where(sample)[1]
            self._failed_reads[number] = self._failed_reads.get(number, 0) + 1
            lost = isinstance(error, ReplacedError) or self._failed_reads[number] >= _FAILED_READS
        except (ShardError, ManifestError):
            lost = True
        fault = SampleError(str(error), kind=FaultKind.SHARD, shard=self._shard_name(sample), key=key)
        if lost:
            self._lose(number, fault)
        return Fault(fault, counts=not lost)

    def _lose(self, number: int, fault: SampleError) -> None:
        manifest, config = self._reader.manifest, self._run.config
        self._lost[number] = fault.located(fault.shard, "?")
        self._lost_samples += int(manifest.cu_samples[number + 1] - manifest.cu_samples[number])
        total = manifest.num_samples
        if self._lost_samples > config.max_share * total or self._lost_samples == total:
            raise TooManyFaultsError(
                f"{len(self._lost)} of the {manifest.num_shards} shards of data set {self._reader.dataset} are lost, "
                f"with {self._lost_samples} of {total} samples (data.faults.max_share={config.max_share:g}); "
                f"the last: {fault}"
            )

    def keep(self, sample: int, error: SampleError) -> None:
        """Holds a quarantined sample, while there is room."""
        self._run.hold(self._reader.dataset, sample, error)

    def succeeded(self, sample: int) -> None:
        """Ends the row of failed reads of the sample's shard."""
        if self._failed_reads:
            self._failed_reads.pop(self._reader.manifest.locate(sample)[0], None)


@dataclass(frozen=True)
class KnownSample:
    """One sample of a ``SetFaults``: a ``faults.Known``."""

    faults: SetFaults
    sample: int

    def recall(self) -> Fault | None:
        return self.faults.recall(self.sample)

    def locate(self) -> tuple[str, str]:
        return self.faults.locate(self.sample)

    def offset(self) -> int | None:
        return self.faults.offset(self.sample)

    def shard_failed(self, error: ShardError | ManifestError) -> Fault:
        return self.faults.shard_failed(self.sample, error)

    def keep(self, error: SampleError) -> None:
        self.faults.keep(self.sample, error)

    def succeeded(self) -> None:
        self.faults.succeeded(self.sample)


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
