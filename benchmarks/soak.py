"""Soak test: load from a faulty S3 server with damaged samples; check memory growth and that each good sample arrives.

    python -m benchmarks.soak --minutes 30 --json

A separate process runs an S3 server (SeaweedFS) behind a proxy that spoils one response in twenty: 500, 503, 429,
resets, truncations, slow bodies, flipped bits. The data set is synthetic; one sample in twenty has a damaged image,
text, document or checksum. The disk cache holds a third of the data, so the network is in use all the time.

Every document is marked in a bitmap of its epoch; each good sample must arrive exactly once per epoch. Memory is the
resident size of the loader's process and its workers. Its slope is a least-squares fit, over the time after the first
fifth and over the second half. Growth of allocators and connection pools levels off; a leak does not. The exit code is
1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import Case, show
from benchmarks.servers import KEY, SECRET, flaky_s3
from benchmarks.soak_data import write_damaged_set
from data_pipeline.config import DataConfig
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.storage.config import StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.objects import PAGE_BYTES
from data_pipeline.storage.storage import Storage

TOKENIZER = Path("examples/emoji/tokenizer.model")
SAMPLE_SECONDS = 2.0
WARM_UP_SHARE = 0.2
UNITS = {
    "minutes": "min",
    "samples_per_second": "samples/s",
    "samples": "samples",
    "steps": "steps",
    "samples_of_an_epoch": "samples",
    "damaged_of_an_epoch": "samples",
    "epochs_complete": "epochs",
    "stored_mib": "MiB",
}
"""Units of the values that are single numbers."""


class Delivery:
    """Records, by epoch, which samples arrived or were skipped. Every sample must do exactly one of the two, once.

    Args:
        bad: True for each damaged sample.
    """

    def __init__(self, bad: npt.NDArray[np.bool_]) -> None:
        self.bad = bad
        self.complaints: list[str] = []
        self.complete: set[int] = set()
        self._open: dict[int, npt.NDArray[np.bool_]] = {}
        self.newest = -1

    def arrived(self, epoch: int, sample: int) -> None:
        """Record that a sample arrived in a document."""
        if self.bad[sample]:
            self._complain(f"sample {sample}, which is damaged, was delivered in epoch {epoch}")
        self._tick(epoch, sample)

    def skipped(self, epoch: int, sample: int, kind: str) -> None:
        """Record that a sample was skipped."""
        if not self.bad[sample]:
            self._complain(f"sample {sample}, which is sound, was left out in epoch {epoch}: {kind}")
        self._tick(epoch, sample)

    def missing(self, epoch: int) -> int:
        """Return the number of samples of a started epoch that neither arrived nor were skipped."""
        return 0 if epoch in self.complete else int((~self._open[epoch]).sum())

    def is_complete(self, through: int) -> bool:
        """Return whether the epochs up to ``through`` are complete."""
        return all(epoch in self.complete for epoch in range(through + 1))

    def _tick(self, epoch: int, sample: int) -> None:
        self.newest = max(self.newest, epoch)
        if epoch in self.complete:
            self._complain(f"sample {sample} came a second time in epoch {epoch}")
            return
        seen = self._open.setdefault(epoch, np.zeros(len(self.bad), np.bool_))
        if seen[sample]:
            self._complain(f"sample {sample} came a second time in epoch {epoch}")
        seen[sample] = True
        if seen.all():
            self.complete.add(epoch)
            del self._open[epoch]

    def _complain(self, text: str) -> None:
        if len(self.complaints) < 100:
            self.complaints.append(text)


@dataclass(frozen=True)
class Slope:
    """Slope of a least-squares line: ``value`` per second, and half the width of its 95 % confidence interval."""

    value: float
    half_width: float


def slope(seconds: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> Slope:
    """Fit a line by least squares.

    The lag-1 correlation of the residuals reduces the effective number of readings (Bartlett).
    A single reading, as in a short soak on a busy machine, gives 0.
    """
    if len(values) < 2:
        return Slope(0.0, 0.0)
    centred = seconds - seconds.mean()
    spread = float((centred**2).sum())
    value = float((centred * values).sum()) / spread
    rest = values - values.mean() - value * centred
    total = float((rest**2).sum())
    lag = float((rest[1:] * rest[:-1]).sum()) / total if total else 0.0
    effective = max(3.0, len(values) * (1 - lag) / (1 + lag)) if lag > 0 else float(len(values))
    variance = total / max(1.0, effective - 2) / (spread * effective / len(values))
    return Slope(value, 1.96 * variance**0.5)


def resident_bytes(pid: int, without: int | None = None) -> int:
    """Return the resident memory of a process and its descendants, without the tree of ``without``; Linux only."""
    total, children = 0, [pid]
    while children:
        pid = children.pop()
        if pid == without:
            continue
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            for thread in os.scandir(f"/proc/{pid}/task"):
                children += map(int, Path(thread.path, "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # The process ended meanwhile.
            continue
    return total


@dataclass
class Watch:
    """Records deliveries and memory while the loader runs."""

    server_pid: int
    start: float = field(default_factory=time.monotonic)
    seconds: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    num_samples: int = 0
    num_steps: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def step(self, step: StepBatch, delivery: Delivery) -> None:
        """Record the samples of a step and, at intervals, the memory."""
        for microbatch in step.microbatches:
            for origin in microbatch.provenance:
                if origin is not None:
                    delivery.arrived(origin.epoch, origin.index)
        for skip in step.skipped:
            delivery.skipped(skip.epoch, skip.index, skip.kind.value)
            self.faults[skip.kind.value] += 1
        self.num_samples += step.num_samples
        self.num_steps += 1
        if not self.seconds or self.elapsed - self.seconds[-1] >= SAMPLE_SECONDS:
            self.seconds.append(self.elapsed)
            self.resident.append(resident_bytes(os.getpid(), without=self.server_pid) / 2**20)

    def memory(self) -> dict[str, float]:
        """Return memory in MiB and MiB per hour: without the first fifth of the time, and in the second half."""
        seconds, resident = np.array(self.seconds), np.array(self.resident)
        late, half = (seconds >= share * seconds[-1] for share in (WARM_UP_SHARE, 0.5))
        line, last = (slope(seconds[part], resident[part]) for part in (late, half))
        return {
            "slope_mib_per_hour": round(3600 * line.value, 2),
            "slope_95_percent_half_width": round(3600 * line.half_width, 2),
            "second_half_slope_mib_per_hour": round(3600 * last.value, 2),
            "second_half_slope_95_percent_half_width": round(3600 * last.half_width, 2),
            "first_mib": round(float(resident[late][0]), 1),
            "median_mib": round(float(np.median(resident[late])), 1),
            "most_mib": round(float(resident.max()), 1),
            "readings": int(late.sum()),
        }


@dataclass(frozen=True)
class Soaked:
    """Result of a soak.

    Attributes:
        figures: Values and failed checks by name.
    """

    figures: Mapping[str, Any]

    def line(self) -> str:
        """Return the values for people, one per line."""
        return "\n".join(f"{key:<20}  {json.dumps(value)}" for key, value in self.figures.items())

    def cases(self) -> list[Case]:
        """Return the values for programs. Failed checks are printed to stderr."""
        memory = self.figures["memory"]
        cases = [Case(key.replace("_", " "), self.figures[key], {}, unit) for key, unit in UNITS.items()]
        cases += [Case(f"left out: {kind}", count, {}, "samples") for kind, count in self.figures["left_out"].items()]
        cases += [Case(f"answers: {kind}", count, {}, "answers") for kind, count in self.figures["answers"].items()]
        for key, value in memory.items():
            unit = "MiB/h" if "slope" in key else "readings" if key == "readings" else "MiB"
            cases.append(Case(f"memory: {key.replace('_', ' ')}", value, {}, unit))
        return [*cases, Case("complaints", len(self.figures["complaints"]), {}, "complaints")]


def soak(minutes: float, num_samples: int, workers: int, seed: int) -> Iterator[Soaked]:
    """Load for the given time, then to the end of every started epoch; yield all values and failed checks."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name, account(), flaky_s3(one_in=20, seed=seed) as server:
        folder = Path(name)
        damaged = write_damaged_set(folder / "set", num_samples, seed)
        stored = sum(path.stat().st_size for path in (folder / "set").iterdir())
        upload(folder / "set", server.direct_url)
        config = config_of(server.url, folder / "cache", max(stored // 3, 4 * PAGE_BYTES), workers)
        delivery = Delivery(damaged.bad)
        watch = Watch(server.pid)
        last: int | None = None
        with Loader(config, MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(4, 4)), seed=seed) as loader:
            for step in loader:
                watch.step(step, delivery)
                if last is None and watch.elapsed >= 60 * minutes:
                    last = delivery.newest
                if last is not None and (delivery.is_complete(last) or delivery.newest > last + 2):
                    break
        assert last is not None, "a loader without an end"
        if not delivery.is_complete(last):
            delivery.complaints.append(f"epochs to {last} were begun, complete are {sorted(delivery.complete)}")
        figures = {
            "minutes": round(watch.elapsed / 60, 2),
            "workers": workers,
            "samples_per_second": round(watch.num_samples / watch.elapsed, 1),
            "samples": watch.num_samples,
            "steps": watch.num_steps,
            "samples_of_an_epoch": num_samples,
            "damaged_of_an_epoch": int(damaged.bad.sum()),
            "epochs_complete": len(delivery.complete),
            "left_out": dict(sorted(watch.faults.items())),
            "answers": server.counts(),
            "stored_mib": round(stored / 2**20, 1),
            "memory": watch.memory(),
            "complaints": delivery.complaints,
        }
    yield Soaked(figures)


@contextmanager
def account() -> Iterator[None]:
    """Set the credentials of the server's account in the environment, where the storage reads them."""
    os.environ.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION="us-east-1")
    yield


