"""Kill a run repeatedly and compare it with an undisturbed run: ``python -m benchmarks.torture --kills 50``.

    life 1: start, train, KILL   life 2: resume (number of ranks may change), KILL   ...   last life: run to the end

Kills happen at random steps and times: SIGKILL of all processes, of one rank or of a checkpoint writer, and SIGTERM of
the launcher. Kills of a writer and a third of the others wait until a checkpoint is being written. After each kill the
newest checkpoint must verify and must not be older than the one before. At the end the losses of all steps and the
final weights are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Case, show
from mmscale.checkpoint import find_latest, verify
from mmscale.checkpoint.reshard import CheckpointReader, whole_parameter

WAYS = ("all", "one rank", "a writer", "SIGTERM")
_SAVING_SHARE = 1 / 3


@dataclass
class Tally:
    """Counts of the kills and their effects."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    while_saving: int = 0
    ranks: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """Values and failed checks by name."""

    figures: Mapping[str, Any]

    def line(self) -> str:
        """Return the values for people, one per line."""
        return "\n".join(f"{key}: {value}" for key, value in self.figures.items())

    def cases(self) -> list[Case]:
        """Return the values for programs: those of the killed run, with the undisturbed run as peer."""
        figures = self.figures
        cases = [Case(f"kills: {way}", count, {}, "kills") for way, count in figures["kills"].items()]
        cases.append(Case("kills while saving", figures["while_saving"], {}, "kills"))
        cases += [Case(f"lives on {n} ranks", lives, {}, "lives") for n, lives in figures["lives_by_ranks"].items()]
        for what, unit in (("loss", "nats"), ("weight", "absolute")):
            undisturbed = figures[f"undisturbed_{what}_difference"]
            peers = {} if undisturbed is None else {"undisturbed": undisturbed}
            cases.append(Case(f"largest {what} difference", figures[f"largest_{what}_difference"], peers, unit))
        alone = {"undisturbed": figures["undisturbed_seconds"]}
        return [
            *cases,
            Case(f"{figures['steps']} steps", figures["tortured_seconds"], alone, "s"),
            Case("complaints", len(figures["complaints"]), {}, "complaints"),
        ]


def start(config: Path, folder: Path, ranks: int, overrides: list[str]) -> subprocess.Popen[bytes]:
    words = ["launch", "local", str(config), "--ranks", str(ranks), f"run_dir={folder}", *overrides]
    command = [sys.executable, "-m", "mmscale.cli.main", *words]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def curve(folder: Path) -> list[tuple[int, float]]:
    """Return step and loss of every complete line of the metrics file."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(row["step"], row["loss"]) for row in rows]


def torture(config: Path, folder: Path, kills: int, steps: int, worlds: list[int], overrides: list[str]) -> Tally:
    """Run to the end with ``kills`` kills on the way."""
    draw, tally = random.Random(0), Tally()
    stops = sorted(draw.sample(range(2, steps - 1), kills))
    newest = -1
    for stop in [*stops, None]:
        ranks = draw.choice(worlds)
        tally.ranks.append(ranks)
        process = start(config, folder, ranks, overrides)
        if stop is None:
            if (code := process.wait()) != 0:
                tally.complaints.append(f"the last life ended with exit code {code}")
            break
        way = draw.choice(WAYS)
        saving = _wait(process, folder, stop, draw, saving=way == "a writer" or draw.random() < _SAVING_SHARE)
        tally.while_saving += saving
        tally.kills[way] += 1
        _kill(process, way, draw, tally)
        latest = find_latest(folder / "checkpoints")
        step = -1 if latest is None else int(latest.name.partition("-")[2])
        if latest is not None and (problems := verify(latest)):
            tally.complaints.append(f"after {way} at step {stop}: {problems[0]}")
        if step < newest:
            tally.complaints.append(f"after {way} at step {stop}: step {step} is the newest, it was {newest}")
        newest = step
    return tally


def _wait(process: subprocess.Popen[bytes], folder: Path, stop: int, draw: random.Random, *, saving: bool) -> bool:
    """Wait until a random time up to 0.5 s after step ``stop``, or in the next save. Return whether it is in a save."""
    while process.poll() is None and not any(step >= stop for step, _ in curve(folder)[-1:]):
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while saving and process.poll() is None and time.monotonic() < deadline:
        if any((folder / "checkpoints").glob("*.partial")):
            time.sleep(draw.uniform(0, 0.05))
            return True
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.5))
    return False


def _kill(process: subprocess.Popen[bytes], way: str, draw: random.Random, tally: Tally) -> None:
    ranks, writers = _family(process.pid)
    victims = {"one rank": ranks, "a writer": writers}.get(way, [])
    if victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(victims), signal.SIGKILL)
    elif way == "SIGTERM":
        process.terminate()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(120)
    except subprocess.TimeoutExpired:
        tally.complaints.append(f"the run outlived the death of {way} by two minutes")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _family(launcher: int) -> tuple[list[int], list[int]]:
    """Return the process ids of ranks and checkpoint writers of a launched run."""
    ranks = _children(launcher)
    below = [number for rank in ranks for number in _children(rank)]
    return ranks, [number for number in below if b"mmscale.io.writer_process" in _command(number)]


def _children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
        return [int(number) for text in lists for number in text.split()]
    return []


def _command(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference of any weight of two checkpoints; 0 if they are bit-identical."""
    worst = 0.0
    with CheckpointReader(one) as a, CheckpointReader(other) as b:
        for name in a.manifest.parameters:
            mine, theirs = whole_parameter(a, name), whole_parameter(b, name)
            if not torch.equal(mine, theirs):
                worst = max(worst, float((mine - theirs).abs().max()))
    return worst


