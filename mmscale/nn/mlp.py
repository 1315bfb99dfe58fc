"""The dense feed-forward block, gated or plain."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.sizes import Width


class Activation(str, Enum):
    """Elementwise non-linearity."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    QUICK_GELU = "quick_gelu"
    RELU_SQUARED = "relu_squared"


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.QUICK_GELU: _quick_gelu,
    Activation.RELU_SQUARED: _relu_squared,
}


class DenseMlpConfig(StrictConfig):
    """Feed-forward block without experts."""

    kind: Literal["dense"] = "dense"
    hidden_dim: Width
    """F, channels between the two projections."""
    activation: Activation = Activation.SILU
    """Non-linearity between the projections."""
    gated: bool = True
    """Multiply the activation by a second projection (SwiGLU and its kin)."""
    bias: bool = False
    """Biases on all projections."""

    def of_block(self, number: int) -> DenseMlpConfig:
        """The feed-forward of the 0-based block ``number``: the same in all blocks."""
        return self

    def build(self, dim: int) -> nn.Module:
        """Return the module for a stream of width ``dim``."""
        return Mlp(dim, self)

    def flops_per_row(self, dim: int) -> int:
        """Forward operations of one row."""
        return 2 * dim * self.hidden_dim * (3 if self.gated else 2)

    def last_product(self, dim: int) -> int:
        """Forward operations of one row in the last product, whose output no backward pass needs."""
        return 2 * dim * self.hidden_dim


class Mlp(nn.Module):
    """``down(act(gate(x)) * up(x))`` if gated, else ``down(act(up(x)))``.

    Args:
        dim: Channels that come in.
        config: Shape.
        out_dim: Channels that go out; None: as many.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """

    def __init__(self, dim: int, config: DenseMlpConfig, out_dim: int | None = None) -> None:
        super().__init__()
        if config.gated:
            self.gate_proj = nn.Linear(dim, config.hidden_dim, bias=config.bias)
        self.up_proj = nn.Linear(dim, config.hidden_dim, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden_dim, out_dim or dim, bias=config.bias)
        self.activate = ACTIVATIONS[config.activation]
        self.gated = config.gated

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... out_dim"]:
        if self.gated:
            return self.down_proj(self.activate(self.gate_proj(hidden)) * self.up_proj(hidden))
        return self.down_proj(self.activate(self.up_proj(hidden)))
