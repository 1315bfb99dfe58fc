"""The tensors that one microbatch allocates on a rank: a forward and backward pass on the meta device.

    model on meta --forward, backward--> events: a module starts or ends, a gradient is complete
                                         between two events: the largest number of bytes of live tensors

The meta device computes shapes only, so a model of 90 billion parameters takes seconds. The pass runs the code of the
model and of its objective, so every architecture, connector and loss is covered without a formula of its own. Weights
and finished gradients are not counted here: their memory depends on ZeRO (``memory.py``).

Three things differ from a real pass. Attention saves what the fused kernels save. Each expert gets an equal share of
the rows. All tokens carry loss, as far as the batch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.attention import varlen

from data_pipeline.batch import MultimodalBatch, map_batch
from mmscale.engine.graph import LossGraph, recompute
from mmscale.models.vocabulary import LanguageHead
from mmscale.nn import cross_entropy
from mmscale.nn.expert_parallel import ExpertExchange
from mmscale.nn.experts import Experts
from mmscale.plan.live_bytes import LiveBytes
from mmscale.plan.repeated_blocks import RepeatedBlocks

_CUDA_CHUNK = 8
"""A chunk of logits is this much larger on CUDA (``cross_entropy.chunk_rows``)."""


@dataclass(frozen=True)
class Event:
    """A moment of the pass, and the memory until the next one.

    Attributes:
        kind: ``forward`` or ``backward`` (a module begins), ``end`` (it ends), or ``gradient`` (one is complete).
        name: Path of the module or of the parameter.
        backward: Whether the moment is in the backward pass.
        start: Bytes of live tensors at the moment.
        live: Largest number of bytes of live tensors until the next event.
        head: The part of ``live`` that the language head allocated.
    """

    kind: str
    name: str
    backward: bool
    start: int
    live: int
    head: int


class _Attention(Function):
    """Shapes of a fused attention kernel: saves its inputs, its output and one float32 a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, _ = query.shape
        output = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty_like(each.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for each in ctx.saved_tensors[:3]
        )


