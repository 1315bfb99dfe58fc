"""The interval between checkpoints that loses the least time, and the share of time that then remains for training.

    |--- interval of training ---|- save -|--- interval ---|- save -|--- in|  failure  |- restart -|--- interval ...

Failures are a Poisson process of the whole job: a job of W devices fails W times as often as one device. A failure
loses the training since the last save.

Source: Young 1974; Daly 2006, "A higher order estimate of the optimum checkpoint interval", equations 5 and 20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_NODE_GPUS = 8


@dataclass(frozen=True)
class FailurePreset:
    """Failures of a published run.

    Attributes:
        name: Name on the command line.
        source: Publication.
        failures: Unexpected interruptions.
        days: Length of the run.
        nodes: Machines, of eight GPUs each.
        causes: Number of failures by cause; empty if not published.
    """

    name: str
    source: str
    failures: float
    days: float
    nodes: int
    causes: dict[str, int]

    @property
    def per_node_day(self) -> float:
        """Failures of a machine per day."""
        return self.failures / self.days / self.nodes

    @property
    def gpu_hours(self) -> float:
        """GPU hours for each failure."""
        return 24 * _NODE_GPUS / self.per_node_day


LLAMA_3 = FailurePreset(
    "llama-3",
    "Llama Team 2024, The Llama 3 Herd of Models (arXiv 2407.21783), section 3.3.4 and table 5",
    failures=419,
    days=54,
    nodes=16_384 // _NODE_GPUS,
    causes={
        "GPU": 148,
        "GPU memory (HBM3)": 72,
        "software": 54,
        "switch or cable": 35,
        "host maintenance": 32,
        "GPU SRAM": 19,
        "GPU system processor": 17,
        "NIC": 7,
        "NCCL watchdog timeout": 7,
        "silent data corruption": 6,
        "thermal interface and sensor": 6,
        "SSD": 3,
        "power supply": 3,
        "server chassis": 2,
        "IO expansion board": 2,
        "dependency": 2,
        "CPU": 2,
        "system memory": 2,
    },
)
A100_CLUSTER = FailurePreset(
    "a100-cluster",
    "Kokolis et al. 2024, Revisiting Reliability in Large-Scale Machine Learning Research Clusters (arXiv 2410.21680)",
    failures=6.5,
    days=1,
    nodes=1000,
    causes={},
)
PRESETS = {preset.name: preset for preset in (LLAMA_3, A100_CLUSTER)}


@dataclass(frozen=True)
class Failures:
    """How often a job fails, and what a failure costs besides lost steps.

    Attributes:
        gpu_hours: Device hours for each failure; by default those of Llama 3, about 50,700.
        restart_seconds: From the failure to the first new step: detection, queue, start, reading the checkpoint.
    """

    gpu_hours: float = LLAMA_3.gpu_hours
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
