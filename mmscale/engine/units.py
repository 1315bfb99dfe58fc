"""Blocks as units: gathered as one, recomputed as one.

ZeRO-3 left to itself gathers each linear layer and norm by hooks of its own: in the quickstart 4,000 hooked calls and
0.4 s of Python a step. One gather per block is a third of the calls; ``ds_config.py`` has the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Undo = Callable[[], None]


def recompute(units: list[nn.Module]) -> Undo:
    """Makes each unit forget its activations and compute them again in the backward pass; returns what undoes it."""
    for unit in units:
        # An instance attribute shadows the method; hooks of ``__call__``, which gather weights, run as before.
        # No unit draws from a generator (masks of dropout are computed from keys), so there is no state to keep.
        unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=False)

    def undo() -> None:
        for unit in units:
            del unit.forward

    return undo


def gather_whole(units: list[nn.Module]) -> Undo:
    """Tells ZeRO-3 to gather each unit in one message and to reduce its gradients together; returns what undoes it.

    DeepSpeed reduces a unit's gradients when the gradients of its *inputs* are there. A unit that learns behind frozen
    ones may have no input with a gradient, and would be reduced before its own gradients exist; so such an input is
    made to want one.
    """
    from deepspeed.utils import set_z3_leaf_module

    handles = []
    for unit in units:
        set_z3_leaf_module(unit, True)
        if any(parameter.requires_grad for parameter in unit.parameters()):
            handles.append(unit.register_forward_pre_hook(_want_input_gradient))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for unit in units:
            set_z3_leaf_module(unit, False)
            for parameter in unit.parameters():
                parameter.__dict__.pop("ds_z3_leaf_module", None)

    return undo


def _want_input_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    del module
    if not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*inputs[:index], value.detach().requires_grad_(), *inputs[index + 1 :])
    return None
