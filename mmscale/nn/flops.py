"""Floating-point operations of matrix products. Each module reports its own; ``models/flops.py`` adds them up.

A multiply-add counts as two operations. A module reports its operations per unit of a named *count* of the batch, such
as ``token_rows`` or ``tower_pairs``. The operations of a batch are therefore a dot product of a few integers.

The gradient of a product's weights costs as much as its forward pass, and so does the gradient of its inputs. Each is
counted only if it is computed. A frozen tower computes neither; a frozen decoder after a trained connector computes
the second.

Source: Kaplan et al. 2020 (arXiv 2001.08361), table 1; PaLM (arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """Forward operations of one part of a projector.

    Attributes:
        per: Name of the count that the operations are proportional to.
        flops: Operations per unit of that count.
        attends: True for the two products of attention (scores, and mixing of values); False for a product with a
            weight.
        learned_queries: Whether a product reads learned queries instead of features, or, in attention, its queries
            come from them. They need a gradient only if the connector is trained.
    """

    per: str
    flops: int
    attends: bool = False
    learned_queries: bool = False


class Product(NamedTuple):
    """Forward and backward operations per unit of the count ``per``.

    Attributes:
        per: Name of a count of the batch.
        forward: Operations of the forward pass.
        backward: Operations of the gradients that are computed.
        recomputed: Operations that activation checkpointing repeats.
        weight_gradient: The part of ``backward`` that is the gradient of the product's weight.
    """

    per: str
    forward: int
    backward: int
    recomputed: int
    weight_gradient: int = 0

    def with_frozen_weight(self) -> Product:
        """Return the product without the gradient of its weight, and with all other operations."""
        return self._replace(backward=self.backward - self.weight_gradient, weight_gradient=0)


def linear_product(per: str, flops: int, *, weights: bool, inputs: bool, again: int = 0) -> Product:
    """Return the operations of a product with a weight.

    Args:
        per: Name of a count of the batch.
        flops: Forward operations per unit of ``per``.
        weights: Whether the weight is trained.
        inputs: Whether the backward pass computes the gradient of the inputs.
        again: Operations that activation checkpointing repeats if there is a backward pass. Recomputation stops at the
            last value that the backward pass needs, so it often skips a block's last product.
    """
    backward = flops * (weights + inputs)
    return Product(per, flops, backward, again if backward else 0, flops * weights)


def attention_product(per: str, flops: int, *, gradients: int, again: int = 0) -> Product:
    """Return the operations of attention's two equally large products: scores, and mixing of values.

    Args:
        per: Name of a count of query-key pairs.
        flops: Forward operations of both products per pair.
        gradients: Number of the four factors (queries, keys, probabilities, values) that need a gradient.
        again: As for ``linear_product``.
    """
    backward = flops * gradients // 2
    return Product(per, flops, backward, again if backward else 0)
