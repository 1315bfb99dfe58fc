"""Operations of matrix products, as each part of a model states them for itself; ``models/flops.py`` adds them up.

A multiply-add counts as two operations. A part states its operations per unit of a named *count* of the batch, such as
``tokens`` or ``tower_pairs``, so the sum over a batch is a dot product of a few integers.

A product of the forward pass costs as much again for the gradient of its weights, and once more for the gradient of its
inputs, each only where it is wanted. A frozen tower has neither; a frozen decoder behind a trained connector has the
second.

Source: Kaplan et al. 2020 (arXiv 2001.08361), table 1; PaLM (arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """Operations of a part's forward pass.

    Attributes:
        per: Name of the count of the batch that they are proportional to.
        flops: Operations per unit of that count.
        attends: Whether they are scores and mixing of an attention rather than products with a weight.
    """

    per: str
    flops: int
    attends: bool = False


class Product(NamedTuple):
    """Operations of forward and backward per unit of the count ``per``.

    Attributes:
        per: Name of a count of the batch.
        forward: Of the forward pass.
        backward: Of the gradients that are wanted.
        recomputed: Operations that activation checkpointing computes a second time.
    """

    per: str
    forward: int
    backward: int
    recomputed: int


def linear(per: str, flops: int, *, weights: bool, inputs: bool, again: int = 0) -> Product:
    """A product with a weight.

    Args:
        per: Name of a count of the batch.
        flops: Forward operations per unit of it.
        weights: Whether the weight learns.
        inputs: Whether a gradient of the inputs is wanted.
        again: What activation checkpointing computes again if there is a backward pass. Recomputation stops at the last
            value that the backward pass needs, so the last product of a block is often left out.
    """
    backward = flops * (weights + inputs)
    return Product(per, flops, backward, again if backward else 0)


def attention_of(per: str, flops: int, *, gradients: int, again: int = 0) -> Product:
    """Scores and mixing, two products of equal size.

    Args:
        per: Name of a count of pairs of a query and a key.
        flops: Forward operations per unit of it.
        gradients: How many of the four factors want a gradient: queries, keys, probabilities, values.
        again: As for ``linear``.
    """
    backward = flops * gradients // 2
    return Product(per, flops, backward, again if backward else 0)
