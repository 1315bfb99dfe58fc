"""Preference optimisation: make the chosen answer of each pair more likely than the rejected one.

    pair = one document:  prompt | chosen answer | rejected answer      two branches that do not attend each other

    reference --log-probabilities of the answers-------------+      or stored in the shards (batch.reference)
    model     --hidden rows --head without gradient----------+--> loss of each pair, gradient of each log-probability
                            --head, rows weighted by those gradients--> gradients of the model

The loss of a pair is a function of two sums of log-probabilities, so its gradient is the same for all tokens of an
answer. The head computes a weighted cross-entropy chunk by chunk; its weights are these gradients. So the logits of all
tokens are never in memory. No term joins two pairs, so the loss of a step does not depend on how its pairs are divided
among packs, microbatches and ranks.

Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Azar et al. 2023 (arXiv 2310.12036), equation 17, for IPO.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch, Segments
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.host import to_device
from mmscale.nn.moe import MoeConfig
from mmscale.objectives.base import ObjectiveOutput, WorldInfo
from mmscale.objectives.next_token import NextToken
from mmscale.objectives.router import PreparedBatch, StepTotals
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import PreferenceConfig

_LEAST_LENGTH = 1e-6
"""Smallest divisor of an answer without a learned token, whose log-probability is 0."""


class PairPlaces(NamedTuple):
    """Positions of the K pairs of a batch: indices of attention segments (``branched.queries``), and of documents."""

    chosen: list[int]
    rejected: list[int]
    documents: list[int]


def pair_places(batch: MultimodalBatch) -> PairPlaces:
    """Return the documents with exactly two branches, the chosen and the rejected answer. Runs on the host.

    Documents without branches, such as dummy documents, are no pairs.
    """
    places = PairPlaces([], [], [])
    if batch.branched is not None:
        segments = batch.branched.queries.bounds
        for number, (start, stop) in enumerate(itertools.pairwise(batch.segments.bounds)):
            first, last = bisect.bisect_left(segments, start), bisect.bisect_left(segments, stop)
            if last - first == 3:
                places.chosen.append(first + 1)
                places.rejected.append(first + 2)
                places.documents.append(number)
    return places


class Preference(NextToken):
    """Mean over the pairs of a step of the loss that ``PreferenceConfig`` describes, plus the losses of routers.

    The log-probability of an answer is the sum over its learned tokens, each times its loss weight.

    Args:
        config: The loss.
        teachers: The frozen reference, of which only the predictions are used. Empty for a loss without a reference,
            and if the batches hold the reference's log-probabilities.
        world: The ranks that share a step; see ``NextToken``.
    """

    def __init__(
        self, config: PreferenceConfig, teachers: Sequence[Teacher] = (), world: WorldInfo | None = None
    ) -> None:
        super().__init__(0.0, teachers, world)
        self.config = config

    def weight(self, batch: MultimodalBatch) -> float:
        """Return the number of pairs: the divisor of ``loss_sum``. Does not run the model."""
        return float(len(pair_places(batch).documents))

    def prepare(
        self, model: MultimodalModel, microbatches: Sequence[MultimodalBatch]
    ) -> Sequence[MultimodalBatch | PreparedBatch]:
        """Return the microbatches of a step in the form that ``__call__`` needs; see ``RouterLosses.prepare``."""
        return super().prepare(model, [self._weighted(batch) for batch in microbatches])

    def _weighted(self, batch: MultimodalBatch) -> MultimodalBatch:
        """Return the batch with the number of pairs as its weight, which the losses of routers are scaled by."""
        return replace(batch, weight=self.weight(batch))

    def _loss(self, model: MultimodalModel, batch: MultimodalBatch, totals: StepTotals | None) -> ObjectiveOutput:
        # Run the reference first: its activations are freed before the model's are stored for its backward pass.
        references = [answer_log_probs(teacher.model, teacher(batch), batch) for teacher in self.teachers]
        references += [] if batch.reference is None else [batch.reference]
        output = model(batch)
        with torch.no_grad():
            own = answer_log_probs(model, output.hidden.detach(), batch)
        places = pair_places(batch)
        answers = to_device(torch.tensor([places.chosen, places.rejected], dtype=torch.int64), own.device)  # (2, K)
        lengths = _segment_sums(batch.loss_weights, batch)[answers].clamp(min=_LEAST_LENGTH)
        reference = sum((each[answers] for each in references), torch.zeros_like(lengths))
        losses, gradients, metrics = self._pair_losses(own[answers], reference, lengths)
        # Each token's cross-entropy has the gradient of its answer's log-probability, negated, as its weight.
        by_segment = torch.zeros_like(own).index_copy(0, answers.flatten(), -gradients.flatten())
        rows = by_segment.repeat_interleave(_segments(batch).cu.long().diff(), output_size=len(batch.loss_weights))
        # 0 * NaN is NaN: a loss that is not finite must not give weight to rows without a label.
        rows = torch.where(batch.loss_weights == 0, 0.0, rows * batch.loss_weights)
        surrogate = model.head(output.hidden, batch.labels, rows, learned=batch.learned)
        loss = surrogate - surrogate.detach() + losses.sum()  # The value is the loss, the gradient that of the head.
        mlp = model.config.decoder.mlp
        if output.router is not None and isinstance(mlp, MoeConfig):
            router_loss, router_metrics = self._router.losses(mlp, output.router, self._weighted(batch), totals)
            loss = loss + router_loss
            metrics |= router_metrics
        documents = to_device(torch.tensor(places.documents, dtype=torch.int64), own.device)
        by_document = losses.new_zeros(batch.segments.num).index_copy(0, documents, losses)
        return ObjectiveOutput(loss, metrics, by_document, output.router)

    def _pair_losses(self, own: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of each pair, its gradient with respect to ``own``, and sums for the metrics.

        Args:
            own: Log-probabilities of the model, float32 ``(2, K)``: chosen answers, then rejected ones.
            reference: The same of the reference; zeros without one.
            lengths: Sum of the loss weights of each answer, ``(2, K)``.
        """
        config = self.config
        with torch.enable_grad():
            own = own.detach().requires_grad_()
            ratios = own - reference
            if config.length_normalised:
                ratios = ratios / lengths
            margins = config.beta * (ratios[0] - ratios[1])
            if config.loss == "ipo":
                losses = (ratios[0] - ratios[1] - 1 / (2 * config.beta)).square()
            else:
                smoothing = config.label_smoothing
                losses = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
            metrics = {"preference": losses.sum()}
            if config.next_token:
                entropies = -own[0] / lengths[0]
                losses = losses + config.next_token * entropies
                metrics["next_token"] = entropies.sum()
            (gradients,) = torch.autograd.grad(losses.sum(), own)
        chosen, rejected = config.beta * ratios.detach()
        per_token = (own.detach() / lengths).sum(1)
        metrics |= {
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
            "reward_margin": margins.sum(),
            "reward_accuracy": (chosen > rejected).float().sum(),
            "log_prob_chosen": per_token[0],
            "log_prob_rejected": per_token[1],
        }
        return losses.detach(), gradients, {name: value.detach() for name, value in metrics.items()}


def _segments(batch: MultimodalBatch) -> Segments:
    return batch.segments if batch.branched is None else batch.branched.queries


def _segment_sums(rows: Tensor, batch: MultimodalBatch) -> Tensor:
    """Return the sum of each attention segment's rows, in float32 and in a fixed order."""
    return torch.segment_reduce(rows, "sum", offsets=_segments(batch).cu.long())


@torch.no_grad()
def answer_log_probs(model: MultimodalModel, hidden: Tensor, batch: MultimodalBatch) -> Tensor:
    """Return the log-probability of the learned tokens of each attention segment, float32.

    Each token counts with its loss weight. ``hidden`` are the rows before the head, ``(T, D)``.
    """
    rows = torch.zeros_like(batch.loss_weights)
    model.head(hidden, batch.labels, batch.loss_weights, row_losses=rows, learned=batch.learned)
    return -_segment_sums(rows, batch)
