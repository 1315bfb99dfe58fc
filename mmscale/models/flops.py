"""Floating-point operations of a model: of a forward pass, of a training step, and of a patch relative to a token.

Only matrix products count, as in torch's ``FlopCounterMode``. Each module reports its own products and counts
(``mmscale/nn/flops.py``). This module determines which gradients the products need and adds up the operations.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from data_pipeline.batch import MultimodalBatch
from data_pipeline.media_spec import Placement
from mmscale.models.adapters import COMPONENT, adapter_products, component_of_layer
from mmscale.models.config import ModelConfig, TokenizerConfig
from mmscale.models.image_tokenizer_model import batch_flops, encoding_flops
from mmscale.models.image_tokens import COMPONENT as IMAGE_TOKENS
from mmscale.nn.adapters import adapted_layers
from mmscale.nn.flops import Product


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a forward and backward pass.

    Attributes:
        forward: Operations of the forward pass, with logits only for rows that carry loss.
        backward: Operations of the gradients that the trained components need.
        recomputed: Operations that activation checkpointing repeats, and those of a first forward pass without
            gradients. They count as hardware FLOPs, not model FLOPs.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        """Operations without recomputation: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """Operations with recomputation: the numerator of HFU."""
        return self.model + self.recomputed


def cost_per_patch(config: ModelConfig) -> float:
    """Return the estimated cost of one patch relative to one token: the ratio of forward operations.

    Counts only products whose operations per row do not grow with the length of a sequence. Leaves out the logits of
    extra tokens and the products of adapters, because adding either must not change which documents share a pack.
    Returns 0 for a text model.
    """
    if config.vision is None or config.connector is None:
        return 0.0
    crop = config.connector.typical_crop(config.vision)
    patch = {"patches": 1, "tower_rows": 1}
    per_patch = per_crop = 0
    for product in _base_products(config, frozenset(), frozenset()):
        per_patch += product.forward * patch.get(product.per, 0)
        per_crop += product.forward * crop.get(product.per, 0)
    return (per_patch + per_crop / crop["feature_patches"]) / _per_token(config)


def modality_cost(config: ModelConfig, name: str) -> float:
    """Return the estimated cost of one row of values of a modality besides images, relative to one token.

    Counts all products of tower and projector over a typical item, also those of attention within it.
    """
    modality = config.modalities[name]
    grid = modality.spec(1.0).typical_grid
    counts = modality.counts(name, [grid])
    products = modality.products(name, config.decoder.hidden_dim, (), ())
    return sum(each.forward * counts[each.per] for each in products) / math.prod(grid) / _per_token(config)


def _per_token(config: ModelConfig) -> int:
    """Return the forward operations of one token that do not grow with the length of the sequence."""
    counted = {"token_rows", "routed_rows", "logit_rows"}
    return sum(each.forward for each in _base_products(config, frozenset(), frozenset()) if each.per in counted)


def forward_flops(config: ModelConfig, batch: MultimodalBatch) -> int:
    """Return the operations of one forward pass over ``batch``, with logits for every token.

    A contrastive model computes no logits.
    """
    return _forward_flops(config, batch, batch.segments.total)


def _forward_flops(config: ModelConfig, batch: MultimodalBatch, logit_rows: int) -> int:
    counts = batch_counts(config, batch, logit_rows)
    return sum(product.forward * counts[product.per] for product in model_products(config, frozenset()))


def training_flops(
    config: ModelConfig | TokenizerConfig,
    batch: MultimodalBatch,
    trained: Collection[str],
    *,
    recompute: bool = False,
    forward_twice: bool = False,
) -> TrainingFlops:
    """Return the operations of a forward and backward pass over ``batch``, without those of the optimizer.

    Args:
        config: The model.
        batch: Should be on the host: the function reads ``loss_weights``.
        trained: Components that are trained.
        recompute: Whether activation checkpointing recomputes the model's ``checkpoint_units()``.
        forward_twice: Whether the objective first runs the model without gradients and without logits.
    """
    if isinstance(config, TokenizerConfig):
        images = batch_flops(config, batch, trained)
        return TrainingFlops(images.forward, images.backward, images.recomputed if recompute else 0)
    counts = learned_counts(config, batch)
    forward = backward = recomputed = 0
    for product in model_products(config, frozenset(trained)):
        count = counts[product.per]
        forward += count * product.forward
        backward += count * product.backward
        recomputed += count * product.recomputed
    first = _forward_flops(config, batch, 0) if forward_twice else 0
    return TrainingFlops(forward, backward, (recomputed if recompute else 0) + first)


