"""Which text belongs to an image, among all pairs of a step on all ranks.

    vectors of own pairs --gathered, without gradient--> vectors of all N pairs
    own rows of the N x N similarities --in closed form--> loss and its slope at each own vector --> autograd

A step of several microbatches runs them twice: first without gradients, to have the vectors of all pairs. So the loss
is the same however the pairs are dealt to microbatches and ranks, and only one microbatch's activations are held.

Source: CLIP (arXiv 2103.00020), figure 3; SigLIP (arXiv 2303.15343), algorithm 1; for the two runs GradCache (Gao et
al. 2021, arXiv 2101.06983), section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.models.connectors.contrastive import PairVectors
from mmscale.models.contrastive import ContrastiveModel
from mmscale.objectives.outputs import ObjectiveOutput

Gather = Callable[[Tensor], list[Tensor]]
"""From rows of this rank to those of all ranks, in their order; they may have different numbers of rows."""
_ROWS = 1024
"""Rows of the similarities that are held at a time."""


@runtime_checkable
class Place(Protocol):
    """Which of the ranks that share a step this is, and where its model lives: ``mmscale.dist.World``."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def _alone(rows: Tensor) -> list[Tensor]:
    return [rows]


class Norms(NamedTuple):
    """Log-normalisers of rows of logits in two parts, ``peak + excess``, and what follows from them.

    Near a loss of zero the largest logit of a row is that of the pair itself. The loss is then the excess alone, whose
    error is relative to itself; the error of the sum is relative to the logits, which are up to 100.

    Attributes:
        peaks: float32 ``(N,)``, the largest logit of a row.
        excess: float32 ``(N,)``, log of the sum of the row's exponentials after the peak is subtracted; at least 0.
        losses: float32 ``(N,)``, the cross-entropy of a row. Kept, since the logits of other chunks are rounded
            otherwise.
    """

    peaks: Tensor
    excess: Tensor
    losses: Tensor


