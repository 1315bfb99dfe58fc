"""Whether a run fits a cluster, how long it takes there, and what would help.

    configuration ──load──> work of a pack ─┐
    cluster ────────────────────────────────┼─> memory and step time of each stage ─> program, checkpoints, storage
    what if one key were different? ────────┘

Nothing is allocated on a device, and no process group starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from data_pipeline.errors import DataPipelineError
from mmscale.engine.expert_parallel import check_ranks
from mmscale.errors import ConfigError
from mmscale.nn.moe import MoeConfig
from mmscale.optim.schedule import trained_components
from mmscale.plan.checkpoints import Failures, best_interval, expected_goodput
from mmscale.plan.cluster import GIB, Cluster
from mmscale.plan.load import ExampleDocument, StageLoad, stage_load
from mmscale.plan.memory import RankMemory, memory_of_rank
from mmscale.plan.step_time import ModelSizes, StepTime, model_sizes, state_bytes, step_time
from mmscale.run.config import RunConfig, require_training

_DAY = 86_400
_MOST_RANKS = 1 << 14
_NOTICED = 1.02
"""A change must make a run faster by this factor to be proposed."""


@dataclass(frozen=True)
class Assumptions:
    """Values that neither the configuration nor the machines determine.

    Attributes:
        example: Size of a document if the data do not exist here; if given, it replaces the data.
        failures: Rate and cost of failures.
        write_bandwidth: Bytes per second that all nodes together write to the file system; None: 2e9 a node.
    """

    example: ExampleDocument | None = None
    failures: Failures = field(default_factory=Failures)
    write_bandwidth: float | None = None


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name: Its name.
        steps: Steps that the run makes of it.
        lanes: Packs of a step.
        load: Its mean pack.
        memory: Memory of a rank.
        time: Time of a step.
    """

    name: str
    steps: int
    lanes: int
    load: StageLoad
    memory: RankMemory
    time: StepTime

    @property
    def rank_bytes(self) -> int:
        """Device memory of a rank, with what torch's allocator does not count."""
        return self.memory.peak_bytes + self.memory.overhead_bytes

    @property
    def step_tokens(self) -> float:
        """Tokens of a step over all ranks."""
        return self.lanes * self.load.tokens

    @property
    def read_bandwidth(self) -> float | None:
        """Bytes per second that all ranks read; None if the size of a sample is unknown."""
        if self.load.sample_bytes is None:
            return None
        return self.lanes * self.load.samples * self.load.sample_bytes / self.time.seconds


@dataclass(frozen=True)
class CheckpointPlan:
    """Checkpoints of the stage with the largest ones.

    Attributes:
        bytes: Size of one checkpoint.
        every_steps: Best interval.
        save_seconds: Time for which a save stops the training.
        write_seconds: Time to write it. In the background, the next save must wait for it.
        mean_hours: Mean time between failures.
        goodput: Expected share of wall time that advances the training.
    """

    bytes: int
    every_steps: int
    save_seconds: float
    write_seconds: float
    mean_hours: float
    goodput: float


