"""Floating-point operations of a model: of a forward, of a training step, and of a patch relative to a token.

Matrix products alone count, as in torch's ``FlopCounterMode``. Each part states its own products and counts
(``mmscale/nn/flops.py``); this module joins them along the path of the gradient and adds them up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from data_pipeline.batch import MultimodalBatch
from data_pipeline.media_spec import Placement
from mmscale.models.config import ModelConfig
from mmscale.nn.flops import Product


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a forward and backward.

    Attributes:
        forward: Of the forward pass; logits only for rows that carry loss.
        backward: Of the gradients that the trained components want.
        recomputed: Done a second time by activation checkpointing. They advance nothing, so they are no model's.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        """What the model needs, however it is computed: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What is really computed."""
        return self.model + self.recomputed


def cost_per_patch(config: ModelConfig) -> float:
    """Time of one patch relative to one token, from the products that do not grow with length.

    Logits of new tokens are left out: a few new tokens must not change which documents share a pack.
    """
    if config.vision is None or config.connector is None:
        return 0.0
    view = config.connector.typical_view(config.vision)
    token, patch, of_view = {"token_rows": 1, "logit_rows": 1}, {"patches": 1, "tower_rows": 1}, 0
    per_token = per_patch = 0
    for product in model_products(config, frozenset()):
        per_token += product.forward * token.get(product.per, 0)
        per_patch += product.forward * patch.get(product.per, 0)
        of_view += product.forward * view.get(product.per, 0)
    return (per_patch + of_view / view["feature_patches"]) / per_token


def forward_flops(config: ModelConfig, batch: MultimodalBatch) -> int:
    """Operations of one forward over ``batch`` with logits for every token; of a contrastive model without any."""
    counts = batch_counts(config, batch, batch.segments.total)
    return sum(product.forward * counts[product.per] for product in model_products(config, frozenset()))


def training_flops(
    config: ModelConfig, batch: MultimodalBatch, trained: Collection[str], *, recompute: bool = False
) -> TrainingFlops:
    """Operations of one training step over ``batch``; the optimizer has no products worth counting.

    Args:
        config: The model.
        batch: On the host: which rows carry loss is looked up.
        trained: Components that learn.
        recompute: Whether ``checkpoint_units()`` are computed again in the backward pass.
    """
    counts = batch_counts(config, batch, int(batch.loss_weights.count_nonzero()))
    forward = backward = recomputed = 0
    for product in model_products(config, frozenset(trained)):
        count = counts[product.per]
        forward += count * product.forward
        backward += count * product.backward
        recomputed += count * product.recomputed
    return TrainingFlops(forward, backward, recomputed if recompute else 0)


def batch_counts(config: ModelConfig, batch: MultimodalBatch, logit_rows: int) -> dict[str, int]:
    """What the operations of the model over ``batch`` are proportional to, with logits of ``logit_rows`` rows."""
    counts = {**config.decoder.counts(batch), "logit_rows": logit_rows, "new_logit_rows": logit_rows}
    if config.vision is not None and config.connector is not None:
        counts |= config.vision.counts(batch.media["image"]) | config.connector.counts(config.vision, batch)
    return counts


@lru_cache(maxsize=64)
def model_products(config: ModelConfig, trained: frozenset[str]) -> tuple[Product, ...]:
    """Everything that a forward multiplies, with the gradients that the components ``trained`` need."""
    decoder, connector = config.decoder, config.connector
    found = list[Product]()
    if config.vision is not None and connector is not None:
        found += config.vision.products(learns="vision" in trained)
        found += connector.products(config.vision, decoder, trained)
    learned_features = connector is not None and not {"vision", "connector"}.isdisjoint(trained)
    embeds = connector is not None and connector.placement in (Placement.EMBEDDING, Placement.HYBRID)
    # A gradient flows through the decoder from where learned values enter it: its input, or where it first attends.
    flows = not {"decoder", "extra_tokens"}.isdisjoint(trained) or (learned_features and embeds)
    attends = [] if connector is None else connector.block_layers(decoder)
    for number, mlp in enumerate(decoder.block_mlps()):
        if connector is not None and number in attends:
            found += connector.block_products(decoder, trained, flows)
            flows = flows or learned_features
        found += decoder.block_products(mlp, learns="decoder" in trained, flows=flows)
    if config.predicts_tokens:
        found += decoder.head_products(learns="decoder" in trained, extra_learns="extra_tokens" in trained, flows=flows)
    return tuple(found)
