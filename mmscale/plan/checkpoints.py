"""The interval between checkpoints that loses the least time, and the share of time that then remains for training.

    |--- interval of training ---|- save -|--- interval ---|- save -|--- in|  failure  |- restart -|--- interval ...

Failures are a Poisson process of the whole job: a job of W devices fails W times as often as one device. A failure
loses the training since the last save.

Source: Young 1974; Daly 2006, "A higher order estimate of the optimum checkpoint interval", equations 5 and 20. The
default rate of failures is that of Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days
on 16,384 GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LLAMA_3_GPU_HOURS = 16_384 * 54 * 24 / 419
"""GPU hours for each unexpected interruption: about 50,700."""


@dataclass(frozen=True)
class Failures:
    """How often a job fails, and what a failure costs besides lost steps.

    Attributes:
        gpu_hours: Device hours for each failure.
        restart_seconds: From the failure to the first new step: detection, queue, start, reading the checkpoint.
    """

    gpu_hours: float = LLAMA_3_GPU_HOURS
    restart_seconds: float = 600.0

    def mean_seconds(self, ranks: int) -> float:
        """Return the mean time between failures of a job of ``ranks`` devices."""
        return 3600 * self.gpu_hours / ranks


def best_interval(save_seconds: float, mean_seconds: float) -> float:
    """Return the training time between two saves, in seconds.

    Args:
        save_seconds: Time for which a save stops the training.
        mean_seconds: Mean time between failures of the job.
    """
    return math.sqrt(2 * save_seconds * mean_seconds)


def expected_goodput(interval: float, save_seconds: float, mean_seconds: float, restart_seconds: float) -> float:
    """Return the share of wall time that advances the training.

    Args:
        interval: Training time between two saves.
        save_seconds: Time for which a save stops the training.
        mean_seconds: Mean time between failures of the job.
        restart_seconds: Time from a failure to the first new step. A restart can fail too.
    """
    exponents = restart_seconds / mean_seconds, (interval + save_seconds) / mean_seconds
    if sum(exponents) > 700:  # exp overflows: nearly every interval fails.
        return 0.0
    return interval / (mean_seconds * math.exp(exponents[0]) * math.expm1(exponents[1]))
