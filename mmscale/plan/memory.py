"""Bytes that a rank allocates at the peak of a training step, predicted from the configuration.

    configuration --meta device--> shapes of weights  --ZeRO's formulas--> bytes that stay
                  --trace.py-----> events of a pass   --ZeRO's order of gathers and reductions--> bytes that pass

The moments of a step are its forward pass, its backward pass and its optimizer step. The prediction counts what torch's
allocator counts. Memory outside of it (CUDA's context, NCCL, fragmentation) is ``overhead_bytes``.

Source: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 3; DeepSpeed 0.19.8 for buffers and copies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from mmscale.dist import device_type
from mmscale.engine.config import EngineConfig
from mmscale.engine.expert_parallel import check_ranks
from mmscale.engine.graph import LossGraph
from mmscale.engine.optimizers.eight_bit import BITS, BLOCK
from mmscale.engine.precision import choose_precision
from mmscale.models.build import build_weights
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.experts import Experts
from mmscale.objectives.choice import choose_objective
from mmscale.objectives.teacher import Teacher
from mmscale.optim.config import AdafactorConfig
from mmscale.optim.schedule import freeze, parameter_groups
from mmscale.plan.batch import largest_batch, tensor_bytes
from mmscale.plan.load import ExampleDocument
from mmscale.plan.trace import Event, gathered_modules, trace
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import teacher_models, teacher_sources

_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "gathered", "buffers", "batch")
_MESSAGE = 500_000_000
"""Values that DeepSpeed reduces at once at stage 0, and at stage 1 in bf16."""
_CUDA_BYTES = 2 * 2**30
"""Memory beside torch's allocator on CUDA: context 0.5 to 1 GiB, NCCL 1 to 1.5 GiB. Published figures, not measured."""


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank at the peak of a step, in bytes.

    Attributes:
        parts: Bytes by purpose: ``parameters``, ``gradients``, ``optimizer``, ``activations``, ``logits``, ``gathered``
            (weights of other ranks' shards), ``buffers`` (messages, flat copies, temporary values) and ``batch``.
        activations_without_checkpointing: Largest activations of a pass that keeps them all.
        activations_with_checkpointing: Largest activations of a pass that recomputes each block.
        moment: ``forward``, ``backward`` or ``optimizer``: when the peak is reached.
        peak_bytes: Sum of ``parts``: the bytes of torch's allocator on the device.
        host_bytes: Offloaded weights, optimizer state and gradients in the host's memory.
        overhead_bytes: Device memory outside of torch's allocator. Published figures, not measured.
    """

    parts: dict[str, int]
    activations_without_checkpointing: int
    activations_with_checkpointing: int
    moment: str
    peak_bytes: int
    host_bytes: int
    overhead_bytes: int


@dataclass(frozen=True)
class _Shapes:
    """Sizes of a stage's weights, in values.

    Attributes:
        numel: Values of each parameter, by name; of a slice with expert parallelism.
        ranks: Ranks that share each parameter at stage 3.
        trained: Names of the trained parameters.
        groups: Names of the parameters in each of the optimizer's groups.
        state: Bytes of optimizer state of all trained values, without masters.
        whole_state: Bytes of optimizer state that every rank holds whole.
        modules: Names of the parameters that ZeRO-3 gathers with a module, by the module's name.
    """

    numel: dict[str, int]
    ranks: dict[str, int]
    trained: frozenset[str]
    groups: tuple[tuple[str, ...], ...]
    state: dict[str, float]
    whole_state: int
    modules: dict[str, tuple[str, ...]]

    def values(self, names: Iterable[str], *, sharded: bool) -> int:
        """Return the number of values of the parameters on a rank, whole or sharded."""
        return sum(-(-self.numel[name] // self.ranks[name]) if sharded else self.numel[name] for name in names)


def memory_of_rank(
    config: RunConfig, stage: int, ranks: int, *, device: str | None = None, example: ExampleDocument | None = None
) -> RankMemory:
    """Return the memory of one rank in a stage.

    Args:
        config: The run.
        stage: Number of the stage, from 0.
        ranks: Number of ranks.
        device: ``cpu`` or ``cuda``; None: as ``engine.device``.
        example: Assume documents of this size, even if the data exist here. None: only if they do not.

    Raises:
        ConfigError: ``engine.expert_parallel`` does not divide the number of ranks or of experts.
    """
    engine = config.engine
    device = device or device_type(engine.device)
    width = 4 if _precision(engine, device) == "fp32" else 2
    check_ranks(engine.expert_parallel, ranks)
    # Only these keys of the engine block change what a pass computes.
    kept = EngineConfig(micro_lanes=engine.micro_lanes, expert_parallel=engine.expert_parallel)
    relevant = config.model_copy(update={"engine": kept}).model_dump_json()
    # Only a contrastive loss computes with the rows of all ranks; other passes serve every number of ranks.
    traced = engine.expert_parallel if config.decoder_model(stage).predicts_tokens else ranks
    shapes, passes, batch_bytes = _passes(_Pass(relevant, stage, traced, device, width, example))
    shapes = replace(shapes, ranks={name: count * ranks // traced for name, count in shapes.ranks.items()})
    step = _Step(config, shapes, ranks, width, device)
    moment, parts = max(step.moments(passes[engine.activation_checkpointing]), key=lambda each: sum(each[1].values()))
    if device == "cuda":
        parts["batch"] = batch_bytes
    activations = {key: max(event.live - event.head for event in events) for key, events in passes.items()}
    loader = batch_bytes * (1 + config.stage_data(stage).prefetch)
    return RankMemory(
        parts={name: size for name, size in parts.items() if size},
        activations_without_checkpointing=activations[False],
        activations_with_checkpointing=activations[True],
        moment=moment,
        peak_bytes=sum(parts.values()),
        host_bytes=step.host_bytes() + loader,
        overhead_bytes=_CUDA_BYTES if device == "cuda" else 0,
    )


def _precision(engine: EngineConfig, device: str) -> str:
    if engine.precision != "auto":
        return engine.precision
    return "bf16" if device == "cuda" else choose_precision(engine, torch.device(device)).name


@dataclass(frozen=True)
class _Pass:
    """The arguments of passes on the meta device; hashable, so that they are computed once."""

    config: str
    stage: int
    ranks: int
    device: str
    width: int
    example: ExampleDocument | None


class _EqualRanks:
    """The ranks of a step on the meta device; every rank has the same rows."""

    rank, device = 0, torch.device("meta")

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of every rank."""
        return [rows] * self._ranks


@functools.lru_cache(maxsize=64)
def _passes(task: _Pass) -> tuple[_Shapes, dict[bool, list[Event]], int]:
    """Return sizes of the weights, events of a pass without and with checkpointing, and bytes of the microbatch."""
    config = RunConfig.model_validate_json(task.config)
    number, engine = task.stage, config.engine
    stage, architecture = config.stages[number], config.decoder_model(number)
    data, media = config.stage_data(number), config.stage_media(number)
    batch = largest_batch(data, media, engine.micro_lanes, config.seed, task.example)
    dtype = {4: torch.float32, 2: torch.bfloat16}[task.width]
    teachers = [
        Teacher(cast(MultimodalModel, build_weights(teacher).to(dtype)), source.weight, source.temperature)
        for teacher, source in zip(teacher_models(config, number), teacher_sources(config, number), strict=True)
    ]
    model = build_weights(architecture).to(dtype)
    freeze(model, model.components(), stage)
    objective = choose_objective(architecture, stage, _EqualRanks(task.ranks), teachers)
    graph = LossGraph(model, objective)
    events = {
        checkpointing: trace(
            graph, batch, device=task.device, checkpointing=checkpointing, expert_parallel=engine.expert_parallel
        )
        for checkpointing in (False, True)
    }
    return _shapes(graph, config, number, task.ranks), events, tensor_bytes(batch)


def _shapes(graph: LossGraph, config: RunConfig, number: int, ranks: int) -> _Shapes:
    model, stage, size = graph.model, config.stages[number], config.engine.expert_parallel
    experts = {id(p) for module in graph.modules() if isinstance(module, Experts) for p in module.parameters()}
    names = {id(parameter): name for name, parameter in graph.named_parameters()}
    parameters = dict(graph.named_parameters())
    groups = parameter_groups(model, model.components(), stage)  # type: ignore[operator]
    state = {
        names[id(p)]: p.numel() * len(group["state_kinds"]) * (1 + 4 / BLOCK if group["state_bits"] == BITS else 4)
        for group in groups
        for p in group["params"]
    }
    if stage.ema is not None:
        state = {name: size + 4 * parameters[name].numel() for name, size in state.items()}
    whole = 0
    if isinstance(stage.optimizer, AdafactorConfig):
        whole = sum(_adafactor(parameters[name].shape) for name in state)
    return _Shapes(
        numel={n: p.numel() // (size if id(p) in experts else 1) for n, p in parameters.items()},
        ranks={n: ranks // (size if id(p) in experts else 1) for n, p in parameters.items()},
        trained=frozenset(state),
        groups=tuple(tuple(names[id(p)] for p in group["params"]) for group in groups),
        state={name: value / (size if id(parameters[name]) in experts else 1) for name, value in state.items()},
        whole_state=whole,
        modules={
            name: tuple(names[id(p)] for p in module.parameters(recurse=is_unit))
            for name, module, is_unit in gathered_modules(graph)
        },
    )


def _adafactor(shape: torch.Size) -> int:
    """Return the bytes of Adafactor's statistics of a parameter."""
    if len(shape) < 2:
        return 4 * shape.numel()
    *outer, rows, columns = shape
    return 4 * math.prod(outer) * (rows + columns)


class _Step:
    """The bytes of a rank at each moment of a step.

    Args:
        config: The run.
        shapes: Its weights.
        ranks: W.
        width: Bytes of a weight.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, config: RunConfig, shapes: _Shapes, ranks: int, width: int, device: str) -> None:
        engine = config.engine
        self.shapes, self.ranks, self.width, self.engine = shapes, ranks, width, engine
        self.stage = engine.zero_stage
        self.fp16 = _precision(engine, device) == "fp16"
        self.several = config.data.lanes > ranks * engine.micro_lanes
        self.offloads = engine.offload != "none"
        self.learned = shapes.values(shapes.trained, sharded=False)
        self.bucket = 4 * min(engine.reduce_bucket_elements, 1 << 62)
        if self.stage == 3:
            self.part = shapes.values(shapes.trained, sharded=True)
        else:
            self.part = self.learned if self.stage == 0 else -(-self.learned // ranks)
        self.largest = max((shapes.numel[name] for name in shapes.trained), default=0)
        self.group = max((self._part(group) for group in shapes.groups), default=0)

    def _part(self, names: Iterable[str]) -> int:
        if self.stage == 3:
            return self.shapes.values(names, sharded=True)
        whole = self.shapes.values(names, sharded=False)
        return whole if self.stage == 0 else -(-whole // self.ranks)

    def _optimizer(self) -> int:
        """Return the bytes of masters and optimizer state."""
        shapes = self.shapes
        if self.stage == 3:
            state = sum(size / shapes.ranks[name] for name, size in shapes.state.items())
        else:
            state = sum(shapes.state.values()) / (1 if self.stage == 0 else self.ranks)
        masters = 0 if self.stage == 0 and self.width == 4 else 4 * self.part
        return int(masters + state) + shapes.whole_state

    def host_bytes(self) -> int:
        """Return the bytes of offloaded state in the host's memory."""
        if not self.offloads:
            return 0
        weights = self.width * self.shapes.values(self.shapes.numel, sharded=True)
        return self._optimizer() + 4 * self.part + (weights if self.engine.offload == "optimizer_and_weights" else 0)

    def _held(self) -> dict[str, int]:
        """Return the bytes that stay during the whole step."""
        shapes = self.shapes
        weights = self.width * shapes.values(shapes.numel, sharded=self.stage == 3)
        held = dict.fromkeys(_PARTS, 0)
        held["parameters"] = 0 if self.engine.offload == "optimizer_and_weights" else weights
        held["optimizer"] = 0 if self.offloads else self._optimizer()
        if self.stage == 3:
            held["gradients"] = 0 if self.offloads else 4 * self.part
            held["buffers"] = self.bucket
            small = self.engine.persistent_parameter_elements
            held["gathered"] = self.width * sum(size for size in shapes.numel.values() if size < small)
        elif self.stage == 1 and self.width == 2 and not self.fp16:
            held["gradients"] = 4 * self.learned
        return held

    def moments(self, events: Sequence[Event]) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield each moment's name and bytes by purpose."""
        held = self._held()
        done = 0
        gathered = self._gathers(events) if self.stage == 3 else [(0, 0)] * len(events)
        waiting = 0
        for event, (arriving, there) in zip(events, gathered, strict=True):
            if event.kind == "gradient":
                done += self.shapes.numel[event.name]
                waiting += self.shapes.numel[event.name]
            elif event.kind != "backward":
                waiting = 0
            extra = self._pass(done, waiting, backward=event.backward)
            for live, moving in ((event.start, arriving), (event.live, there)):
                head = min(event.head, live)
                parts = {name: held[name] + extra.get(name, 0) for name in _PARTS}
                parts["activations"] += live - head
                parts["logits"] += head
                parts["gathered"] += moving
                yield "backward" if event.backward else "forward", parts
        for extra in (self._reduction(), self._update()):
            yield "optimizer", {name: held[name] + extra.get(name, 0) for name in _PARTS}

    def _pass(self, done: int, waiting: int, *, backward: bool) -> dict[str, int]:
        """Return gradients and buffers during forward and backward passes.

        Args:
            done: Values whose gradient is complete.
            waiting: Those of the current unit.
            backward: Whether the moment is in the backward pass.
        """
        bucket = self.bucket * (backward or self.several)
        whole = self.width * (self.learned if self.several else done)
        flush = 4 * min(max(self.engine.reduce_bucket_elements, self.largest), done) * backward
        if self.stage == 0:
            return {"gradients": whole}
        if self.stage == 1:
            if self.width == 4:
                return {"gradients": whole, "buffers": bucket}
            if self.fp16:
                return {"gradients": 2 * whole, "buffers": bucket}
            return {"gradients": whole}
        if self.stage == 2:
            sums = 4 * self.part * (self.several + (backward and done > 0))
            return {"gradients": sums, "buffers": self.bucket * backward + flush * (self.ranks > 1)}
        return {"gradients": self.width * waiting, "buffers": flush * (4 // self.width)}

    def _reduction(self) -> dict[str, int]:
        """Return gradients and buffers when the gradients are reduced, after the backward pass."""
        message = min(self.learned, _MESSAGE)
        if self.stage == 0:
            return {
                "gradients": self.width * self.learned,
                "buffers": message * (self.width + (4 if self.width == 2 else 0)),
            }
        if self.stage == 1 and self.width == 2 and not self.fp16:
            return {"gradients": self.width * self.learned, "buffers": 4 * message}
        if self.stage == 1:
            return {"gradients": 4 * self.learned + 4 * self.part, "buffers": self.bucket * (1 + (self.ranks > 1))}
        return {}

    def _update(self) -> dict[str, int]:
        """Return gradients and buffers in the optimizer."""
        if self.stage == 0:
            gradients = self.width * self.learned
            return {"gradients": gradients, "buffers": 4 * self.learned if self.width == 2 else 0}
        if self.stage == 1 and self.width == 2 and not self.fp16:
            return {"gradients": self.width * self.learned}
        norm = 8 * (-(-self.largest // self.ranks) if self.stage == 3 else min(self.largest, self.part))
        copy = 4 * self.group * (self.stage < 3)
        if self.offloads:
            return {"buffers": norm}
        return {"gradients": 4 * self.part * (self.stage < 3), "buffers": max(copy, norm)}

    def _gathers(self, events: Sequence[Event]) -> list[tuple[int, int]]:
        """Return for each event the bytes of gathered weights while they arrive, and afterwards.

        Follows DeepSpeed: at the beginning of a module its weights are gathered, and those of the next modules as far
        as the limits allow. At its end they are freed, unless their next use is near.
        """
        engine, shapes = self.engine, self.shapes
        sizes = {
            name: sum(shapes.numel[p] for p in names if shapes.numel[p] >= engine.persistent_parameter_elements)
            for name, names in shapes.modules.items()
        }
        uses = [event.name for event in events if event.kind in ("forward", "backward") and event.name in sizes]
        there: dict[str, int] = {}
        found, position, most = list[tuple[int, int]](), 0, engine.live_parameter_elements
        for event in events:
            arriving = 0
            if event.name in sizes and event.kind in ("forward", "backward"):
                position += 1
                arriving = 0 if event.name in there else sizes[event.name]
                there[event.name] = sizes[event.name]
                ahead = 0
                for name in uses[position:]:
                    size = sizes[name] if name not in there else 0
                    if ahead + size > engine.gather_bucket_elements or sum(there.values()) + size > most:
                        break
                    ahead += size
                    there[name] = sizes[name]
                arriving += ahead
            elif event.kind == "end" and event.name in there and not self._is_near(event.name, uses[position:], sizes):
                del there[event.name]
            total = sum(there.values())
            found.append((self.width * (total + arriving), self.width * total))
        return found

    def _is_near(self, name: str, uses: Sequence[str], sizes: dict[str, int]) -> bool:
        """Return whether the next use of a module's weights is at most ``live_parameter_elements`` values ahead."""
        passed = 0
        for use in uses:
            if passed >= self.engine.live_parameter_elements:
                return False
            if use == name:
                return True
            passed += sizes[use]
        return False
