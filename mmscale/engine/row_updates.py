"""Changes of parameter rows by a rule of the objective, after the optimizer's step.

    statistics of each microbatch --summed over microbatches and ranks--> objective.after_step --> rows, metrics

An image tokenizer's codes change so: as moving averages of their latents, or when an idle code is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmscale.dist import World, all_reduce_sum_list
from mmscale.engine.graph import UpdatingObjective
from mmscale.errors import EngineError


def all_reduce_sum_tensors(world: World, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors over the ranks in one message. All ranks must call, with equal shapes.

    Returns:
        float64 tensors on the host, of the same shapes.
    """
    whole = all_reduce_sum_list(world, torch.cat([each.flatten() for each in tensors]).tolist())
    parts = torch.tensor(whole, dtype=torch.float64).split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def update_rows(
    engine: Any, objective: Any, statistics: Sequence[tuple[Tensor, ...]], *, applied: bool
) -> dict[str, float]:
    """Let the objective change rows of a parameter. Return the metrics that follow from its statistics.

    All ranks must call.

    Args:
        engine: The ``Engine``. The rows are written through its partition. Checkpoints then store the parameter, even
            if it is frozen and came from another checkpoint.
        objective: Its ``after_step`` returns the rows.
        statistics: ``ObjectiveOutput.statistics`` of each microbatch of this rank.
        applied: Whether the optimizer changed weights in this step.

    Raises:
        EngineError: the objective returned statistics and has no ``after_step``.
    """
    if not isinstance(objective, UpdatingObjective):
        raise EngineError(
            f"{type(objective).__name__} returns statistics and has no after_step that reads them; leave them out"
        )
    own = [torch.stack(parts).sum(0).double() for parts in zip(*statistics, strict=True)]
    with engine.clock.communicating():
        sums = all_reduce_sum_tensors(engine.world, own)
    changes = objective.after_step(engine.model, sums, applied=applied)
    if changes.chosen.any():
        engine.partition.write_rows(changes.parameter, changes.values, changes.chosen)
        engine.frozen_sources.pop(changes.parameter, None)
    return dict(changes.metrics)
