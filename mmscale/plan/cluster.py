"""The machines of a plan: peaks, memory and bandwidths of one device, and how many devices there are.

    --gpu h100          a preset: the vendor's published values, and shares of them that real runs achieve
    --gpu machine.yaml  the same fields in a file
    --gpu cpu, cuda     this machine: the file that ``mmscale plan --calibrate`` wrote for this number of ranks

A device is a GPU, or one CPU process. Each device runs one rank. A *share* is the part of a published value that a real
program achieves. Rates are per second and device. Bandwidths count one direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from pydantic import Field

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.strict import StrictConfig
from mmscale.config.layers import read_layers
from mmscale.config.validate import validate
from mmscale.errors import ConfigError
from mmscale.init.machine import free_host_memory
from mmscale.metrics.peaks import peak_of, published

GIB = 1 << 30
_HOME_FOLDER = Path(".config/mmscale/machines")
Rate = Annotated[float, Field(gt=0, le=1e17)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e6)]


class Accelerator(StrictConfig):
    """One device, and its connections to the others."""

    name: str
    """Name in tables."""
    device: Literal["cuda", "cpu"]
    """Kind of device; it decides which features of the engine a run uses."""
    peak_flops: dict[Literal["bf16", "fp16", "fp32"], Rate] = Field(min_length=1)
    """Dense matrix operations per second, by number format."""
    memory_bytes: int = Field(gt=0, le=1 << 50)
    """Memory that a rank may use."""
    memory_bandwidth: Rate
    """Bytes per second between the device and its memory."""
    node_bandwidth: Rate
    """Bytes per second that a device sends to the others of its node (NVLink)."""
    network_bandwidth: Rate
    """Bytes per second that a device sends to other nodes."""
    host_bandwidth: Rate = 50e9
    """Bytes per second between the device and the host's memory (PCIe)."""
    host_memory_bandwidth: Rate = 25e9
    """Bytes per second between the host's processors and memory, per device. Only used with ``engine.offload``."""
    matmul_share: Share = 0.58
    """Share of ``peak_flops`` in products with weights."""
    expert_share: Share = 0.45
    """Share of ``peak_flops`` in products of routed experts."""
    attention_share: Share = 0.35
    """Share of ``peak_flops`` in attention, without the masked half of causal attention."""
    memory_share: Share = 0.7
    """Share of ``memory_bandwidth`` in norms, activations and other operations without a product."""
    optimizer_share: Share = 0.7
    """Share of ``memory_bandwidth`` in the optimizer's step."""
    link_share: Share = 0.73
    """Share of ``node_bandwidth`` and ``network_bandwidth`` in large collectives."""
    overlap: float = Field(default=0.9, ge=0, le=1)
    """Share of the traffic of weights and gradients that runs during computation."""
    node_latency_seconds: Seconds = 10e-6
    """Time of a collective without data between two devices of a node; it grows with the logarithm of their number."""
    network_latency_seconds: Seconds = 20e-6
    """Time of a collective without data between two nodes; it grows with the logarithm of their number."""
    unit_seconds: Seconds = 1.5e-3
    """Time of the host for one block, forward and backward, with DeepSpeed's hooks. On CUDA the host works ahead of the
    device, so a step takes the longer of both times. On a CPU they add up."""
    step_seconds: Seconds = 5e-3
    """Time of the host for a step, whatever its size."""
    price_per_hour: float | None = Field(default=None, ge=0, le=1e6)
    """Price of a device for an hour, in any currency; null: no cost is computed."""
    source: str
    """Origin of the values."""

    def best_precision(self) -> str:
        """Return the format that ``engine.precision: auto`` chooses."""
        return "bf16" if "bf16" in self.peak_flops else "fp32"


_LATEST = "the shares are estimates, checked against published runs in docs/planning.md"


