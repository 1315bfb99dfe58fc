"""The graph of a loss: the module that DeepSpeed wraps, its blocks as units, and what autograd saves.

    LossGraph      model and objective in one forward pass
    recompute      a unit's activations are computed again in the backward pass
    gather_whole   ZeRO-3 gathers a unit in one message and reduces its gradients together
    SavedWeights   autograd saves which weight it needs, and not the gathered values

A unit is a block of the model. ZeRO-3 by itself gathers each linear layer and norm in hooks of its own: in the
quickstart 4,000 hooked calls and 0.4 s of Python a step. One gather per block is a third of the calls; ``ds_config.py``
has the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Undo = Callable[[], None]


class TeacherLike(Protocol):
    """A frozen module that an objective runs beside the model."""

    def units(self) -> Sequence[nn.Module]:
        """Blocks that ZeRO-3 should gather as one."""
        ...

    def flops(self, batch: Any) -> Any:
        """``model`` and ``hardware``: operations of its part in one microbatch."""
        ...


class ObjectiveLike(Protocol):
    """What the engine needs of an objective."""

    @property
    def teachers(self) -> Sequence[Any]:
        """Modules that are ``TeacherLike``; built with ``construct``, all parameters frozen."""
        ...

    def weight(self, batch: Any) -> float:
        """Weight of the microbatch, known on the host before the forward pass."""
        ...

    def __call__(self, model: Any, batch: Any) -> Any:
        """``loss_sum`` (scalar with graph), ``metrics`` (sums) and ``document_losses``, both without graph."""
        ...


@runtime_checkable
class SeesWholeStep(Protocol):
    """An objective whose loss of one microbatch depends on all others of the step."""

    def prepare(self, model: Any, microbatches: Sequence[Any]) -> Sequence[Any]:
        """Microbatches as the objective takes them, told what it must know of the others. All ranks must call.

        Args:
            model: In evaluation mode and without gradients; all ranks must make the same calls.
            microbatches: This rank's part of the step.
        """
        ...


class LossGraph(nn.Module):
    """Calls every sub-module of a training step inside one ``forward``.

    ZeRO-3 gathers and frees weights in hooks of module calls and learns their order from this module's forward; a head
    that were called outside of it would upset that order. Teachers are registered here and not with the model, so they
    are sharded and gathered with it and are no part of it.
    """

    def __init__(self, model: nn.Module, objective: ObjectiveLike) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.teachers = nn.ModuleList(objective.teachers)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss summed over the microbatch, its metric sums, and the losses of its documents."""
        output = self.objective(self.model, batch)
        metrics = {name: value.detach() for name, value in output.metrics.items()}
        return output.loss_sum, metrics, output.document_losses.detach()


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


class _View(NamedTuple):
    """A view of a parameter, without its values."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedWeights:
    """Hooks of one model that keep autograd from saving gathered weights.

    ZeRO-3 frees a gathered weight after its module's forward pass and gathers it again for the backward pass. But a
    linear layer saves ``weight.t()``, a view, and a view keeps the values of its storage alive. Without these hooks all
    blocks' weights would be whole at the end of the forward pass, however few stage 3 is told to leave alive.
    DeepSpeed's own answer (``memory_efficient_linear``) replaces ``torch.nn.functional.linear`` for the whole process.

    Make it after ZeRO-3 has put its own hooks on the model, so that weights are whole when these run.

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