@dataclass(frozen=True)
class Knob:
    """A key whose change would help, alone and with all others unchanged.

    Attributes:
        change: The override, as on the command line.
        speedup: Tokens per second with it, divided by those without.
        per_rank_bytes: Memory of a rank with it.
        fits: Whether the run fits with it.
    """

    change: str
    speedup: float
    per_rank_bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The plan of a run on a cluster. Stages that the run does not reach are left out."""

    cluster: Cluster
    precision: str
    stages: tuple[StagePlan, ...]
    checkpoint: CheckpointPlan
    limits: tuple[str, ...]
    smallest: Cluster | None
    knobs: tuple[Knob, ...]

    @property
    def fits(self) -> bool:
        """Whether the run can run on the cluster."""
        return not self.limits

    @property
    def largest(self) -> StagePlan:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.rank_bytes)

    @property
    def training_seconds(self) -> float:
        """Time of all steps, without failures and saves."""
        return sum(stage.steps * stage.time.seconds for stage in self.stages)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks, as a mean over all steps."""
        return sum(stage.steps * stage.step_tokens for stage in self.stages) / self.training_seconds

    @property
    def days(self) -> float:
        """Wall time of the whole program, with failures and saves."""
        goodput = self.checkpoint.goodput
        return self.training_seconds / goodput / _DAY if goodput else math.inf

    @property
    def gpu_hours(self) -> float:
        """Device hours of the whole program, with failures and saves."""
        return self.days * 24 * self.cluster.ranks

    @property
    def mfu(self) -> float:
        """Model operations of the whole program, as a share of the peak."""
        flops = sum(stage.steps * stage.time.model_flops for stage in self.stages)
        return flops / self.training_seconds / self.cluster.accelerator.peak_flops[self.precision]  # type: ignore[index]

    @property
    def cost(self) -> float | None:
        """Price of all device hours; None without a price."""
        price = self.cluster.accelerator.price_per_hour
        return None if price is None else price * self.gpu_hours

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        largest, reads = self.largest, [stage.read_bandwidth for stage in self.stages]
        known = [each for each in reads if each is not None]
        steps = sum(stage.steps for stage in self.stages)
        device = self.cluster.accelerator
        return {
            "memory": {
                "per_rank_bytes": largest.rank_bytes,
                "parts": {**largest.memory.parts, "overhead": largest.memory.overhead_bytes},
                "capacity_bytes": device.memory_bytes,
                "host_bytes": largest.memory.host_bytes,
                "moment": largest.memory.moment,
                "activations_with_checkpointing": largest.memory.activations_with_checkpointing,
                "activations_without_checkpointing": largest.memory.activations_without_checkpointing,
            },
            "step_seconds": self.training_seconds / steps,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "days": _finite(self.days),
            "gpu_hours": _finite(self.gpu_hours),
            "cost": None if self.cost is None else _finite(self.cost),
            "checkpoint": asdict(self.checkpoint),
            "storage": {
                "bytes_per_second": max(known) if len(known) == len(reads) else None,
                "write_bytes_per_second": self.checkpoint.bytes / self._interval_seconds(),
            },
            "fits": self.fits,
            "limits": list(self.limits),
            "smallest": None if self.smallest is None else _nodes(self.smallest),
            "knobs": [asdict(knob) for knob in self.knobs],
            "stages": [_stage_json(stage) for stage in self.stages],
            "cluster": {
                **_nodes(self.cluster),
                "gpu": device.name,
                "precision": self.precision,
                "source": device.source,
            },
        }

    def _interval_seconds(self) -> float:
        return self.checkpoint.every_steps * max(stage.time.seconds for stage in self.stages)


