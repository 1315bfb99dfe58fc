"""The Conv-GMLP projector: a gated convolution joins consecutive features of a sound, with a residual connection.

features (R, C) --every rate features--> x (F, rate C) --down(silu(gate x) * up x) + x, norm, linear--> (F, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from mmscale.models.connectors.projector import ProjectorBase
from mmscale.nn.audio_embed import grouped_rows
from mmscale.nn.block import Activation, DenseMlpConfig, Mlp
from mmscale.nn.flops import Work
from mmscale.nn.sizes import Epsilon


class ConvGmlpProjectorConfig(ProjectorBase):
    """A gated convolution over consecutive features (Baichuan-Omni)."""

    kind: Literal["conv_gmlp"] = "conv_gmlp"
    rate: Literal[2, 4, 8] = 4
    """Consecutive features that become one. Those at the end of an item that do not fill a group are dropped."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the layer norm after the residual connection."""

    @property
    def merge(self) -> int:
        """1: sounds have no squares of patches."""
        return 1

    @property
    def reductions(self) -> tuple[tuple[int, int, int], ...]:
        return ((self.rate, self.rate, 0),)

    def build(self, feature_dim: int, dim: int) -> ConvGmlp:
        return ConvGmlp(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        inner = self.rate * feature_dim
        return [Work("features", 4 * inner**2), Work("features", 2 * inner**2 + 2 * inner * dim)]


class ConvGmlp(nn.Module):
    """Gated convolutions with stride = kernel, a residual connection, a layer norm, and a linear layer.

    Such a convolution is a linear layer over the ``rate`` features side by side: its weight ``(out, C, rate)`` is ours
    with the last two axes exchanged.

    Source: Baichuan-Omni (arXiv 2410.08565), section 2.3; details, among them the absence of biases, as in the code of
        Baichuan-Omni-1.5, ``OmniAudioVQBridgeTokenizer`` without its quantisation.
    """

    def __init__(self, feature_dim: int, dim: int, config: ConvGmlpProjectorConfig) -> None:
        super().__init__()
        self.rate = config.rate
        inner = config.rate * feature_dim
        self.gmlp = Mlp(inner, DenseMlpConfig(hidden_dim=inner, activation=Activation.SILU))
        self.norm = nn.LayerNorm(inner, eps=config.norm_eps)
        self.linear = nn.Linear(inner, dim)

    def forward(
        self, features: Float[Tensor, "R feature_dim"], grids: Sequence[tuple[int, int, int]]
    ) -> Float[Tensor, "F_rows D"]:
        """Return ``n // rate`` rows for each item of ``n`` features, item after item."""
        joined = grouped_rows(features, [time for time, _, _ in grids], self.rate).flatten(1)
        return self.linear(self.norm(self.gmlp(joined) + joined))