def _nvidia(
    key: str, name: str, memory: float, bandwidth: float, nvlink: float, pcie: float, sheet: str
) -> Accelerator:
    """Return the preset of a GPU; ``name`` is its name in torch, ``memory`` in GiB as the driver reports it."""
    found = {kind: published(name, dtype).flops for kind, dtype in _DTYPES.items()}
    return Accelerator(
        name=key,
        device="cuda",
        peak_flops={kind: flops for kind, flops in found.items() if flops},
        memory_bytes=int(memory * GIB),
        memory_bandwidth=bandwidth * 1e12,
        node_bandwidth=nvlink * 1e9,
        network_bandwidth=50e9,
        host_bandwidth=pcie * 1e9,
        source=f"{sheet}; network 400 Gb/s a GPU; {_LATEST}",
    )


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRESETS = {
    "a100": partial(_nvidia, "a100", "NVIDIA A100-SXM4-80GB", 79.2, 2.039, 300, 25, "NVIDIA A100 80GB SXM datasheet"),
    "h100": partial(_nvidia, "h100", "NVIDIA H100 80GB HBM3", 79.1, 3.35, 450, 50, "NVIDIA H100 SXM datasheet"),
    "h200": partial(_nvidia, "h200", "NVIDIA H200", 139.8, 4.8, 450, 50, "NVIDIA H200 SXM datasheet"),
    "b200": partial(_nvidia, "b200", "NVIDIA B200", 178.4, 8.0, 900, 50, "NVIDIA HGX B200 datasheet"),
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes with equal devices.

    Attributes:
        nodes: Number of nodes.
        per_node: Devices of a node.
        accelerator: The device.
    """

    nodes: int
    per_node: int
    accelerator: Accelerator

    @property
    def ranks(self) -> int:
        """Number of ranks, one for each device."""
        return self.nodes * self.per_node

    def describe(self) -> str:
        """Return the cluster in a few words."""
        return f"{self.nodes} x {self.per_node} {self.accelerator.name}"

    def collective_seconds(self, sent_bytes: float, messages: float, members: int, stride: int = 1) -> float:
        """Return the time of ring collectives in groups that all run at once.

        Consecutive ranks are on one node. A ring crosses the boundary of a node once in each direction, and the
        network cards of its members on the node share this traffic.

        Args:
            sent_bytes: Bytes that a rank sends in all messages.
            messages: Number of messages.
            members: Ranks of a group.
            stride: Distance between consecutive ranks of a group.
        """
        if members <= 1:
            return 0.0
        here = min(members, max(1, self.per_node // stride))
        nodes = math.ceil(members / here)
        device = self.accelerator
        bandwidth = device.node_bandwidth if nodes == 1 else min(device.node_bandwidth, here * device.network_bandwidth)
        latency = device.node_latency_seconds * math.log2(here) + device.network_latency_seconds * math.log2(nodes)
        return messages * latency + sent_bytes / (bandwidth * device.link_share)

    def exchange_seconds(self, sent_bytes: float, messages: float, members: int) -> float:
        """Return the time of all-to-all exchanges among ``members`` consecutive ranks.

        Args:
            sent_bytes: Bytes that a rank sends to all others, in all messages.
            messages: Number of messages.
            members: Ranks of a group.
        """
        if members <= 1:
            return 0.0
        device, here = self.accelerator, min(members, self.per_node)
        away = (members - here) / (members - 1)
        nodes = math.ceil(members / here)
        latency = device.node_latency_seconds * math.log2(here) + device.network_latency_seconds * math.log2(nodes)
        rate = (1 - away) / device.node_bandwidth + away / device.network_bandwidth
        return messages * latency + sent_bytes * rate / device.link_share


def read_cluster(gpu: str, nodes: int, per_node: int, price: float | None = None) -> Cluster:
    """Return the cluster that the options of ``mmscale plan`` describe.

    Args:
        gpu: Name of a preset, ``cpu`` or ``cuda`` for this machine, or path of a YAML file.
        nodes: Number of nodes.
        per_node: Devices of a node.
        price: Price of a device and hour; None: that of the file.

    Raises:
        ConfigError: there is no such preset or file, a value of the file is wrong, or this machine's GPUs were not
            calibrated.
    """
    if gpu in PRESETS:
        device = PRESETS[gpu]()
    elif gpu in ("cpu", "cuda"):
        device = _this_machine(gpu, per_node)
    elif is_file(gpu) or Path(gpu).exists():
        device = validate(read_layers(Path(gpu)), Accelerator, gpu)[0]
    else:
        names = ", ".join([*sorted(PRESETS), "cpu", "cuda"])
        raise ConfigError(
            f"--gpu {gpu}: no such preset; write one of {names}, or the path of a YAML file "
            "(`mmscale plan CONFIG --calibrate` writes one for this machine)"
        )
    return Cluster(nodes, per_node, device if price is None else device.model_copy(update={"price_per_hour": price}))


def is_file(gpu: str) -> bool:
    """Return whether a value of ``--gpu`` is the path of a file."""
    return Path(gpu).suffix in (".yaml", ".yml")


def calibrated_file(kind: str, ranks: int) -> Path:
    """Return the file of this machine's calibration on ``ranks`` devices of a kind, ``cpu`` or ``cuda``."""
    return Path.home() / _HOME_FOLDER / f"{kind}-{ranks}.yaml"


def _this_machine(kind: str, ranks: int) -> Accelerator:
    """Return a device of this machine. Without a calibration, a CPU has typical values."""
    path = calibrated_file(kind, ranks)
    if path.is_file():
        device = validate(read_layers(path), Accelerator, str(path))[0]
        if kind == "cuda":
            return device
        return device.model_copy(update={"memory_bytes": max(1, free_host_memory() // ranks)})
    if kind == "cuda":
        raise ConfigError(
            f"--gpu cuda: {path} does not exist; write it with `mmscale plan CONFIG --calibrate "
            f"--gpus-per-node {ranks}` on this machine, or use a preset: {', '.join(sorted(PRESETS))}"
        )
    return _this_cpu(ranks)


def _this_cpu(ranks: int) -> Accelerator:
    """Return one of ``ranks`` processes of this machine, with a measured peak and typical bandwidths."""
    peak = peak_of(torch.device("cpu"), torch.float32)
    assert peak.flops is not None, "a CPU's peak is measured"
    return Accelerator(
        name="cpu",
        device="cpu",
        peak_flops={"fp32": peak.flops},
        memory_bytes=max(1, free_host_memory() // ranks),
        memory_bandwidth=10e9,
        node_bandwidth=1e9,
        network_bandwidth=1e9,
        host_bandwidth=5e9,
        host_memory_bandwidth=5e9,
        matmul_share=0.8,
        overlap=0.0,
        node_latency_seconds=200e-6,
        network_latency_seconds=200e-6,
        source=f"peak {peak.source}; memory of a rank: the free memory of this machine divided by {ranks}; "
        "bandwidths are typical values: measure them with --calibrate",
    )


def write_accelerator(path: Path, device: Accelerator) -> None:
    """Write a device as YAML, whole or not at all."""
    text = yaml.safe_dump(device.model_dump(exclude_none=True), sort_keys=False, width=120)
    write_whole(path, text.encode(), parents=True)