def measure(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Yield the outcome."""
    overrides = [
        f"max_steps={arguments.steps}",
        f"checkpoint.every_steps={arguments.save_every}",
        "evaluation={sets: [], captions: null}",
        "metrics.tensorboard=false",
        "engine.precision=fp32",
        "engine.timeout_seconds=60",
        *arguments.overrides,
    ]
    worlds = [int(word) for word in arguments.ranks.split(",")]
    with tempfile.TemporaryDirectory() as name:
        whole = {ranks: Path(name) / f"whole-{ranks}" for ranks in worlds}
        torn = Path(name) / "torn"
        seconds = [run_undisturbed(arguments.config, whole[ranks], ranks, overrides) for ranks in worlds]
        began = time.monotonic()
        tally = torture(arguments.config, torn, arguments.kills, arguments.steps, worlds, overrides)
        tortured_seconds = time.monotonic() - began
        first = whole[worlds[0]]
        if [step for step, _ in curve(torn)] != [step for step, _ in curve(first)]:
            tally.complaints.append("the steps in the metrics are not those of the undisturbed run")
        if tally.complaints:
            print((Path(name) / "torn.log").read_text()[-3000:], file=sys.stderr)
        tortured = differences(first, torn)
        # The difference that rounding alone causes: sums over other numbers of ranks.
        undisturbed = [differences(first, whole[ranks]) for ranks in worlds[1:]]
    for complaint in tally.complaints:
        print(complaint, file=sys.stderr)
    figures = {
        "steps": arguments.steps,
        "kills": tally.kills,
        "while_saving": tally.while_saving,
        "lives_by_ranks": {str(ranks): tally.ranks.count(ranks) for ranks in worlds},
        "largest_loss_difference": tortured[0],
        "largest_weight_difference": tortured[1],
        "undisturbed_loss_difference": max((loss for loss, _ in undisturbed), default=None),
        "undisturbed_weight_difference": max((weight for _, weight in undisturbed), default=None),
        "undisturbed_seconds": round(seconds[0], 1),
        "tortured_seconds": round(tortured_seconds, 1),
        "goodput": round(seconds[0] / tortured_seconds, 3),
        "complaints": tally.complaints,
    }
    yield Outcome(figures)


def run_undisturbed(config: Path, folder: Path, ranks: int, overrides: list[str]) -> float:
    """Run without kills and return its seconds."""
    began = time.monotonic()
    if start(config, folder, ranks, overrides).wait() != 0:
        raise SystemExit((folder.parent / f"{folder.name}.log").read_text()[-2000:])
    return time.monotonic() - began


def differences(one: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of the losses of two runs, and of their final weights."""
    losses = [abs(a - b) for (_, a), (_, b) in zip(curve(one), curve(other), strict=False)]
    ends = [find_latest(folder / "checkpoints") for folder in (one, other)]
    if ends[0] is None or ends[1] is None:
        raise SystemExit(f"{one} or {other} left no whole checkpoint")
    return max(losses, default=0.0), largest_difference(ends[0], ends[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument(
        "--ranks", default="2", help="numbers of ranks to choose from; each also gets an undisturbed run"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    arguments = parser.parse_args()
    show("torture", lambda: measure(arguments), arguments.json)


if __name__ == "__main__":
    main()
