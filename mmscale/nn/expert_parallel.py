"""Experts that are divided among ranks: each rank holds a slice of every stack of experts.

    rows of this rank with their weights, sorted by expert
        --all-to-all--> rows of all ranks for the experts of this rank
        --sort by expert--> experts --original order-->
        --all-to-all--> outputs in the order of the rows

The ranks of a group exchange the number of rows of each expert first, so a message holds no padding and drops no row.
A rank that sends or receives no row makes the same calls as the others. Both exchanges are part of the autograd graph:
the backward pass sends gradients the opposite way. Recomputation repeats the exchanges. It must route each row as the
forward pass did, which holds because routing depends on no state that changes.

Not for: the choice of experts and its statistics, which every rank makes for its own rows (``nn/router.py``), and the
placement of weights and gradients (``engine/expert_parallel.py``).

Source: Lepikhin et al. 2020, "GShard", section 3.2 (all-to-all dispatch); here without capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmscale.nn.dropout import Dropout

AllToAll = Callable[..., object]
"""Has the arguments of ``torch.distributed.all_to_all_single``."""
Compute = Callable[[Tensor, Tensor, Tensor, Dropout | None], Tensor]

PARTS = "expert_parts"
"""Attribute of a parameter that holds one of several equal slices of a stack: the number of slices."""


def num_parts(parameter: nn.Parameter) -> int:
    """Return the number of slices into which the whole parameter is divided along its first dimension; mostly 1."""
    return int(getattr(parameter, PARTS, 1))


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, with the experts of all ranks, even if ZeRO-3 has emptied it."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    parts = num_parts(parameter)
    return shape if parts == 1 else (shape[0] * parts, *shape[1:])


class ExpertExchange:
    """Sends rows to the ranks that hold their experts, and returns the outputs.

    Rank r of the group holds the experts from ``r * num_held`` on.

    Args:
        group: The ranks that together hold all experts; None: all ranks.
        size: Number of ranks in the group.
        num_held: Experts of each layer on each rank.
        all_to_all: Sends the messages.
    """

    def __init__(self, group: ProcessGroup | None, size: int, num_held: int, all_to_all: AllToAll) -> None:
        self.size = size
        self.num_held = num_held
        self._group = group
        self._all_to_all = all_to_all

    def __call__(
        self,
        compute: Compute,
        rows: Float[Tensor, "R D"],
        weights: Float[Tensor, " R"],
        counts: Int[Tensor, " E"],
        dropout: Dropout | None,
    ) -> Float[Tensor, "R D"]:
        """Return the weighted output of each row's expert. All ranks of the group must call.

        The host waits for the device once, for the numbers of rows.

        Args:
            compute: Called with rows and weights for the experts of this rank, sorted by expert, the number of rows of
                each of these experts, and the masks. Returns the weighted outputs.
            rows: Sorted by expert.
            weights: Factor of each row's output.
            counts: Number of rows of each of all experts.
            dropout: Masks of the rows; None on all ranks for none. A mask depends on the row alone, so it travels too.
        """
        received = torch.empty_like(counts)  # Rows of each rank for each expert of this rank.
        self._all_to_all(received, counts, group=self._group)
        sent, by_rank = counts.view(self.size, self.num_held), received.view(self.size, self.num_held)
        send_counts, receive_counts = torch.stack([sent.sum(1), by_rank.sum(1)]).tolist()

        # The rows of each rank arrive sorted by expert.
        local = torch.arange(self.num_held, device=rows.device).repeat(self.size)
        local = local.repeat_interleave(received, output_size=sum(receive_counts))
        order = local.argsort(stable=True)

        def arrived(values: Tensor) -> Tensor:
            return self._send(values, send_counts, receive_counts).index_select(0, order)

        masks = None if dropout is None else replace(dropout, rows=arrived(dropout.rows))
        outputs = compute(arrived(rows), arrived(weights), by_rank.sum(0), masks)
        outputs = outputs.index_select(0, order.argsort())
        return self._send(outputs, receive_counts, send_counts)

    def _send(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        sent: Tensor = _Send.apply(rows, self, send_counts, receive_counts)
        return sent

    def exchange(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Send the next ``send_counts[r]`` rows to each rank r; return the received rows in rank order. No gradient."""
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        self._all_to_all(received, rows.contiguous(), receive_counts, send_counts, group=self._group)
        return received


class _Send(torch.autograd.Function):
    """``ExpertExchange.exchange`` with a gradient."""

    @staticmethod
    def forward(
        context: Any, rows: Tensor, exchange: ExpertExchange, send_counts: list[int], receive_counts: list[int]
    ) -> Tensor:
        context.exchange, context.counts = exchange, (receive_counts, send_counts)
        return exchange.exchange(rows, send_counts, receive_counts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return context.exchange.exchange(gradient, *context.counts), None, None, None
