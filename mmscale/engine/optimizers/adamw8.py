"""AdamW with both moments in 8 bits.

    chunk of a parameter: codes, scales --dequantise--> moments, float32 --AdamW--> step --quantise--> codes, scales

Only one chunk's moments exist in float32 at a time. The formula is that of ``torch.optim.AdamW``. The step uses the new
moments before they are quantised.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861), section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmscale.engine.optimizers.eight_bit import QuantisedMoment
from mmscale.optim.config import AdamWConfig


class AdamW8(torch.optim.Optimizer):
    """AdamW on flat masters. It steps only those whose state ``eight_bit.zero_moment`` created.

    Args:
        groups: From ``mmscale.optim.schedule.parameter_groups``.
        config: Betas and epsilon.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdamWConfig) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the tensors in ``param_groups``. ZeRO calls this for one group, or a part of one, at a time."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None and self.state[values]:
                    self._step_flat(group, values, values.grad)

    def _step_flat(self, group: dict[str, Any], values: Tensor, gradient: Tensor) -> None:
        state = self.state[values]
        state["step"] += 1
        steps, rate = state["step"].item(), group["lr"]
        first_share, second_share = (1 - beta**steps for beta in self._config.betas)
        values.mul_(1 - rate * group["weight_decay"])
        for shard, first in state["exp_avg"].items():
            second, weights, grads = state["exp_avg_sq"][shard], shard.view_of(values), shard.view_of(gradient)
            for low, high in first.chunks(0, first.length):
                average, variance = self._update_moments(first, second, low, grads[low:high])
                size = variance.sqrt_().div_(math.sqrt(second_share)).add_(self._config.eps)
                weights[low:high].addcdiv_(average, size, value=-rate / first_share)

    def _update_moments(
        self, first: QuantisedMoment, second: QuantisedMoment, low: int, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update the moments of the values from ``low`` on. Return them in float32, before quantisation."""
        beta1, beta2 = self._config.betas
        high = low + len(gradient)
        average = first.read(low, high).lerp_(gradient, 1 - beta1)
        variance = second.read(low, high).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first.write(low, average)
        second.write(low, variance)
        return average, variance