def _attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Replace ``F.scaled_dot_product_attention``."""
    output: Tensor = _Attention.apply(query, key, value)
    return output


class _Balanced:
    """Gives each expert an equal number of rows, in place of a module's ``exchange``."""

    def __init__(self, num_experts: int, size: int) -> None:
        self._num_experts = num_experts
        self._inner = None if size == 1 else ExpertExchange(None, size, num_experts // size, self._all_to_all)

    @staticmethod
    def _all_to_all(received: Tensor, sent: Tensor, *_: Any, group: Any) -> None:
        del group
        if not received.is_meta:
            received.copy_(sent)

    def __call__(self, compute: Any, rows: Tensor, weights: Tensor, counts: Tensor, dropout: Any) -> Tensor:
        least, more = divmod(len(rows), self._num_experts)
        counts = torch.tensor([least + (expert < more) for expert in range(self._num_experts)], device="cpu")
        exchange = self._inner
        output: Tensor = (
            compute(rows, weights, counts, dropout)
            if exchange is None
            else exchange(compute, rows, weights, counts, dropout)
        )
        return output


def trace(
    graph: LossGraph,
    batch: MultimodalBatch,
    *,
    device: str,
    checkpointing: bool,
    expert_parallel: int = 1,
    repeated: int = 4,
) -> list[Event]:
    """Return the events of one forward and backward pass.

    Args:
        graph: Model and objective on the meta device, with ``requires_grad`` set. Unchanged afterwards.
        batch: The microbatch, on the meta device.
        device: Device of the real pass, ``cpu`` or ``cuda``: kernels and chunks of logits depend on it.
        checkpointing: Whether the units recompute their activations.
        expert_parallel: Ranks that share the experts.
        repeated: Run one of the equal blocks only if there are at least this many (``repeated_blocks.py``). To run it
            alone costs as much as three blocks in the pass.
    """
    live, events = LiveBytes(), list[Event]()
    live.ignore([*graph.parameters(), *graph.buffers()])
    map_batch(batch, Tensor, lambda each: live.ignore([each]))
    state: dict[str, Any] = {"kind": "end", "name": "", "backward": False, "start": 0}

    def event(kind: str, name: str) -> None:
        if blocks.rehearsing:
            blocks.record(name)
            return
        events.append(Event(**state, live=live.peak, head=live.peak_head))
        state.update(kind=kind, name=name, start=live.live)
        live.restart()

    blocks = RepeatedBlocks(live, event)
    with ExitStack() as stack:
        if checkpointing:
            stack.callback(recompute(list(graph.model.checkpoint_units())))  # type: ignore[operator]
        for name, module, _ in gathered_modules(graph):
            _watch(stack, module, name, event, live)
        for name, parameter in graph.named_parameters():
            if parameter.requires_grad:
                stack.callback(_watch_gradient(parameter, name, event).remove)
        for module in graph.modules():
            if isinstance(module, Experts):
                module.exchange = _Balanced(module.num_experts, expert_parallel)  # type: ignore[assignment]
                stack.callback(setattr, module, "exchange", None)
        stack.enter_context(_shapes_only(graph, device))
        units = [(name, module) for name, module, is_unit in gathered_modules(graph) if is_unit]
        stack.callback(blocks.replace(units, repeated))
        stack.enter_context(live)
        loss = graph(batch)[0]
        state["backward"] = True
        event("end", "")
        loss.backward()
        event("end", "")
    return events[1:]


def gathered_modules(graph: LossGraph) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield name, module and whether it is a unit, for each module whose weights ZeRO-3 gathers together.

    They are the units, and each other module with parameters of its own.
    """
    units = [*graph.model.checkpoint_units(), *(unit for each in graph.teachers for unit in each.units())]  # type: ignore[operator]
    inside = {module for unit in units for module in unit.modules()}
    for name, module in graph.named_modules():
        if module in units and any(True for _ in module.parameters()):
            yield name, module, True
        elif module not in inside and module._parameters:
            yield name, module, False


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Replace torch's kernel for packed rows: ``(T, H, K)`` in, the same out."""
    output: Tensor = _Attention.apply(*(each.transpose(0, 1).unsqueeze(0) for each in (query, key, value)))
    return output.squeeze(0).transpose(0, 1)


def _rms_norm(rows: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Replace ``F.rms_norm`` by what a CPU computes: it has no fused kernel, and keeps the normalised rows."""
    wide = rows.float()
    normalised = wide * (wide.pow(2).mean(-1, keepdim=True) + (eps or 0.0)).rsqrt()
    return (normalised if weight is None else normalised * weight).to(rows.dtype)


@contextmanager
def _shapes_only(model: nn.Module, device: str) -> Iterator[None]:
    """Let functions that the meta device lacks, or that depend on the device, compute the shapes of ``device``."""
    changes: list[tuple[Any, str, Any]] = [
        (F, "scaled_dot_product_attention", _attention),
        (torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True),
    ]
    half = next(model.parameters()).dtype is not torch.float32
    if device == "cuda" and half:
        changes.append((varlen, "varlen_attn", _varlen_attention))
        changes += [(module, "backend", "torch_varlen") for module in model.modules() if hasattr(module, "backend")]
    if device == "cpu":
        changes.append((F, "rms_norm", _rms_norm))
    if device == "cuda":
        changes.append((cross_entropy, "CHUNK_BYTES", cross_entropy.CHUNK_BYTES * _CUDA_CHUNK))
    before = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


def _watch(stack: ExitStack, module: nn.Module, name: str, event: Any, live: LiveBytes) -> None:
    is_head = isinstance(module, LanguageHead)

    def ended(_: Any) -> None:
        event("end", name)

    def started_backward(_: Any) -> None:
        event("backward", name)

    def before(_: Any, inputs: tuple[Any, ...]) -> None:
        live.in_head = is_head
        event("forward", name)
        for value in inputs:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(ended)
                break

    def after(_: Any, __: Any, output: Any) -> None:
        live.in_head = False
        event("end", name)
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(started_backward)
                break

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _watch_gradient(parameter: nn.Parameter, name: str, event: Any) -> Any:
    def complete(finished: Tensor) -> None:
        finished.grad = None
        event("gradient", name)

    return parameter.register_post_accumulate_grad_hook(complete)