def _finite(value: float) -> float | None:
    """Return None for infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _nodes(cluster: Cluster) -> dict[str, int]:
    return {"nodes": cluster.nodes, "gpus_per_node": cluster.per_node}


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    time, load = stage.time, stage.load
    return {
        "name": stage.name,
        "steps": stage.steps,
        "step_seconds": time.seconds,
        "seconds": time.parts(),
        "microbatches": time.microbatches,
        "sent_bytes": time.sent_bytes,
        "model_flops": time.model_flops,
        "step_tokens": stage.step_tokens,
        "step_samples": stage.lanes * load.samples,
        "per_rank_bytes": stage.rank_bytes,
        "load": load.source,
        "shards": load.shards,
        "read_bytes_per_second": stage.read_bandwidth,
    }


def make_plan(config: RunConfig, cluster: Cluster, assumptions: Assumptions | None = None) -> Plan:
    """Plan a run on a cluster.

    Raises:
        ConfigError: the configuration describes no training, ``engine.expert_parallel`` does not divide the ranks, or
            the device has no peak for the number format.
        DataPipelineError: the data exist here and are damaged, or do not fit the model.
    """
    require_training(config)
    check_ranks(config.engine.expert_parallel, cluster.ranks)
    given = assumptions or Assumptions()
    planned = _for_device(config, cluster)
    loads = {number: stage_load(planned, number, given.example) for number, _ in planned.stages_from(0)}
    plan = _plan(planned, cluster, given, loads)
    smallest = _smallest(planned, cluster, given, loads, plan)
    knobs = tuple(_best_knobs(planned, given, loads, plan))
    return replace(plan, smallest=smallest, knobs=knobs)


def _for_device(config: RunConfig, cluster: Cluster) -> RunConfig:
    """Return the run with the kind of device and the number format that it would have on the cluster."""
    device = cluster.accelerator
    precision = device.best_precision() if config.engine.precision == "auto" else config.engine.precision
    if precision not in device.peak_flops:
        raise ConfigError(
            f"engine.precision={precision}: {device.name} has no peak_flops for {precision}, only for "
            f"{', '.join(device.peak_flops)}; add it to the file of --gpu, or set engine.precision=fp32"
        )
    engine = config.engine.model_copy(update={"device": device.device, "precision": precision})
    return config.model_copy(update={"engine": engine})


def _plan(config: RunConfig, cluster: Cluster, given: Assumptions, loads: dict[int, StageLoad]) -> Plan:
    """Return the plan without the smallest cluster and without proposals."""
    left, stages = config.total_steps, []
    for number, stage in config.stages_from(0):
        steps = min(stage.steps, left)
        left -= steps
        memory = memory_of_rank(config, number, cluster.ranks, device=config.engine.device, example=given.example)
        time = step_time(config, number, loads[number], cluster, config.engine.precision)
        stages.append(StagePlan(stage.name, steps, config.stage_data(number).lanes, loads[number], memory, time))
    checkpoint = _checkpoints(config, cluster, given, stages)
    plan = Plan(cluster, config.engine.precision, tuple(stages), checkpoint, (), None, ())
    return replace(plan, limits=tuple(_limits(config, plan)))


def _sizes(config: RunConfig, number: int) -> ModelSizes:
    model = config.decoder_model(number)
    return model_sizes(model, frozenset(trained_components(model.components, config.stages[number])))


def _checkpoints(config: RunConfig, cluster: Cluster, given: Assumptions, stages: list[StagePlan]) -> CheckpointPlan:
    """Plan checkpoints: float32 masters, optimizer state and averages of trained values, weights of frozen ones."""
    size, w = 0.0, 4 if config.engine.precision == "fp32" else 2
    for number, stage in config.stages_from(0):
        values = _sizes(config, number)
        of_trained = 4 + state_bytes(config, number) + (4 if stage.ema else 0)
        size = max(size, of_trained * values.trained + w * (values.total - values.trained))
    write_seconds = size / (given.write_bandwidth or 2e9 * cluster.nodes)
    copied = size / cluster.ranks / cluster.accelerator.host_bandwidth
    save = copied if config.checkpoint.background else write_seconds
    mean = given.failures.mean_seconds(cluster.ranks)
    step = max(stage.time.seconds for stage in stages)
    # The next save waits for the one before, so a shorter interval than a write saves nothing.
    interval = max(best_interval(save, mean), write_seconds)
    every = max(1, round(interval / step))
    goodput = expected_goodput(every * step, save, mean, given.failures.restart_seconds)
    return CheckpointPlan(math.ceil(size), every, save, write_seconds, mean / 3600, goodput)


def _limits(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Yield a sentence for each number that prevents the run."""
    cluster, capacity = plan.cluster, plan.cluster.accelerator.memory_bytes
    if config.engine.precision == "fp16" and cluster.accelerator.device == "cpu":
        yield "engine.precision=fp16: a CPU does not train in fp16; set engine.precision=bf16 or fp32"
    for stage in plan.stages:
        if stage.lanes < cluster.ranks:
            yield (
                f"stage {stage.name}: data.lanes={stage.lanes} is below the number of ranks, {cluster.ranks}; start at "
                f"most {stage.lanes} ranks, or set data.lanes={cluster.ranks} or more"
            )
        memory = stage.memory
        if stage.rank_bytes > capacity:
            part, largest = max(memory.parts.items(), key=lambda item: item[1])
            yield (
                f"stage {stage.name}: a rank needs {stage.rank_bytes / GIB:.1f} GiB ({memory.moment}), and "
                f"{cluster.accelerator.name} has {capacity / GIB:.1f}; the largest part is {part}, "
                f"{largest / GIB:.1f} GiB"
            )
        limit = config.engine.watchdog.limits(config.engine.timeout_seconds).step
        if limit is not None and stage.time.seconds > limit:
            yield (
                f"stage {stage.name}: a step takes {stage.time.seconds:,.0f} s, and the watchdog ends the run after "
                f"{limit:,.0f} s; raise engine.watchdog.step_seconds and engine.timeout_seconds, or use more ranks"
            )


def _smallest(
    config: RunConfig, cluster: Cluster, given: Assumptions, loads: dict[int, StageLoad], plan: Plan
) -> Cluster | None:
    """Return the smallest cluster on which the run fits: a part of a node, or nodes in powers of two.

    Assumes that more ranks never need more memory.
    """
    most = min(_MOST_RANKS, *(stage.lanes for stage in plan.stages))
    parts = [1 << power for power in range(cluster.per_node.bit_length()) if 1 << power < cluster.per_node]
    clusters = [replace(cluster, nodes=1, per_node=part) for part in parts]
    clusters += [replace(cluster, nodes=1 << power) for power in range(_MOST_RANKS.bit_length())]
    clusters = [each for each in clusters if each.ranks <= most and each.ranks % config.engine.expert_parallel == 0]

    def holds(each: Cluster) -> bool:
        return _plan(config, each, given, loads).fits

    first, end = 0, len(clusters)
    while first < end:
        middle = (first + end) // 2
        first, end = (first, middle) if holds(clusters[middle]) else (middle + 1, end)
    return clusters[first] if first < len(clusters) else None


