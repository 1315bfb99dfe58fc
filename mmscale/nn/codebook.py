"""The codes of an image tokenizer: the search for the nearest code, and the changes that no optimizer makes.

    latents --nearest--> tokens --counts and sums over all ranks--> moving averages, new values for idle codes

Statistics are integers (``code_statistics``), so their sum over rows, microbatches and ranks does not depend on the
order, and every rank computes the same codes.

Source: van den Oord et al. 2017, "Neural discrete representation learning" (arXiv 1711.00937), section 3.2 and appendix
A.1 (moving averages).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

_MOST_DISTANCES = {"cpu": 1 << 17}
"""Largest number of distances between latents and codes in memory, by device. On a CPU they fit its cache: 512 latents
and 16,384 codes of 8 channels take 15 ms, all at once 60 ms (Xeon with AMX, one thread)."""
_MOST_ON_DEVICES = 1 << 25
"""The same on other devices: 128 MiB in float32, for few launches of kernels."""
_UNITS = 1 << 24
"""Units of 1 in the sums of latents: a rounding error of 3e-8, and 2^53 for 2 million latents of 256."""
_SPLIT = 1 / 1024
"""Relative difference between a busy code and the copy of it that replaces an idle one (faiss, ``Clustering.cpp``)."""
_LEAST_SIZE = 1e-6
"""Moving average of a code's latents per step below which the code keeps its value."""


class Quantized(NamedTuple):
    """Latents and their nearest codes.

    Attributes:
        tokens: int64 ``(R,)``, number of the nearest code of each latent.
        latents: ``(R, C)``, the latents as they were compared: of length 1 if the search normalises.
        codes: ``(R, C)``, the nearest codes as the decoder reads them, with gradients to the codebook.
    """

    tokens: Tensor
    latents: Tensor
    codes: Tensor


class NewCodes(NamedTuple):
    """Values for some codes: float32 ``(K, C)``, and bool ``(K,)`` which of the K rows to write."""

    values: Tensor
    chosen: Tensor