@dataclass(frozen=True)
class AllPairs:
    """What a loss must know of all N pairs of a step; nothing of it has a gradient.

    Attributes:
        images: float32 ``(N, C)``.
        texts: float32 ``(N, C)``.
        scale: float32 ``()``, at most ``max_scale``.
        bias: float32 ``()``; 0 of a softmax.
        image_norms: Of an image over all texts; empty of sigmoids.
        text_norms: Of a text over all images.
        scale_learns: Whether the scale is below its limit, or on its way back.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor
    image_norms: Norms
    text_norms: Norms
    scale_learns: bool = True

    def turned(self) -> AllPairs:
        """Images as texts and texts as images."""
        return replace(
            self,
            images=self.texts,
            texts=self.images,
            image_norms=self.text_norms,
            text_norms=self.image_norms,
        )


@dataclass(frozen=True)
class PreparedBatch:
    """A microbatch of a step of several.

    Attributes:
        batch: The microbatch.
        others: All pairs of the step, its own among them.
        first: Number of its first pair.
    """

    batch: MultimodalBatch
    others: AllPairs
    first: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreparedBatch:
        """The same with the microbatch on ``device``; the vectors are there."""
        return replace(self, batch=self.batch.to(device, non_blocking))


class _Slopes(NamedTuple):
    """Of some images and all texts: ``(rows, C)`` slopes of the sum of losses, ``(rows,)`` losses and hits."""

    vectors: Tensor
    losses: Tensor
    hits: Tensor
    bias: Tensor


class Contrastive:
    """The mean over all pairs of a step of a symmetric cross-entropy, or of a sum of binary ones.

    Args:
        config: Kind of loss and limit of the scale.
        place: This rank.
        gather: ``mmscale.dist.gather_rows`` of its world; a process alone needs none.
    """

    teachers = ()

    def __init__(self, config: ContrastiveConnectorConfig, place: Place, gather: Gather | None = None) -> None:
        if gather is None and place.world_size > 1:
            raise ValueError(f"{place.world_size} ranks share a step: give a way to gather their rows")
        self._softmax = config.loss == "softmax"
        self._limit = math.log(config.max_scale)
        self._place, self._gather_rows = place, gather or _alone

    def weight(self, batch: MultimodalBatch) -> float:
        """Pairs; known on the host before any forward."""
        return float(len(batch.pairs))

    def prepare(
        self, model: ContrastiveModel, microbatches: Sequence[MultimodalBatch]
    ) -> Sequence[MultimodalBatch | PreparedBatch]:
        """One microbatch as it is; several with the vectors of all. All ranks must call, without gradients."""
        if len(microbatches) == 1:
            return microbatches
        own = [model(batch.to(self._place.device, non_blocking=True)) for batch in microbatches]
        others, first = self._gather(own)
        starts = itertools.accumulate((len(vectors.images) for vectors in own), initial=first)
        return [PreparedBatch(batch, others, start) for batch, start in zip(microbatches, starts, strict=False)]

    def __call__(self, model: ContrastiveModel, batch: MultimodalBatch | PreparedBatch) -> ObjectiveOutput:
        """Runs the model on one microbatch. All ranks must call."""
        plain = batch.batch if isinstance(batch, PreparedBatch) else batch
        vectors = model(plain)
        others, first = (batch.others, batch.first) if isinstance(batch, PreparedBatch) else self._gather([vectors])
        count = len(vectors.images)
        with torch.no_grad():
            images = self._slopes(others, first, count)
            texts = self._slopes(others.turned(), first, count)
        losses = (images.losses + texts.losses) / 2
        total = losses.sum()
        scale = (images.vectors * others.images[first : first + count]).sum()
        known = [images.vectors, texts.vectors, scale * others.scale_learns]
        live = [vectors.images, vectors.texts, vectors.log_scale]
        metrics = {
            "image_to_text_accuracy": images.hits.sum(),
            "text_to_image_accuracy": texts.hits.sum(),
            "similarity_scale": others.scale * count,
        }
        if vectors.bias is not None:
            known.append(images.bias)
            live.append(vectors.bias)
            metrics["similarity_bias"] = others.bias * count
        documents = total.new_zeros(plain.segments.num).index_copy(0, plain.pairs[:, 1], losses)
        return ObjectiveOutput(_WithSlopes.apply(total, *known, *live), metrics, documents)

    @torch.no_grad()
    def _gather(self, own: Sequence[PairVectors]) -> tuple[AllPairs, int]:
        """All pairs of the step, and the number of this rank's first."""
        mine = torch.cat([torch.cat([each.images, each.texts], dim=1) for each in own])
        theirs = self._gather_rows(mine)
        first = sum(len(rows) for rows in theirs[: self._place.rank])
        images, texts = torch.cat(theirs).chunk(2, dim=1)
        log_scale, bias = own[0].log_scale.detach(), own[0].bias
        scale = log_scale.clamp(max=self._limit).exp()
        none = Norms(*(images.new_empty(0) for _ in Norms._fields))
        pairs = AllPairs(images, texts, scale, images.new_zeros(()) if bias is None else bias.detach(), none, none)
        if self._softmax:
            norms = [*self._norms(pairs, first, len(mine)), *self._norms(pairs.turned(), first, len(mine))]
            parts = torch.cat(self._gather_rows(torch.stack(norms, dim=1))).unbind(1)
            half = len(Norms._fields)
            pairs = replace(pairs, image_norms=Norms(*parts[:half]), text_norms=Norms(*parts[half:]))
        if float(log_scale) > self._limit:
            pairs = replace(pairs, scale_learns=self._falls(pairs, first, len(mine)))
        return pairs, first

    def _falls(self, pairs: AllPairs, first: int, count: int) -> bool:
        """Whether a smaller scale would lower the loss of the step."""
        slope = (self._slopes(pairs, first, count).vectors * pairs.images[first : first + count]).sum()
        return float(torch.cat(self._gather_rows(slope.view(1))).sum()) > 0

    @staticmethod
    def _norms(pairs: AllPairs, first: int, count: int) -> Norms:
        """Log-normalisers of this rank's images."""
        found = [pairs.images.new_empty(0, len(Norms._fields))]
        for rows in _stretches(first, count):
            logits = _logits(pairs, rows)
            own = torch.arange(rows.start, rows.stop, device=logits.device).unsqueeze(1)
            peak, place = logits.max(dim=1, keepdim=True)
            excess = (logits - peak).exp().scatter(1, place, 0.0).sum(dim=1, keepdim=True).log1p()
            found.append(torch.cat([peak, excess, (peak - logits.gather(1, own)) + excess], dim=1))
        return Norms(*torch.cat(found).unbind(1))

    def _slopes(self, pairs: AllPairs, first: int, count: int) -> _Slopes:
        """Of the images from number ``first`` on, over all texts."""
        vectors = [pairs.images[:0]]
        losses = [pairs.scale.new_empty(0)]
        hits = [pairs.scale.new_empty(0)]
        bias = pairs.scale.new_zeros(())
        for rows in _stretches(first, count):
            logits = _logits(pairs, rows)
            own = torch.arange(rows.start, rows.stop, device=logits.device)
            hits.append((logits.argmax(dim=1) == own).float())
            slopes, loss = (self._softmax_rows if self._softmax else self._sigmoid_rows)(logits, own, pairs, rows)
            vectors.append(pairs.scale * (slopes @ pairs.texts))
            losses.append(loss)
            bias += slopes.sum()
        return _Slopes(torch.cat(vectors), torch.cat(losses), torch.cat(hits), bias)

    @staticmethod
    def _softmax_rows(logits: Tensor, own: Tensor, pairs: AllPairs, rows: slice) -> tuple[Tensor, Tensor]:
        """Slopes of half the sum of both cross-entropies by the logits, and each image's cross-entropy."""
        images, texts = pairs.image_norms, pairs.text_norms
        of_images = ((logits - images.peaks[rows, None]) - images.excess[rows, None]).exp()
        of_texts = ((logits - texts.peaks) - texts.excess).exp()
        right = (torch.expm1(-images.losses[rows]) + torch.expm1(-texts.losses[rows])) / 2
        return ((of_images + of_texts) / 2).scatter(1, own[:, None], right[:, None]), images.losses[rows]

    @staticmethod
    def _sigmoid_rows(logits: Tensor, own: Tensor, pairs: AllPairs, rows: slice) -> tuple[Tensor, Tensor]:
        """Slopes of the sum of binary cross-entropies by the logits, and each image's part of it."""
        signs = torch.full_like(logits, -1.0).scatter_(1, own.unsqueeze(1), 1.0)
        return -signs * (-signs * logits).sigmoid(), F.softplus(-signs * logits).sum(dim=1)


def _logits(pairs: AllPairs, rows: slice) -> Tensor:
    """``(rows, N)``."""
    return pairs.scale * (pairs.images[rows] @ pairs.texts.T) + pairs.bias


def _stretches(first: int, count: int) -> Iterator[slice]:
    for start in range(first, first + count, _ROWS):
        yield slice(start, min(start + _ROWS, first + count))


class _WithSlopes(torch.autograd.Function):
    """A value whose slopes at some tensors are known: ``apply(value, *slopes, *tensors)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *slopes_and_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*slopes_and_tensors[: len(slopes_and_tensors) // 2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors
        return None, *(None for _ in slopes), *(gradient * slope for slope in slopes)
