"""Contrastive losses over all pairs of a step on all ranks: match each image with its text.

    vectors of this rank's pairs --gathered, without gradient--> vectors of all N pairs
    this rank's rows of the N x N similarities --closed form--> loss and gradient of each own vector --> autograd

A step with several microbatches runs the model on them twice, first without gradients to compute the vectors of all
pairs. The loss therefore does not depend on how the pairs are divided among microbatches and ranks, and only one
microbatch's activations are in memory.

Source: CLIP (arXiv 2103.00020), figure 3; SigLIP (arXiv 2303.15343), algorithm 1; for the two runs GradCache (Gao et
al. 2021, arXiv 2101.06983), section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.models.connectors.contrastive import PairVectors
from mmscale.models.contrastive import ContrastiveModel
from mmscale.objectives.base import ObjectiveOutput, WorldInfo

_ROWS = 1024
"""Rows of the similarities that are in memory at a time."""


class LogNormalisers(NamedTuple):
    """``logsumexp`` of each row of logits as a sum of two parts, ``peak + excess``, and the row's loss.

    When a loss is near 0, the row's largest logit is that of the matching pair, and the loss equals the excess. The
    excess keeps its relative precision. A plain logsumexp is rounded relative to the logits, which reach ``max_scale``.

    Attributes:
        peaks: float32 ``(N,)``, the largest logit of each row.
        excess: float32 ``(N,)``, ``log(sum(exp(logits - peak)))`` of each row; at least 0.
        losses: float32 ``(N,)``, cross-entropy of each row. Stored, because logits that are computed again in other
            chunks may be rounded differently.
    """

    peaks: Tensor
    excess: Tensor
    losses: Tensor


@dataclass(frozen=True)
class StepPairs:
    """All N pairs of a step, without gradients.

    Attributes:
        images: float32 ``(N, C)``, vectors of the images.
        texts: float32 ``(N, C)``, vectors of the texts.
        scale: float32 ``()``, factor on similarities, clamped to ``max_scale``.
        bias: float32 ``()``, bias on similarities; 0 with ``loss=softmax``.
        image_norms: Normalisers of each image over all texts; empty with ``loss=sigmoid``.
        text_norms: Normalisers of each text over all images; empty with ``loss=sigmoid``.
        log_scale: float32 ``()``, logarithm of the factor before it is clamped.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor
    image_norms: LogNormalisers
    text_norms: LogNormalisers
    log_scale: Tensor

    def swapped(self) -> StepPairs:
        """Return the pairs with images and texts exchanged."""
        return replace(
            self,
            images=self.texts,
            texts=self.images,
            image_norms=self.text_norms,
            text_norms=self.image_norms,
        )


class RowGradients(NamedTuple):
    """Losses and gradients of n images over all texts.

    Attributes:
        vectors: ``(n, C)``, gradient of the step's loss with respect to the vectors of the images.
        losses: ``(n,)``, loss of each image.
        correct: ``(n,)``, 1 if the image's own text has its largest logit, else 0.
        bias: ``()``, share of these images in the gradient with respect to the bias.
    """

    vectors: Tensor
    losses: Tensor
    correct: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PreparedBatch:
    """A microbatch, and what its loss needs of all pairs of the step.

    Attributes:
        batch: The microbatch.
        pairs: All pairs of the step, those of this microbatch included.
        first: Index in ``pairs`` of the microbatch's first pair.
        images: Losses and gradients of the microbatch's images.
        scale_learns: bool ``()``, whether the scale receives its gradient.
    """

    batch: MultimodalBatch
    pairs: StepPairs
    first: int
    images: RowGradients
    scale_learns: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreparedBatch:
        """Return a copy with the microbatch on ``device``. The pairs stay on the device of the model."""
        return replace(self, batch=self.batch.to(device, non_blocking))