class Codebook(nn.Module):
    """K codes of C channels. Distances are computed in float32.

    ZeRO-3 gathers the codes only during a call of the module, so a call finds codes or reads them.

    Args:
        size: K.
        dim: C.
        normalized: ``never``, ``decoding`` or ``always``, see ``VqganConfig.normalized_codes``.
        averaged: Whether codes are moving averages of their latents.
        counts_idle: Whether to count the steps since each code was used.

    Attributes:
        idle_steps: int64 ``(K,)``, steps since the code was last used. Exists only with ``counts_idle``.
        cluster_sizes: int32 ``(K,)``, the bits of float32 values: the moving average of the number of latents in a
            step; 0 until the code was used. Exists only with ``averaged``, like the next.
        cluster_sums: int32 ``(K, C)``, the bits of float32 values: the moving average of the sum of these latents.
            Integers, so that no mixed-precision engine rounds them.
    """

    idle_steps: Tensor
    cluster_sizes: Tensor
    cluster_sums: Tensor

    def __init__(self, size: int, dim: int, normalized: str, *, averaged: bool, counts_idle: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))
        nn.init.uniform_(self.weight, -1 / size, 1 / size)
        self.uniform_init = {"weight": 1 / size}
        self.normalized, self.averaged = normalized, averaged
        if counts_idle:
            self.register_buffer("idle_steps", torch.zeros(size, dtype=torch.int64))
        if averaged:
            self.register_buffer("cluster_sizes", torch.zeros(size, dtype=torch.int32))
            self.register_buffer("cluster_sums", torch.zeros(size, dim, dtype=torch.int32))

    def forward(self, latents: Float[Tensor, "R C"] | None, tokens: Int[Tensor, " R"] | None = None) -> Quantized:
        """Return the nearest codes of ``latents``, or the codes of ``tokens`` (then the latents are those codes)."""
        if latents is None:
            assert tokens is not None
            codes = self._decoded(F.embedding(tokens, self.weight))
            return Quantized(tokens, codes, codes)
        table = self.weight.detach()
        if self.normalized == "always":
            latents, table = F.normalize(latents, dim=-1), F.normalize(table, dim=-1)
        nearest = _nearest(latents.detach().float(), table.float())
        return Quantized(nearest, latents, self._decoded(F.embedding(nearest, self.weight)))

    def _decoded(self, codes: Tensor) -> Tensor:
        return codes if self.normalized == "never" else F.normalize(codes, dim=-1)

    @torch.no_grad()
    def update(self, statistics: Tensor, decay: float, revive_after: int | None) -> NewCodes:
        """Update the buffers after a step, and return the codes that change.

        Args:
            statistics: ``code_statistics`` of the whole step, in float64 or int64.
            decay: Of the moving averages, per step; only with ``averaged``.
            revive_after: Steps without a latent after which a code is replaced by one near a busy code, so that both
                share its latents; None: never. Each busy code replaces at most one idle code in a step, the busiest
                first.

        Source: for the replacement faiss, ``Clustering.cpp``, ``split_clusters``.
        """
        statistics = statistics.to("cpu", torch.float64)
        counts, sums = statistics[:, 0], statistics[:, 1:] / _UNITS
        values, chosen = torch.zeros_like(sums), torch.zeros(len(counts), dtype=torch.bool)
        sizes, totals = torch.zeros_like(counts), torch.zeros_like(sums)
        if self.averaged:
            sizes, totals = _floats(self.cluster_sizes), _floats(self.cluster_sums)
            share = torch.where(sizes == 0, 1.0, 1 - decay)  # A code's first latents replace its initial value.
            sizes = (1 - share) * sizes + share * counts
            totals = (1 - share[:, None]) * totals + share[:, None] * sums
            chosen = sizes > _LEAST_SIZE
            values = torch.where(chosen[:, None], totals / sizes.clamp(min=_LEAST_SIZE)[:, None], values)
        if revive_after is not None:
            idle = torch.where(counts > 0, 0, self.idle_steps.cpu() + 1)
            order = counts.argsort(descending=True, stable=True)
            dead, busy = (idle >= revive_after).nonzero().squeeze(1), order[counts[order] >= 2]
            pairs = min(len(dead), len(busy))
            dead, busy = dead[:pairs], busy[:pairs]
            signs = 1 - 2 * (torch.arange(sums.shape[1]) % 2)
            values[dead] = sums[busy] / counts[busy, None] * (1 + _SPLIT * signs)
            chosen[dead] = True
            sizes[busy], totals[busy] = sizes[busy] / 2, totals[busy] / 2
            sizes[dead], totals[dead] = sizes[busy], sizes[busy, None] * values[dead]
            self.idle_steps.copy_(idle.index_fill(0, dead, 0))
        if self.averaged:
            self.cluster_sizes.copy_(sizes.float().view(torch.int32))
            self.cluster_sums.copy_(totals.float().view(torch.int32))
        return NewCodes(values.float(), chosen)


@torch.no_grad()
def code_statistics(quantized: Quantized, size: int, counted: Float[Tensor, " R"]) -> Int[Tensor, "K columns"]:
    """Return, for each of K = ``size`` codes, the number of its latents and their sum in units of 2**-24.

    Args:
        quantized: Latents and tokens.
        size: K.
        counted: 1 for latents that count, 0 for those of dummy images.
    """
    ones = counted.to(torch.float64).unsqueeze(1)
    rows = torch.cat([ones, (quantized.latents.double() * _UNITS).round() * ones], dim=1).long()
    return rows.new_zeros(size, rows.shape[1]).index_add(0, quantized.tokens, rows)


def _floats(bits: Tensor) -> Tensor:
    return bits.cpu().view(torch.float32).double()


def _nearest(latents: Tensor, table: Tensor) -> Tensor:
    """Return the row of ``table`` with the least squared distance to each latent; the first of equal ones."""
    squares, columns = table.square().sum(1), table.t()
    most = _MOST_DISTANCES.get(table.device.type, _MOST_ON_DEVICES)
    nearest = []
    for chunk in latents.split(max(1, most // len(table))):
        # |z|^2 does not change the order, but the published code adds it first, and rounding decides between near
        # codes.
        distances = (chunk.square().sum(1, keepdim=True) + squares).sub_(2 * chunk @ columns)
        nearest.append(distances.argmin(1))
    return torch.cat(nearest)
