"""Stacked expert weights and their computation on rows that are sorted by expert.

    rows (R, D), counts (E) --gate and up--> (R, 2 F) --activate, multiply, weigh--> (R, F) --down--> (R, D)

Each row is multiplied by its router weight before the down projection, which is linear. So the backward pass needs no
unweighted outputs, and both paths save R (D + 2 F) values: the rows and the gate and up projections.

    Dispatch         copy each row once per expert that it chose, sort by expert, and add up the outputs
    _ExpertLoop      one expert after the other: CPU, and CUDA in float32. Needs the counts on the host.
    _GroupedExperts  one kernel for all experts: CUDA in bfloat16. The counts stay on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmscale.nn.block import ACTIVATIONS, Activation
from mmscale.nn.dropout import Dropout, SubLayer
from mmscale.nn.expert_parallel import ExpertExchange

Activate = Callable[[Tensor], Tensor]
_GROUP_BYTES = 1 << 20
"""Size of the projected rows of a group of experts: half of a core's second-level cache."""


@dataclass(frozen=True)
class Dispatch:
    """The choices that experts compute, sorted by expert and then by row.

    Attributes:
        copies: A, experts that each row chose.
        choices: int64 ``(R,)``, indices of the computed choices among all ``(T, A)``. R is below ``T A`` if some rows
            are not valid or an expert has reached its capacity.
        counts: int64 ``(E,)``, number of computed choices of each expert.
        order: int64 ``(R,)``, positions in ``choices``, sorted by row.
        starts: int64 ``(T,)``, first index of each row in ``order``.
    """

    copies: int
    choices: Int[Tensor, " R"]
    counts: Int[Tensor, " E"]
    order: Int[Tensor, " R"]
    starts: Int[Tensor, " T"]

    @classmethod
    def of(
        cls,
        chosen: Int[Tensor, "T A"],
        num_experts: int,
        index: Int[Tensor, " V"] | None = None,
        capacity: int | None = None,
    ) -> Dispatch:
        """Return the dispatch of the rows of a microbatch.

        Args:
            chosen: Experts of each row.
            num_experts: E.
            index: Rows that use experts, in order; None for all.
            capacity: Number of rows that an expert computes, the first ones; None for all. With a capacity, the host
                waits for the device.
        """
        device, copies = chosen.device, chosen.shape[1]
        experts, choices = (chosen if index is None else chosen.index_select(0, index)).flatten().sort(stable=True)
        if index is not None:
            choices = index.index_select(0, choices // copies) * copies + choices % copies
        # searchsorted instead of bincount: bincount makes the host wait for the device.
        ends = torch.searchsorted(experts, torch.arange(num_experts, device=device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        places = torch.arange(len(choices), device=device)
        if capacity is not None:
            choices = choices[places - (ends - counts)[experts] < capacity]
            counts = counts.clamp(max=capacity)
        complete = len(choices) == chosen.numel()
        order = torch.empty_like(choices).scatter_(0, choices, places) if complete else choices.argsort()
        firsts = torch.arange(len(chosen), device=device) * copies
        starts = torch.searchsorted(choices.index_select(0, order), firsts)
        return cls(copies, choices, counts, order, starts)

    def gather(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "R D"]:
        """Return the row of each choice."""
        gathered: Tensor = _Gather.apply(hidden, self)
        return gathered

    def weights(self, weights: Float[Tensor, "T A"]) -> Float[Tensor, " R"]:
        """Return the weight of each choice."""
        return weights.flatten().index_select(0, self.choices)

    def masks(self, dropout: Dropout, rate: float, chosen: Int[Tensor, "T A"]) -> Dropout:
        """Return the masks of the choices."""
        experts = chosen.flatten().index_select(0, self.choices)
        return dropout.for_choices(rate, self.choices // self.copies, experts)

    def sum(self, outputs: Float[Tensor, "R D"]) -> Float[Tensor, "T D"]:
        """Return the sum over each row's choices; dropped choices contribute nothing."""
        total: Tensor = _Sum.apply(outputs, self)
        return total


class _Gather(Function):
    """Copy rows. Unlike that of ``index_select``, the gradient is deterministic on CUDA and adds up in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(dispatch.order, dispatch.starts)
        return hidden.index_select(0, dispatch.choices // dispatch.copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, *ctx.saved_tensors), None


class _Sum(Function):
    """The transpose of ``_Gather``."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.copies = dispatch.copies
        ctx.save_for_backward(dispatch.choices)
        return _sum(outputs, dispatch.order, dispatch.starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (choices,) = ctx.saved_tensors
        return grad.index_select(0, choices // ctx.copies), None


def _sum(values: Float[Tensor, "R D"], order: Int[Tensor, " R"], starts: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
    """Return the sum over each row's computed choices in one pass over ``values``; a row without any gets 0."""
    return F.embedding_bag(order, values, starts, mode="sum")


class Experts(nn.Module):
    """E gated feed-forward networks, stacked.

    The gate and up projections are one matrix ``(E, 2 F, D)``, gate first, as in Hugging Face's expert modules.

    Args:
        dim: D.
        num_experts: E.
        experts_per_token: A.
        expert_dim: F.
        activation: Non-linearity of the gate.

    Attributes:
        exchange: With expert parallelism, sends rows to the ranks that hold their experts. The parameters are then
            those of this rank's experts; ``num_experts`` counts all experts.
    """

    def __init__(
        self, dim: int, num_experts: int, experts_per_token: int, expert_dim: int, activation: Activation
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, expert_dim))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)
        self.activate = ACTIVATIONS[activation]
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.exchange: ExpertExchange | None = None

    def forward(
        self,
        rows: Float[Tensor, "R D"],
        weights: Float[Tensor, " R"],
        counts: Int[Tensor, " E"],
        dropout: Dropout | None = None,
    ) -> Float[Tensor, "R D"]:
        """Return the weighted output of each row's expert.

        Args:
            rows: Input, sorted by expert.
            weights: Factor of each row's output.
            counts: Number of rows of each expert; their sum is R.
            dropout: Masks of ``rows`` for the values between the projections; None for none.
        """
        if self.exchange is not None:
            return self.exchange(self._compute, rows, weights, counts, dropout)
        return self._compute(rows, weights, counts, dropout)

    def _compute(self, rows: Tensor, weights: Tensor, counts: Tensor, dropout: Dropout | None) -> Tensor:
        kernel = _GroupedExperts if _has_grouped_kernel(rows, self.gate_up_proj) else _ExpertLoop
        gate = _Gate(self.activate, dropout)
        outputs: Tensor = kernel.apply(rows, weights, self.gate_up_proj, self.down_proj, counts, gate)
        return outputs


def _has_grouped_kernel(rows: Tensor, gate_up_proj: Tensor) -> bool:
    # In float32, grouped_mm reads the counts on the host in each of its six calls; the loop reads them once.
    if not rows.is_cuda or rows.dtype is not torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    # The kernel refuses rows whose length is not a multiple of 16 bytes.
    return rows.shape[0] > 0 and rows.shape[1] % 8 == 0 and gate_up_proj.shape[1] % 16 == 0


@dataclass(frozen=True)
class _Gate:
    """The computation between the projections of experts: ``dropout(activate(gate) * up) * weight``."""

    activate: Activate
    dropout: Dropout | None

    def split(self, counts: list[int]) -> list[_Gate]:
        """Return the gates of consecutive groups of rows."""
        if self.dropout is None:
            return [self] * len(counts)
        return [_Gate(self.activate, part) for part in self.dropout.split(counts)]

    def forward(self, projected: Float[Tensor, "R F_2"], weights: Float[Tensor, " R"]) -> Float[Tensor, "R F"]:
        """Return the input of the down projection."""
        gate, up = projected.chunk(2, dim=-1)
        return self._drop(self.activate(gate).mul_(up)).mul_(weights.unsqueeze(1))

    def backward(
        self, projected: Float[Tensor, "R F_2"], weights: Float[Tensor, " R"], d_hidden: Float[Tensor, "R F"]
    ) -> tuple[Float[Tensor, "R F"], Float[Tensor, "R F_2"], Float[Tensor, " R"]]:
        """Return the result of ``forward`` again, and the gradients of its arguments.

        Args:
            projected: As in ``forward``.
            weights: As in ``forward``.
            d_hidden: Gradient of the result; overwritten.
        """
        gate, up = projected.chunk(2, dim=-1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_(self.activate is not F.silu)
            activated = self.activate(gate)
        unweighted = self._drop(activated.detach() * up)
        d_weights = (d_hidden * unweighted).sum(-1)
        d_hidden = self._drop(d_hidden.mul_(weights.unsqueeze(1)))
        d_projected = torch.empty_like(projected)
        d_gate, d_up = d_projected.chunk(2, dim=-1)
        torch.mul(d_hidden, activated.detach(), out=d_up)
        d_hidden.mul_(up)
        if activated.requires_grad:
            d_gate.copy_(torch.autograd.grad(activated, gate, d_hidden)[0])
        else:  # Autograd would allocate the gradient and copy it, for each group of experts.
            torch.ops.aten.silu_backward.grad_input(d_hidden, gate, grad_input=d_gate)
        return unweighted.mul_(weights.unsqueeze(1)), d_projected, d_weights

    def _drop(self, values: Tensor) -> Tensor:
        return values if self.dropout is None else self.dropout(values, SubLayer.FEED_FORWARD)


class _ExpertLoop(Function):
    """Experts one after the other, each on rows that stay in the cache between its projections.

    Consecutive experts with few rows share the operations between the projections. Autograd on a loop over ``unbind``
    copies the gradients of all experts once more into the stack. It is 1.2 times as slow as Hugging Face's grouped_mm
    with 64 experts, while this function is 1.08 times as fast (2-core Xeon, 1 thread).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        counts: Tensor,
        gate: _Gate,
    ) -> Tensor:
        ctx.counts = counts.tolist()
        ctx.groups = _group(ctx.counts, gate_up_proj.shape[1] * rows.element_size())
        sizes = [sum(lengths) for _, lengths in ctx.groups]
        ctx.gates = gate.split(sizes)
        outputs, projected = torch.empty_like(rows), []
        row, output = rows.split(ctx.counts), outputs.split(ctx.counts)
        gate_up, down = gate_up_proj.mT.unbind(), down_proj.mT.unbind()
        for (experts, lengths), own, weight in zip(ctx.groups, ctx.gates, weights.split(sizes), strict=True):
            projected.append(rows.new_empty(len(weight), gate_up_proj.shape[1]))
            for expert, into in zip(experts, projected[-1].split(lengths), strict=True):
                torch.mm(row[expert], gate_up[expert], out=into)
            for expert, hidden in zip(experts, own.forward(projected[-1], weight).split(lengths), strict=True):
                torch.mm(hidden, down[expert], out=output[expert])
        ctx.save_for_backward(rows, weights, gate_up_proj, down_proj, *projected)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, gate_up_proj, down_proj, *projected = ctx.saved_tensors
        d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
        d_gate_up, d_down = (
            torch.empty_like(stack) if needed else None
            for stack, needed in zip((gate_up_proj, down_proj), ctx.needs_input_grad[2:4], strict=True)
        )
        gate_up, down = gate_up_proj.unbind(), down_proj.unbind()
        into_gate_up, into_down = (None if stack is None else stack.unbind() for stack in (d_gate_up, d_down))
        row, d_output, d_row = (part.split(ctx.counts) for part in (rows, grad, d_rows))
        sizes = [len(part) for part in projected]
        parts = (ctx.groups, ctx.gates, projected, weights.split(sizes), d_weights.split(sizes))
        for (experts, lengths), own, values, weight, d_weight in zip(*parts, strict=True):
            d_hidden = rows.new_empty(len(values), down_proj.shape[2])
            for expert, into in zip(experts, d_hidden.split(lengths), strict=True):
                torch.mm(d_output[expert], down[expert], out=into)
            hidden, d_values, found = own.backward(values, weight, d_hidden)
            d_weight.copy_(found)
            for expert, of_hidden, of_values in zip(
                experts, hidden.split(lengths), d_values.split(lengths), strict=True
            ):
                torch.mm(of_values, gate_up[expert], out=d_row[expert])
                if into_gate_up is not None:
                    torch.mm(of_values.T, row[expert], out=into_gate_up[expert])
                if into_down is not None:
                    torch.mm(d_output[expert].T, of_hidden, out=into_down[expert])
        return d_rows, d_weights, d_gate_up, d_down, None, None


def _group(counts: list[int], row_bytes: int) -> list[tuple[range, list[int]]]:
    """Return groups of consecutive experts whose projected rows fit in ``_GROUP_BYTES``, with their numbers of rows.

    An expert whose rows do not fit is a group of its own.
    """
    bounds, used = [0], 0
    for expert, count in enumerate(counts):
        if expert > bounds[-1] and used + count * row_bytes > _GROUP_BYTES:
            bounds.append(expert)
            used = 0
        used += count * row_bytes
    return [(range(a, b), counts[a:b]) for a, b in itertools.pairwise([*bounds, len(counts)])]


class _GroupedExperts(Function):
    """All experts in one kernel per product. Rows must be bfloat16 on CUDA, and D and F multiples of 8."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        counts: Tensor,
        gate: _Gate,
    ) -> Tensor:
        ctx.gate = gate
        ends = counts.cumsum(0).to(torch.int32)
        projected = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends)
        ctx.save_for_backward(rows, weights, gate_up_proj, down_proj, ends, projected)
        return F.grouped_mm(gate.forward(projected, weights), down_proj.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, gate_up_proj, down_proj, ends, projected = ctx.saved_tensors
        grad = grad.contiguous()
        d_hidden = F.grouped_mm(grad, down_proj, offs=ends)
        hidden, d_projected, d_weights = ctx.gate.backward(projected, weights, d_hidden)
        gate_up_needed, down_needed = ctx.needs_input_grad[2:4]
        d_gate_up = F.grouped_mm(d_projected.T, rows, offs=ends) if gate_up_needed else None
        d_down = F.grouped_mm(grad.T, hidden, offs=ends) if down_needed else None
        return F.grouped_mm(d_projected, gate_up_proj, offs=ends), d_weights, d_gate_up, d_down, None, None