class Contrastive:
    """Loss of each pair of a step: the mean of the losses of its image and of its text.

    ``softmax``: the loss of an image is its cross-entropy over all texts of the step. ``sigmoid``: the loss of an image
    is the sum of its binary cross-entropies with all texts. The loss of a text is the same over all images.

    Args:
        config: Kind of loss and limit of the scale.
        world: The ranks that share a step.
    """

    teachers = ()

    def __init__(self, config: ContrastiveConnectorConfig, world: WorldInfo) -> None:
        self._softmax = config.loss == "softmax"
        self._limit = math.log(config.max_scale)
        self._world = world

    def weight(self, batch: MultimodalBatch) -> float:
        """Return the number of pairs: the divisor of ``loss_sum``. Does not run the model."""
        return float(len(batch.pairs))

    def needs_prepare(self, model: ContrastiveModel, num_microbatches: int) -> bool:
        """Return whether ``prepare`` changes the microbatches: if there are several."""
        del model
        return num_microbatches > 1

    def prepare_runs(self, model: ContrastiveModel, num_microbatches: int) -> bool:
        """Return whether ``prepare`` runs the model: if there are several microbatches."""
        return self.needs_prepare(model, num_microbatches)

    def prepare(
        self, model: ContrastiveModel, microbatches: Sequence[MultimodalBatch]
    ) -> Sequence[MultimodalBatch | PreparedBatch]:
        """Return the microbatches of a step in the form that ``__call__`` needs.

        With several microbatches, runs the model on each and adds the vectors of all pairs of the step. A single
        microbatch is returned unchanged. All ranks must call, with gradients disabled and with the same number of
        microbatches.
        """
        if not self.needs_prepare(model, len(microbatches)):
            return microbatches
        own = [model(batch.to(self._world.device, non_blocking=True)) for batch in microbatches]
        return self._prepared(microbatches, own)

    def _prepared(self, microbatches: Sequence[MultimodalBatch], own: Sequence[PairVectors]) -> list[PreparedBatch]:
        """Return the microbatches of this rank, whose vectors are ``own``, with all pairs. All ranks must call."""
        pairs, first = self._gather(own)
        counts = [len(vectors.images) for vectors in own]
        starts = list(itertools.accumulate(counts[:-1], initial=first))
        images = [self._row_gradients(pairs, start, count) for start, count in zip(starts, counts, strict=True)]
        parts = list(zip(microbatches, starts, images, strict=True))
        gradient = torch.stack([self._scale_gradient(rows, pairs, start) for _, start, rows in parts]).sum()
        learns = self._scale_learns(pairs, gradient)
        return [PreparedBatch(batch, pairs, start, rows, learns) for batch, start, rows in parts]

    def __call__(self, model: ContrastiveModel, batch: MultimodalBatch | PreparedBatch) -> ObjectiveOutput:
        """Run the model on one microbatch and return the loss. All ranks must call."""
        plain = batch.batch if isinstance(batch, PreparedBatch) else batch
        vectors = model(plain)
        prepared = batch if isinstance(batch, PreparedBatch) else self._prepared([batch], [vectors])[0]
        pairs, images, count = prepared.pairs, prepared.images, len(vectors.images)
        texts = self._row_gradients(pairs.swapped(), prepared.first, count)
        losses = (images.losses + texts.losses) / 2
        total = losses.sum()
        scale = self._scale_gradient(images, pairs, prepared.first)
        gradients = [images.vectors, texts.vectors, scale * prepared.scale_learns]
        inputs = [vectors.images, vectors.texts, vectors.log_scale]
        metrics = {
            "image_to_text_accuracy": images.correct.sum(),
            "text_to_image_accuracy": texts.correct.sum(),
            "similarity_scale": pairs.scale * count,
        }
        if vectors.bias is not None:
            gradients.append(images.bias)
            inputs.append(vectors.bias)
            metrics["similarity_bias"] = pairs.bias * count
        documents = total.new_zeros(plain.segments.num).index_copy(0, plain.pairs[:, 1], losses)
        return ObjectiveOutput(_WithGradients.apply(total, *gradients, *inputs), metrics, documents)

    @torch.no_grad()
    def _gather(self, own: Sequence[PairVectors]) -> tuple[StepPairs, int]:
        """Return all pairs of the step, and the index of this rank's first pair. All ranks must call."""
        mine = torch.cat([torch.cat([each.images, each.texts], dim=1) for each in own])
        by_rank = self._world.gather_rows(mine)
        first = sum(len(rows) for rows in by_rank[: self._world.rank])
        images, texts = torch.cat(by_rank).chunk(2, dim=1)
        log_scale, bias = own[0].log_scale.detach(), own[0].bias
        scale = log_scale.clamp(max=self._limit).exp()
        empty = LogNormalisers(*(images.new_empty(0) for _ in LogNormalisers._fields))
        bias = images.new_zeros(()) if bias is None else bias.detach()
        pairs = StepPairs(images, texts, scale, bias, empty, empty, log_scale)
        if self._softmax:
            norms = [*self._normalisers(pairs, first, len(mine)), *self._normalisers(pairs.swapped(), first, len(mine))]
            parts = torch.cat(self._world.gather_rows(torch.stack(norms, dim=1))).unbind(1)
            half = len(LogNormalisers._fields)
            pairs = replace(pairs, image_norms=LogNormalisers(*parts[:half]), text_norms=LogNormalisers(*parts[half:]))
        return pairs, first

    @staticmethod
    def _scale_gradient(rows: RowGradients, pairs: StepPairs, first: int) -> Tensor:
        """Return the part of the images in the gradient of the loss with respect to the logarithm of the scale."""
        return (rows.vectors * pairs.images[first : first + len(rows.vectors)]).sum()

    @torch.no_grad()
    def _scale_learns(self, pairs: StepPairs, gradient: Tensor) -> Tensor:
        """Return whether the scale is not above its limit, or the step lowers it. All ranks must call.

        The answer stays on the device: the host would have to wait for it.

        Args:
            pairs: All pairs of the step.
            gradient: Of all pairs of this rank.
        """
        whole = torch.cat(self._world.gather_rows(gradient.view(1))).sum()
        return (pairs.log_scale.double() <= self._limit) | (whole > 0)  # The limit is no float32.

    @staticmethod
    def _normalisers(pairs: StepPairs, first: int, count: int) -> LogNormalisers:
        """Return the normalisers of this rank's images over all texts."""
        found = [pairs.images.new_empty(0, len(LogNormalisers._fields))]
        for rows in _chunks(first, count):
            logits = _logits(pairs, rows)
            own = torch.arange(rows.start, rows.stop, device=logits.device).unsqueeze(1)
            peak, peak_index = logits.max(dim=1, keepdim=True)
            excess = (logits - peak).exp().scatter(1, peak_index, 0.0).sum(dim=1, keepdim=True).log1p()
            found.append(torch.cat([peak, excess, (peak - logits.gather(1, own)) + excess], dim=1))
        return LogNormalisers(*torch.cat(found).unbind(1))

    @torch.no_grad()
    def _row_gradients(self, pairs: StepPairs, first: int, count: int) -> RowGradients:
        """Return losses and gradients of the ``count`` images from index ``first`` on, over all texts."""
        vectors = [pairs.images[:0]]
        losses = [pairs.scale.new_empty(0)]
        correct = [pairs.scale.new_empty(0)]
        bias = pairs.scale.new_zeros(())
        for rows in _chunks(first, count):
            logits = _logits(pairs, rows)
            own = torch.arange(rows.start, rows.stop, device=logits.device)
            correct.append((logits.argmax(dim=1) == own).float())
            gradients, loss = (self._softmax_rows if self._softmax else self._sigmoid_rows)(logits, own, pairs, rows)
            vectors.append(pairs.scale * (gradients @ pairs.texts))
            losses.append(loss)
            bias += gradients.sum()
        return RowGradients(torch.cat(vectors), torch.cat(losses), torch.cat(correct), bias)

    @staticmethod
    def _softmax_rows(logits: Tensor, own: Tensor, pairs: StepPairs, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the gradient of the mean of both cross-entropies with respect to the logits, and each image's loss."""
        images, texts = pairs.image_norms, pairs.text_norms
        over_texts = ((logits - images.peaks[rows, None]) - images.excess[rows, None]).exp()
        over_images = ((logits - texts.peaks) - texts.excess).exp()
        # The matching pair's probability minus 1. Computed from the losses, it is precise even near probability 1.
        own_gradient = (torch.expm1(-images.losses[rows]) + torch.expm1(-texts.losses[rows])) / 2
        gradients = ((over_texts + over_images) / 2).scatter(1, own[:, None], own_gradient[:, None])
        return gradients, images.losses[rows]

    @staticmethod
    def _sigmoid_rows(logits: Tensor, own: Tensor, pairs: StepPairs, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the gradient of the summed binary cross-entropies with respect to the logits, and each image's sum."""
        signs = torch.full_like(logits, -1.0).scatter_(1, own.unsqueeze(1), 1.0)
        return -signs * (-signs * logits).sigmoid(), F.softplus(-signs * logits).sum(dim=1)


def _logits(pairs: StepPairs, rows: slice) -> Tensor:
    """Return scaled similarities of the images ``rows`` and all texts, ``(rows, N)``."""
    return pairs.scale * (pairs.images[rows] @ pairs.texts.T) + pairs.bias


def _chunks(first: int, count: int) -> Iterator[slice]:
    for start in range(first, first + count, _ROWS):
        yield slice(start, min(start + _ROWS, first + count))


class _WithGradients(torch.autograd.Function):
    """Returns ``value`` with given gradients with respect to tensors: ``apply(value, *gradients, *tensors)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *gradients_and_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_tensors[: len(gradients_and_tensors) // 2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, value_grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, *(None for _ in gradients), *(value_grad * gradient for gradient in gradients)
