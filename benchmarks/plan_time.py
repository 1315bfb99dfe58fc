"""The step time that ``mmscale plan`` predicts after calibration, beside the measured one: ``[--json] [--ranks 1 2]``.

    python -m benchmarks.plan_time

For each configuration and number of ranks on the CPU, the ranks alternate:

    calibrate    the measurements of ``mmscale plan --calibrate`` with the model of CONFIG: at most a few blocks
    plan         the step time of ``mmscale plan`` for the calibrated machine
    steps        the truth: the median step of the whole model with the batches of its loader

The least of all rounds counts on both sides, because other programs only add time. ``--clock cpu`` measures both sides
in processor time of the ranks, which other programs disturb less than wall time. It does not contain waits for
messages.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.report import Case, show
from benchmarks.steps.ranks import Side
from mmscale.config import load
from mmscale.dist import World, all_reduce_max, all_reduce_sum_list
from mmscale.plan.calibrate import Measurement
from mmscale.plan.cluster import Accelerator, Cluster
from mmscale.plan.load import stage_load
from mmscale.plan.step_time import StepTime, step_time
from mmscale.run.config import RunConfig

CONFIGS = {
    "dense": "configs/recipes/emoji-text.yaml",
    "experts": "configs/recipes/emoji-moe.yaml",
    "vision": "configs/quickstart.yaml",
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_SMALL = ["data.workers=0", "data.lanes=2", "data.packing.max_tokens=512", "engine.micro_lanes=1", "engine.device=cpu"]
_FIRST = 2
"""Steps that are not counted: allocation, and DeepSpeed's record of the order of modules."""


class TimeRank:
    """One process that calibrates and trains."""

    def __init__(self, side: str, world: World) -> None:
        del side
        self.world = world

    def calibrate(self, config: RunConfig, clock: str) -> Accelerator:
        """Return this machine's rates. All ranks must call."""
        measured = Measurement(config, self.world, lambda name: None, CLOCKS[clock]).measure()
        return Accelerator.model_validate(measured)

    def steps(self, config: RunConfig, clock: str, steps: int) -> list[float]:
        """Return the seconds of each step of the slowest rank. All ranks must call."""
        from mmscale.engine.engine import Engine
        from mmscale.objectives.choice import choose_objective
        from mmscale.run.session import open_loader
        from mmscale.run.train import build

        now, found = CLOCKS[clock], []
        objective = choose_objective(config.stage_model(0), config.stages[0], self.world, ())
        engine = Engine(build(config, self.world, 0), objective, config.stages[0], config.engine, self.world)
        with closing(open_loader(config, self.world)) as loader:
            for step, batch in enumerate(itertools.islice(loader, steps + _FIRST)):
                microbatches = [replace(each, dropout_key=(0, step)) for each in batch.microbatches]
                all_reduce_sum_list(self.world, [0.0])
                start = now()
                engine.train_step(microbatches)
                found.append(all_reduce_max(self.world, now() - start))
        engine.close()
        return found[_FIRST:]


@dataclass(frozen=True)
class TimeRow:
    """One configuration on one number of ranks.

    Attributes:
        measured: Median seconds of a step in the fastest round.
        planned: The fastest plan.
    """

    name: str
    ranks: int
    zero_stage: int
    measured: float
    planned: StepTime

    @property
    def error(self) -> float:
        """Relative error of the planned seconds."""
        return self.planned.seconds / self.measured - 1

    def line(self) -> str:
        """Return the row for people."""
        parts = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in self.planned.parts().items() if seconds)
        return (
            f"{self.name}, {self.ranks} ranks, ZeRO {self.zero_stage}: measured {1000 * self.measured:.0f} ms a step, "
            f"planned {1000 * self.planned.seconds:.0f} ms, error {self.error:+.0%}; {parts}"
        )

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        name = f"{self.name}, {self.ranks} ranks, ZeRO {self.zero_stage}: step"
        return [Case(name, self.planned.seconds, {"measured": self.measured}, "s")]


def measure(args: argparse.Namespace) -> Iterator[TimeRow]:
    """Yield a row for each number of ranks, configuration and ZeRO stage."""
    for ranks in args.ranks:
        with closing(Side("plan", ranks, 1, TimeRank)) as side:
            for name, stage in itertools.product(args.configs, args.stages):
                words = [*_SMALL, f"engine.zero_stage={stage}"]
                config = load(Path(CONFIGS[name]), words, RunConfig).value
                work, plans, medians = stage_load(config, 0), list[StepTime](), list[float]()
                for _ in range(args.rounds):
                    device = side.order("calibrate", config=config, clock=args.clock)
                    cluster = Cluster(1, ranks, device)
                    plans.append(step_time(config, 0, work, cluster, device.best_precision()))
                    seconds = side.order("steps", config=config, clock=args.clock, steps=args.steps)
                    medians.append(statistics.median(seconds))
                yield TimeRow(name, ranks, stage, min(medians), min(plans, key=lambda plan: plan.seconds))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_time", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes on this machine")
    parser.add_argument("--stages", type=int, nargs="+", default=[3], choices=range(4), help="ZeRO stages")
    parser.add_argument("--rounds", type=int, default=2, help="calibrations of each case")
    parser.add_argument("--steps", type=int, default=8, help="measured steps after each calibration")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall time, or processor time of the ranks")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    settings = {"ranks": options.ranks, "stages": options.stages, "clock": options.clock}
    show("plan_time", lambda: measure(options), options.json, settings)
