"""Lets autograd remember which weight it needs, and not the gathered values.

ZeRO-3 frees a gathered weight after its module's forward pass and gathers it again for the backward pass. But a linear
layer saves ``weight.t()``, a view, and a view keeps the values of its storage alive: without this module all blocks'
weights would be whole at the end of the forward pass, however few stage 3 is told to leave alive.

DeepSpeed's own answer (``memory_efficient_linear``) replaces ``torch.nn.functional.linear`` for the whole process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _View(NamedTuple):
    """A view of a parameter, without its values."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedWeights:
    """Hooks of one model; make it after ZeRO-3 has put its own on it, so that weights are whole when these run.

    Args:
        model: Sharded by ZeRO-3.
        units: Modules that are gathered as one.
    """

    def __init__(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        self._by_storage: dict[int, nn.Parameter] = {}
        inside = {id(module) for unit in units for module in unit.modules()}
        owners = [(unit, list(unit.parameters())) for unit in units]
        owners += [(m, list(m.parameters(recurse=False))) for m in model.modules() if id(m) not in inside]
        self._parameters = {module: parameters for module, parameters in owners if parameters}
        self._handles = [module.register_forward_pre_hook(self._remember) for module in self._parameters]

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook: record where the gathered weights of ``module`` are."""
        del inputs
        for parameter in self._parameters[module]:
            self._by_storage[parameter.untyped_storage().data_ptr()] = parameter

    def __call__(self) -> AbstractContextManager[Any]:
        """In its ``with`` block, of one forward pass, saved views of gathered weights do not keep them alive."""
        self._by_storage.clear()  # Weights seldom come back to the same address.
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, saved: Tensor) -> Tensor | _View:
        storage = saved.untyped_storage()
        parameter = self._by_storage.get(storage.data_ptr())
        if parameter is None:
            return saved
        # An address outlives its parameter's values, and one storage may serve several parameters.
        own = parameter.untyped_storage()
        if own.data_ptr() != storage.data_ptr() or own.nbytes() != parameter.nbytes:
            return saved
        if saved.dtype != parameter.dtype:
            return saved
        return _View(parameter, saved.size(), saved.stride(), int(saved.storage_offset()))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._by_storage.clear()


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.parameter.detach().as_strided(saved.size, saved.stride, saved.offset)