def upload(folder: Path, endpoint: str) -> None:
    """Upload every file of a folder to the bucket ``soak``."""
    with Storage(StorageConfig(endpoint=endpoint, allow_http=True)) as storage:
        for path in sorted(folder.iterdir()):
            url = Url(f"s3://soak/set/{path.name}")
            storage.store(url).write(url, path.read_bytes())


def config_of(endpoint: str, cache: Path, cache_bytes: int, workers: int) -> DataConfig:
    """Return the config: four lanes over the bucket, every fault quarantined or skipped."""
    dataset = {
        "name": "soak",
        "manifest": "s3://soak/set/set.manifest",
        "transforms": {"kind": "fixed", "augment": {"shift": 0.1, "flip": 0.5}},
    }
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": TOKENIZER},
            "datasets": [dataset],
            "lanes": 4,
            "workers": workers,
            "packing": {"max_tokens": 1024, "look_ahead": 8},
            "faults": {"on_error": "skip", "decode": "quarantine"},
            "storage": {
                "endpoint": endpoint,
                "allow_http": True,
                "timeout_seconds": 5,
                "read_ahead_bytes": 16 * 2**20,
            },
            "cache": {"folder": str(cache), "max_bytes": cache_bytes},
        }
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes of loading, then the epochs are finished")
    parser.add_argument("--samples", type=int, default=8000, help="samples per epoch")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the loader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()

    def measure() -> Iterator[Soaked]:
        return soak(options.minutes, options.samples, options.workers, options.seed)

    (soaked,) = show("soak", measure, options.json, {"workers": options.workers})
    if complaints := soaked.figures["complaints"]:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