def learned_counts(config: ModelConfig, batch: MultimodalBatch) -> dict[str, int]:
    """Return the counts of a training step: logits only of rows that carry loss, each from the head of its label.

    The images that the model encodes in the step count too, so pass the batch as the loader gives it.
    """
    learned = batch.loss_weights != 0
    drawn = learned & (batch.labels >= config.decoder.num_ids)  # Empty without separate image tokens.
    counts = batch_counts(config, batch, int((learned & ~drawn).count_nonzero()))
    counts |= {"image_logit_rows": int(drawn.count_nonzero()), "image_head_rows": batch.segments.total}
    return {**counts, "encoded_codes": 0 if batch.uncoded is None else len(batch.uncoded.slots)}


def batch_counts(config: ModelConfig, batch: MultimodalBatch, logit_rows: int) -> dict[str, int]:
    """Return the counts that the model's operations over ``batch`` are proportional to.

    ``logit_rows`` is the number of rows with logits of text. The head of separate image tokens is left out.
    """
    counts = {**config.decoder.counts(batch), "logit_rows": logit_rows, "new_logit_rows": logit_rows, "passes": 1}
    counts |= {"image_logit_rows": 0, "image_head_rows": 0, "encoded_codes": 0}
    for name, modality in config.modalities.items():
        counts |= modality.counts(name, batch.media[name].grids)
    if config.vision is not None and config.connector is not None:
        counts |= config.vision.counts(batch.media["image"]) | config.connector.counts(config.vision, batch)
    return counts


@lru_cache(maxsize=64)
def model_products(config: ModelConfig, trained: frozenset[str]) -> tuple[Product, ...]:
    """Return all products of a forward pass, with the gradients that the components ``trained`` need.

    Trained adapters count as if the backward pass reached the input of each component that has one. It ends at the
    first adapted layer, so up to one block's gradient of its input is counted too much.
    """
    if config.adapters is None:
        return _base_products(config, trained, trained)
    # A circular import: the model's modules import this one for their ``flops``.
    from mmscale.models.build import build_weights

    layers = adapted_layers(build_weights(config))
    learns = COMPONENT in trained
    adapted = set(map(component_of_layer, layers)) if learns else set()
    found = list(_base_products(config, trained, trained | adapted))
    for path, layer in layers.items():
        flows = component_of_layer(path) in trained | adapted
        found += adapter_products(path, layer, learns=learns, flows=flows)
    return tuple(found)


def _base_products(config: ModelConfig, trained: frozenset[str], reached: frozenset[str]) -> tuple[Product, ...]:
    """Return the products of the model without those of adapters.

    Args:
        config: The model.
        trained: Components whose weights are trained.
        reached: These, and the components that hold trained adapters.
    """

    def kept(component: str, products: Iterable[Product]) -> list[Product]:
        return [each if component in trained else each.with_frozen_weight() for each in products]

    decoder, connector = config.decoder, config.connector
    found = list[Product]()
    if config.image_tokenizer is not None:
        found.append(Product("encoded_codes", encoding_flops(config.image_tokenizer), 0, 0))
    if config.vision is not None and connector is not None:
        found += kept("vision", config.vision.products(learns="vision" in reached))
        found += kept("connector", connector.products(config.vision, decoder, reached))
        found += kept("video_connector", connector.video_products(config.vision, decoder, reached))
    for name, modality in config.modalities.items():
        found += modality.products(name, decoder.hidden_dim, trained, reached)
    learned_features = connector is not None and not {"vision", "connector", "video_connector"}.isdisjoint(reached)
    embeds = connector is not None and connector.placement in (Placement.EMBEDDING, Placement.HYBRID)
    # The backward pass reaches down to where trained values enter the decoder: at its input, or at the first
    # cross-attention block.
    flows = not {"decoder", "extra_tokens", IMAGE_TOKENS}.isdisjoint(reached) or (learned_features and embeds)
    flows = flows or any(name in reached or f"{name}_connector" in reached for name in config.modalities)
    cross_attention_blocks = [] if connector is None else connector.block_layers(decoder)
    for number, mlp in enumerate(decoder.block_mlps()):
        if connector is not None and number in cross_attention_blocks:
            found += kept("connector", connector.block_products(decoder, reached, flows))
            flows = flows or learned_features
        found += kept("decoder", decoder.block_products(mlp, learns="decoder" in reached, flows=flows))
    if config.predicts_tokens:
        learns, extra_learns = "decoder" in trained, "extra_tokens" in trained
        found += decoder.head_products(learns=learns, extra_learns=extra_learns, flows=flows)
        found += kept(IMAGE_TOKENS, decoder.image_products(learns=IMAGE_TOKENS in reached, flows=flows))
    return tuple(found)
