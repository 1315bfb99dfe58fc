"""Samples per second of the loader and its peers, on the same samples with the same decoder.

    python -m benchmarks.loader
    python -m benchmarks.loader --json --peers-env ~/.cache/mmscale/peers-env

    scenario    raw (bytes and text) | exact | fast (224 px and token ids) | resume (at 90 % of an epoch, until the
                first sample, or the first batch for loaders of batches)
    workers     0 (all work in the iterating process) and 2
    values      samples per second, and samples per core-second (CPU time of the process and all its children)

Each value is the median of repeats that take turns, each in a separate process after a warm-up. The files are in the
page cache. ``bare`` has no loader: it runs the decoder over bytes in memory, in as many processes as workers. The first
run installs peers that need other package versions than this project in a separate environment at ``--peers-env``.
Packing: ``benchmarks.packing``; order at scale: ``benchmarks.order_scale``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.job import Job, Scenario, write_photos
from benchmarks.report import Case, show

REPOSITORY = Path(__file__).resolve().parents[1]
OURS, BARE = "ours", "bare"
PEERS = {
    "open_clip": "webdataset as open_clip uses it",
    "energon": "megatron-energon",
    "mosaic": "mosaicml-streaming",
    "litdata_chunks": "litdata",
}
APART = {"mosaic": "mosaicml-streaming", "litdata_chunks": "litdata"}
"""Peers of the separate environment, and their packages."""
WORKERS = (0, 2)

Figures = dict[str, float]


@dataclass(frozen=True)
class LoaderRow:
    """Values of each runner in one scenario with one number of workers.

    Attributes:
        unit: ``samples/s``, ``samples/core-s``, or ``s`` (lower is better).
    """

    scenario: Scenario
    workers: int
    unit: str
    figures: Figures

    @property
    def beside_peers(self) -> Case:
        """Return our value and those of the measured peers."""
        return self._case("", PEERS)

    @property
    def beside_bare(self) -> Case:
        """Return our value and that of the decoder without a loader, if it was measured."""
        return self._case(", beside no loader", (BARE,))

    def _case(self, beside: str, names: Iterable[str]) -> Case:
        peers = {name: self.figures[name] for name in names if name in self.figures}
        case = f"{self.scenario.value}, {self.workers} workers{beside}"
        return Case(case, self.figures[OURS], peers, self.unit, lower_is_better=self.unit == "s")


@dataclass(frozen=True)
class Table:
    """All rows, and the reason for each peer that is left out."""

    rows: Sequence[LoaderRow]
    left_out: Sequence[str]

    def line(self) -> str:
        """Return the rows for people, in Markdown, and what the peers are."""
        there = [name for name in PEERS if any(name in row.figures for row in self.rows)]
        return "\n".join([table(self.rows), *(f"{name}: {PEERS[name]}" for name in there), *self.left_out])

    def cases(self) -> list[Case]:
        """Return the figures for programs; each figure that the bare decoder has too is a second case."""
        return [
            case
            for row in self.rows
            for case in ([row.beside_peers, row.beside_bare] if BARE in row.figures else [row.beside_peers])
        ]


class PeersMissingError(Exception):
    """The environment of the peers cannot be created."""


def peers_python(folder: Path) -> Path:
    """Return the Python of the peers' environment; create the environment if it is missing.

    The new environment also imports packages of this one, so that torch and the decoders are the same.

    Raises:
        PeersMissingError: pip cannot install the peers.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "peers.txt"
    if done.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(purelib) / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [str(python), "-m", "pip", "install", "--quiet", *APART.values()]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise PeersMissingError(f"{' '.join(command)} failed: {(result.stdout.strip().splitlines() or [''])[-1]}")
    frozen = [str(python), "-m", "pip", "freeze"]
    done.write_text(subprocess.run(frozen, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return python


class Runner:
    """A process that runs ``benchmarks.peers.run``."""

    def __init__(self, name: str, python: Path) -> None:
        self._name = name
        self._noise = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close().
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.run", name],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
        )

    def do(self, **task: object) -> Figures:
        """Run one task; exit the benchmark if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            answer: Figures = json.loads(self._process.stdout.readline() or '{"failed": 1}')
        except BrokenPipeError:
            answer = {"failed": 1}
        if "failed" in answer:
            self._noise.seek(0)
            raise SystemExit(f"{self._name}: {task} failed:\n{self._noise.read()[-4000:]}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._noise.close()


def rows_of(runners: dict[str, Runner], job: Job, seconds: float, repeats: int) -> list[LoaderRow]:
    """Return the rows of all runners: medians of repeats that take turns."""
    names = [name for name in runners if name != BARE or job.is_decoded]
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            found[name].append(runners[name].do(measure=job.dump(), seconds=seconds))
    if job.scenario is Scenario.RESUME:
        return [LoaderRow(job.scenario, job.workers, "s", _median(found, lambda f: f["seconds"]))]
    per_second = _median(found, lambda f: f["samples"] / f["seconds"])
    per_core = _median(found, lambda f: f["samples"] / f["cpu_seconds"])
    return [
        LoaderRow(job.scenario, job.workers, "samples/s", per_second),
        LoaderRow(job.scenario, job.workers, "samples/core-s", per_core),
    ]


def _median(found: dict[str, list[Figures]], figure: Callable[[Figures], float]) -> Figures:
    return {name: statistics.median(map(figure, repeats)) for name, repeats in found.items()}


def measure(options: argparse.Namespace) -> Iterator[Table]:
    """Yield the table of all requested scenarios."""
    pythons = dict.fromkeys((OURS, BARE), Path(sys.executable))
    left_out = []
    chosen = [name.strip() for name in options.peers.split(",") if name.strip()]
    for name in chosen:
        if name not in PEERS:
            raise SystemExit(f"--peers {name}: the peers are {', '.join(PEERS)}")
        try:
            pythons[name] = peers_python(options.peers_env) if name in APART else Path(sys.executable)
        except PeersMissingError as error:
            left_out.append(f"{PEERS[name]} is left out: {error}")
            print(left_out[-1], file=sys.stderr)
    folder = options.data / f"photos-{options.samples}"
    write_photos(folder, options.samples)
    runners = {name: Runner(name, python) for name, python in pythons.items()}
    try:
        for runner in runners.values():
            runner.do(prepare=str(folder))
        jobs = [Job(folder, Scenario(name), workers) for name in options.scenarios.split(",") for workers in WORKERS]
        rows = []
        for job in jobs:
            rows += rows_of(runners, job, options.seconds, options.repeats)
            print(f"measured {job.scenario.value} with {job.workers} workers", file=sys.stderr)
    finally:
        for runner in runners.values():
            runner.close()
    yield Table(rows, left_out)


def table(rows: Sequence[LoaderRow]) -> str:
    """Return the rows as a Markdown table."""
    names = [name for name in (OURS, *PEERS, BARE) if any(name in row.figures for row in rows)]
    lines = ["| scenario | workers | unit | " + " | ".join(names) + " | to best peer | to bare |"]
    lines.append("|---|--:|---|" + "--:|" * (len(names) + 2))
    for row in rows:
        figures = [_figure(row.figures.get(name), row.unit) for name in names]
        ratios = [_figure(case.ratio, "ratio") for case in (row.beside_peers, row.beside_bare)]
        lines.append(f"| {row.scenario.value} | {row.workers} | {row.unit} | " + " | ".join(figures + ratios) + " |")
    return "\n".join(lines)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s":
        return f"{value:.4f}"
    return f"{value:.2f}" if unit == "ratio" else f"{value:,.0f}"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmscale"
    parser = argparse.ArgumentParser(description="Compare the loader with its peers.")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--data", type=Path, default=cache / "benchmarks", help="folder of the samples (%(default)s)")
    parser.add_argument(
        "--peers-env",
        type=Path,
        default=cache / "peers-env",
        help="environment for peers that need other package versions (%(default)s)",
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="peers to measure (%(default)s)")
    parser.add_argument(
        "--scenarios", default=",".join(s.value for s in Scenario), help="scenarios to measure (%(default)s)"
    )
    parser.add_argument("--samples", type=int, default=2000, help="samples per epoch, 100 kB each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of one measurement (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each value (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = options()
    show("loader", lambda: measure(chosen), chosen.json)