def _best_knobs(config: RunConfig, given: Assumptions, loads: dict[int, StageLoad], plan: Plan) -> list[Knob]:
    """Return at most two changes of different keys: the fastest that fit; else those that save the most memory.

    A run that does not fit for another reason than memory gets only changes with which it fits. The time of a change
    takes milliseconds, its memory up to seconds. So the memory of a run that fits is computed for the fastest changes
    only.
    """
    changed, lacks_memory = [], plan.largest.rank_bytes > plan.cluster.accelerator.memory_bytes
    for key, value in _changes(config, plan):
        try:
            other = _for_device(_changed(config, key, value), plan.cluster)
            packed = loads
            if key == "data.packing.max_tokens":
                packed = {number: stage_load(other, number, given.example) for number in loads}
        except (ValidationError, ConfigError, DataPipelineError):  # The change contradicts another key or the data.
            continue
        speed = _tokens_per_second(other, plan.cluster, packed, plan)
        text = f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        changed.append((speed / plan.tokens_per_second, text, other, packed))
    changed.sort(key=lambda each: -each[0])
    found: dict[str, Knob] = {}
    for speedup, text, other, packed in changed:
        key = text.partition("=")[0]
        if len(found) == 2 and plan.fits:
            break
        if plan.fits and (speedup < _NOTICED or key in found):
            continue
        then = _plan(other, plan.cluster, given, packed)
        knob = Knob(text, speedup, then.largest.rank_bytes, then.fits)
        better = knob.per_rank_bytes < min(
            plan.largest.rank_bytes, found[key].per_rank_bytes if key in found else 1 << 62
        )
        if better if lacks_memory else knob.fits:
            found[key] = knob
    if plan.fits:
        return list(found.values())
    return sorted(found.values(), key=lambda knob: (not knob.fits, knob.per_rank_bytes))[:2]


def _tokens_per_second(config: RunConfig, cluster: Cluster, loads: dict[int, StageLoad], plan: Plan) -> float:
    """Return the speed of the program of ``plan`` with another configuration, without planning its memory."""
    tokens = seconds = 0.0
    for (number, _), stage in zip(config.stages_from(0), plan.stages, strict=True):
        tokens += stage.steps * stage.lanes * loads[number].tokens
        seconds += stage.steps * step_time(config, number, loads[number], cluster, config.engine.precision).seconds
    return tokens / seconds


def _changes(config: RunConfig, plan: Plan) -> Iterator[tuple[str, Any]]:
    """Yield keys with other values that a user may set without changing what the model learns."""
    engine, cluster = config.engine, plan.cluster
    yield "engine.activation_checkpointing", not engine.activation_checkpointing
    for stage in {0, 1, 2, 3} - {engine.zero_stage}:
        yield "engine.zero_stage", stage
    for lanes in (engine.micro_lanes * 2, engine.micro_lanes // 2):
        if 1 <= lanes <= max(1, max(stage.lanes for stage in plan.stages) // cluster.ranks):
            yield "engine.micro_lanes", lanes
    for tokens in (config.data.packing.max_tokens * 2, config.data.packing.max_tokens // 2):
        yield "data.packing.max_tokens", tokens
    if isinstance(mlp := config.decoder_model(0).decoder.mlp, MoeConfig):
        sizes = {1, 2, 4, cluster.per_node, mlp.num_experts}
        for size in sorted(sizes - {engine.expert_parallel}):
            yield "engine.expert_parallel", size
    if engine.precision == "fp32" and "bf16" in cluster.accelerator.peak_flops:
        yield "engine.precision", "bf16"
    for offload in ("none", "optimizer"):
        if offload != engine.offload and cluster.accelerator.device == "cuda":
            yield "engine.offload", offload
    for live in (0, 1_000_000_000):
        if live != engine.live_parameter_elements and engine.zero_stage == 3:
            yield "engine.live_parameter_elements", live
    if not engine.overlap_communication and cluster.accelerator.device == "cuda":
        yield "engine.overlap_communication", True


def _changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    """Return the run with one key of ``_changes`` changed."""
    if key == "data.packing.max_tokens":
        packing = config.data.packing.model_validate({**config.data.packing.model_dump(), "max_tokens": value})
        return config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
    name = key.rpartition(".")[2]
    engine = type(config.engine).model_validate({**config.engine.model_dump(), name: value})
    if name == "expert_parallel":
        check_divides = RunConfig.model_validate({**config.model_dump(), "engine": engine.model_dump()})
        return config.model_copy(update={"engine": check_divides.engine})
    return config.model_copy(update={"engine": engine})
