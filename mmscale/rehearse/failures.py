"""Simulate failures and preemptions of a run on a simulated clock, and find the best checkpoint interval.

    |-- restart --|-- interval --|save|-- interval --|save|-- interval X failure
                  |<----------- kept ---------------->|<--- lost --->|

Failures and preemptions are independent Poisson processes of the whole job. A failure during the restart begins another
restart. A background save is complete some time after it blocked the step; a failure before that loses the interval
before it too. A preemption with grace saves before the job ends.

Source: Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006, "A higher order
estimate of the optimum checkpoint interval for restart dumps", equation 20 (expected time) and 37 (optimum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmscale.plan import checkpoints
from mmscale.plan.checkpoints import FailurePreset

_DAY = 86_400.0
_EVENTS = 100_000
"""Simulated ends of an uptime per interval: the standard error of the goodput is about 0.1 percentage points."""


@dataclass(frozen=True)
class Hazards:
    """What interrupts a job, and what each interruption costs. Times in seconds.

    Attributes:
        mtbf: Mean time between failures of the whole job; infinity for none.
        preemption_interval: Mean time between preemptions; infinity for none.
        grace: Time between the notice of a preemption and its end.
        restart: Time from an interruption to the first new step.
        blocked: Time for which a save stops the steps.
        written: Time from the end of ``blocked`` until the checkpoint is complete.
    """

    mtbf: float
    preemption_interval: float = math.inf
    grace: float = 0.0
    restart: float = 600.0
    blocked: float = 60.0
    written: float = 0.0

    @property
    def rate(self) -> float:
        """Interruptions per second."""
        return 1 / self.mtbf + 1 / self.preemption_interval


def simulate(hazards: Hazards, interval: float, seed: int, events: int = _EVENTS) -> float:
    """Return the goodput of a long run: the share of its time that made steps which were kept.

    Args:
        hazards: Interruptions and their costs.
        interval: Seconds of steps between two saves, above 0.
        seed: Seed of the random numbers; equal seeds give equal interruptions for every interval.
        events: Number of interruptions.
    """
    # A save that is due before the last one is complete waits for it (``checkpoint.when_busy: wait``).
    blocked = hazards.blocked + max(0.0, hazards.written - interval)
    if not hazards.rate:
        return interval / (interval + blocked)
    generator = np.random.default_rng(seed)
    uptime = generator.exponential(1 / hazards.rate, events)
    preempted = generator.random(events) < 1 / hazards.preemption_interval / hazards.rate
    running = np.maximum(uptime - hazards.restart, 0.0)
    cycle = interval + blocked
    # A save ends its cycle; it is complete ``written`` later.
    complete = np.floor(np.maximum(running - hazards.written, 0.0) / cycle)
    kept = complete * interval
    cost = hazards.blocked + hazards.written
    if hazards.grace >= cost:  # Stop at the notice, save, and keep everything; the save is time of the job too.
        done = np.floor(running / cycle)
        steps = done * interval + np.minimum(running - done * cycle, interval)
        saves = preempted & (running > 0)
        kept = np.where(saves, steps, kept)
        uptime = uptime + np.where(saves, cost, 0.0)
    return float(kept.sum() / uptime.sum())


def expected_goodput(hazards: Hazards, interval: float) -> float:
    """Return the goodput of a run with failures only, and saves that are complete when the steps resume.

    Source: Daly 2006, equation 20.
    """
    if math.isinf(hazards.mtbf):
        return interval / (interval + hazards.blocked)
    return checkpoints.expected_goodput(interval, hazards.blocked, hazards.mtbf, hazards.restart)


def young_interval(hazards: Hazards) -> float:
    """Return Young's optimum: ``sqrt(2 * delta * M)`` seconds of steps between saves; infinity without failures."""
    return checkpoints.best_interval(hazards.blocked, hazards.mtbf)


def daly_interval(hazards: Hazards) -> float:
    """Return Daly's higher-order optimum in seconds of steps between saves; infinity without failures.

    Source: Daly 2006, equation 37.
    """
    delta, mean = hazards.blocked, hazards.mtbf
    if math.isinf(mean) or delta >= 2 * mean:
        return mean
    ratio = delta / (2 * mean)
    return young_interval(hazards) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - delta


@dataclass(frozen=True)
class IntervalRow:
    """Goodput with one checkpoint interval.

    Attributes:
        every_steps: Steps between two saves.
        seconds: Their duration.
        simulated: Goodput by ``simulate``.
        formula: Goodput by ``expected_goodput``, which knows no preemption and no background save.
    """

    every_steps: int
    seconds: float
    simulated: float
    formula: float


def interval_table(hazards: Hazards, step_seconds: float, every_steps: Sequence[int], seed: int) -> list[IntervalRow]:
    """Return the goodput of each interval."""
    return [
        IntervalRow(
            steps,
            steps * step_seconds,
            simulate(hazards, steps * step_seconds, seed),
            expected_goodput(hazards, steps * step_seconds),
        )
        for steps in every_steps
    ]


def spaced_intervals(center: float, configured: int | None) -> list[int]:
    """Return numbers of steps around an optimum, from a sixteenth to 16 times of it, and the configured one."""
    steps = {max(1, round(center * 2.0 ** (power / 2))) for power in range(-8, 9)}
    return sorted(steps | ({configured} if configured is not None else set()))


def expected_failures(preset: FailurePreset, nodes: int, days: float) -> dict[str, float]:
    """Return the expected number of failures by cause of a run with the preset's rate."""
    share = nodes * days / (preset.nodes * preset.days)
    return {cause: count * share for cause, count in preset.causes.items()}


def spread(hazards: Hazards, days: float, seed: int) -> tuple[float, float]:
    """Return the 5th and 95th percentile of the number of interruptions of a run of ``days``."""
    counts = np.random.default_rng(seed).poisson(days * _DAY * hazards.rate, 10_000)
    low, high = np.percentile(counts, [5, 95])
    return float(low), float(high)
