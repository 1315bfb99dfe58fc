"""The module that DeepSpeed wraps, its units, and the memory of gathered weights and reduced gradients.

    LossGraph      model and objective in one forward pass.
    recompute      recompute a unit's activations in the backward pass.
    gather_whole   let ZeRO-3 gather a unit in one call and reduce its gradients together.
    SavedWeights   let autograd save a reference to a weight instead of its gathered values.
    read_gradients_in_place   let ZeRO-3's optimizer read gradients without a copy.

A unit is a block of the model. By default ZeRO-3 gathers each linear layer and each norm in its own hooks: 4,000 hooked
calls and 0.4 s of Python a step in the quickstart. One gather per block takes a third of the calls. ``ds_config.py``
has the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Undo = Callable[[], None]
_OWN_WEIGHT = "/weight"
"""Ends the name of the sum that a metric is divided by instead of the weight of the step."""


class TeacherLike(Protocol):
    """A frozen module that an objective runs in addition to the model."""

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks that ZeRO-3 should gather in one message each."""
        ...

    def flops(self, batch: Any) -> Any:
        """Return the operations of one microbatch as ``forward``, ``backward`` and ``recomputed``."""
        ...


class ObjectiveLike(Protocol):
    """The interface of an objective."""

    @property
    def teachers(self) -> Sequence[Any]:
        """``TeacherLike`` modules, built with ``construct``, all parameters frozen."""
        ...

    def weight(self, batch: Any) -> float:
        """Return the loss weight of the microbatch. Called on the host before the forward pass."""
        ...

    def __call__(self, model: Any, batch: Any) -> Any:
        """Return ``loss_sum`` (a scalar with its graph), ``metrics`` (sums), ``document_losses`` and ``router``.

        Also ``parts``, which are metrics with a weight of their own: pairs of sum and weight.
        """
        ...


@runtime_checkable
class WholeStepObjective(Protocol):
    """An objective whose loss of one microbatch may depend on all others of the step."""

    def needs_prepare(self, model: Any, num_microbatches: int) -> bool:
        """Return whether a step with this number of microbatches a rank must go through ``prepare``."""
        ...

    def prepare_runs(self, model: Any, num_microbatches: int) -> bool:
        """Return whether ``prepare`` runs the model on each microbatch of such a step."""
        ...

    def prepare(self, model: Any, microbatches: Sequence[Any]) -> Sequence[Any]:
        """Return the microbatches with the information about the whole step that the objective needs.

        All ranks must call.

        Args:
            model: In training mode. Gradients are disabled. All ranks must make the same calls.
            microbatches: This rank's part of the step.
        """
        ...


@runtime_checkable
class UpdatingObjective(Protocol):
    """An objective that changes rows of a parameter by a rule of its own, after the optimizer's step."""

    def after_step(self, model: Any, statistics: Sequence[Tensor], *, applied: bool) -> Any:
        """Return ``metrics`` of the whole step, and the rows to write: ``parameter``, ``values`` and ``chosen``.

        Args:
            model: Its buffers may be changed, equally on all ranks. Its parameters may be sharded.
            statistics: float64, the sums of ``ObjectiveOutput.statistics`` over all microbatches and ranks.
            applied: Whether the optimizer changed weights. If not, the objective must change nothing.
        """
        ...


@runtime_checkable
class EncodingModel(Protocol):
    """A model with frozen encoders that replace raw inputs of a microbatch by their codes, once in each step."""

    def encoders(self) -> Sequence[nn.Module]:
        """Return the frozen modules that ZeRO-3 should gather in one message each."""
        ...

    def with_codes(self, batch: Any, device: torch.device | None = None) -> Any:
        """Return the microbatch with codes. All ranks must make equally many calls."""
        ...


class RouterSums(NamedTuple):
    """Statistics of the routers: sums over tokens, of a microbatch or of a whole step.

    Attributes:
        load: int64 ``(L, K, E)``, number of times that tokens of each kind (text, image, further modalities) chose each
            expert of each block.
        entropy: float32 ``(L, K)``, sum over the tokens of the entropy of the router's probabilities, in nats.
        dropped: int64 ``(L,)``, number of choices that no expert computed because of ``capacity_factor``.
    """

    load: Tensor
    entropy: Tensor
    dropped: Tensor


class LossGraph(nn.Module):
    """Call every sub-module of a training step inside one ``forward``.

    ZeRO-3 gathers and frees weights in hooks of module calls, and records their order in this module's forward. A head
    called outside of it would break that order. Teachers are registered here and not in the model. So ZeRO-3 shards and
    gathers them, and the model's parameters do not include them.
    """

    def __init__(self, model: nn.Module, objective: ObjectiveLike) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.teachers = nn.ModuleList(objective.teachers)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, RouterSums | None, tuple[Tensor, ...]]:
        """Return the loss sum of the microbatch, metric sums, losses of its documents, router sums, and statistics."""
        output = self.objective(self.model, batch)
        metrics = {name: value.detach() for name, value in output.metrics.items()}
        for name, (part, weight) in output.parts.items():
            metrics |= {name: part.detach(), name + _OWN_WEIGHT: weight.detach()}
        found = output.router
        router = None if found is None else RouterSums(found.load, found.entropy, found.dropped)
        return output.loss_sum, metrics, output.document_losses.detach(), router, output.statistics


def weighted_means(sums: Mapping[str, float], weight: float) -> dict[str, float]:
    """Return the means of the loss and of the metrics of a step. A metric whose own weight is 0 is left out.

    Args:
        sums: Sums over the step of what ``LossGraph`` returns.
        weight: Weight of the step.
    """
    weights = {name: sums.get(name + _OWN_WEIGHT, weight) for name in sums if not name.endswith(_OWN_WEIGHT)}
    return {name: sums[name] / own for name, own in weights.items() if own}


def encoders(model: nn.Module) -> Sequence[nn.Module]:
    """Return the frozen encoders of a model, which ZeRO-3 should gather in one message each; none for most models."""
    return model.encoders() if isinstance(model, EncodingModel) else ()


@torch.no_grad()
def prepare_step(
    model: nn.Module, objective: ObjectiveLike, microbatches: Sequence[Any], device: torch.device
) -> Sequence[Any]:
    """Return the microbatches with the codes of frozen encoders, and what the objective needs of the whole step.

    All ranks must call.
    """
    if isinstance(model, EncodingModel):
        microbatches = [model.with_codes(microbatch, device) for microbatch in microbatches]
    if isinstance(objective, WholeStepObjective) and objective.needs_prepare(model, len(microbatches)):
        microbatches = objective.prepare(model, microbatches)
    return microbatches


def recompute(units: list[nn.Module]) -> Undo:
    """Discard each unit's activations and recompute them in the backward pass. Return an undo function."""
    for unit in units:
        # An instance attribute shadows the method. The hooks of ``__call__``, which gather weights, still run.
        # No unit draws from a generator (dropout masks are hashes), so there is no random state to preserve.
        unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=False)

    def undo() -> None:
        for unit in units:
            del unit.forward

    return undo


def gather_whole(units: list[nn.Module]) -> Undo:
    """Let ZeRO-3 gather each unit in one call and reduce its gradients together. Return an undo function.

    DeepSpeed reduces a unit's gradients as soon as the gradients of its *inputs* exist. A trained unit after frozen
    ones may have no input that requires a gradient, and would be reduced before its own gradients exist. A hook
    therefore makes one of its inputs require a gradient.
    """
    from deepspeed.utils import set_z3_leaf_module

    handles = []
    for unit in units:
        set_z3_leaf_module(unit, True)
        if any(parameter.requires_grad for parameter in unit.parameters()):
            handles.append(unit.register_forward_pre_hook(_require_input_gradient))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for unit in units:
            set_z3_leaf_module(unit, False)
            for parameter in unit.parameters():
                parameter.__dict__.pop("ds_z3_leaf_module", None)

    return undo


def _require_input_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    del module
    if not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*inputs[:index], value.detach().requires_grad_(), *inputs[index + 1 :])
    return None


class _WeightView(NamedTuple):
    """A view of a parameter, without its values."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedWeights:
    """Hooks of one model that keep autograd from saving gathered weights.

    ZeRO-3 frees a gathered weight after its module's forward pass and gathers it again for the backward pass. But a
    linear layer saves ``weight.t()``, a view, and a view keeps the values of its storage alive. Without these hooks all
    blocks' weights stay in memory until the backward pass, whatever ``live_parameter_elements`` is. DeepSpeed's
    solution (``memory_efficient_linear``) replaces ``torch.nn.functional.linear`` in the whole process.

    Create it after ZeRO-3 has added its hooks to the model: then weights are gathered when these hooks run.

    Args:
        model: A model that ZeRO-3 shards.
        units: Modules that ZeRO-3 gathers in one message, those of teachers included: a gradient may pass their blocks.
    """

    def __init__(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        self._by_storage: dict[int, nn.Parameter] = {}
        inside = {id(module) for unit in units for module in unit.modules()}
        owners = [(unit, list(unit.parameters())) for unit in units]
        owners += [(m, list(m.parameters(recurse=False))) for m in model.modules() if id(m) not in inside]
        self._parameters = {module: parameters for module, parameters in owners if parameters}
        self._handles = [module.register_forward_pre_hook(self._remember) for module in self._parameters]

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        """Record the storage of the gathered weights of ``module``. A forward pre-hook."""
        del inputs
        for parameter in self._parameters[module]:
            self._by_storage[parameter.untyped_storage().data_ptr()] = parameter

    def __call__(self) -> AbstractContextManager[Any]:
        """Return a context for one forward pass in which autograd saves references to gathered weights."""
        self._by_storage.clear()  # A gathered weight rarely gets the same address again.
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, saved: Tensor) -> Tensor | _WeightView:
        storage = saved.untyped_storage()
        parameter = self._by_storage.get(storage.data_ptr())
        if parameter is None:
            return saved
        # The address may be reused after the weight was freed, and one storage may hold several parameters. A gathered
        # weight may be padded to a multiple of the number of ranks.
        own, padded = parameter.untyped_storage(), getattr(parameter, "ds_numel_aligned", parameter.numel())
        sizes = (parameter.nbytes, padded * parameter.element_size())
        if own.data_ptr() != storage.data_ptr() or own.nbytes() not in sizes or saved.dtype != parameter.dtype:
            return saved
        return _WeightView(parameter, saved.size(), saved.stride(), int(saved.storage_offset()))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._by_storage.clear()


def _unpack(saved: Tensor | _WeightView) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.parameter.detach().as_strided(saved.size, saved.stride, saved.offset)


def read_gradients_in_place(optimizer: Any) -> Callable[[], None]:
    """Let ZeRO-3's optimizer read the gradients where they were reduced. Return an undo function.

    DeepSpeed copies the gradients of a group into one tensor before the optimizer's step. In its buffer of all
    gradients they are neighbours already, so a view of the buffer has the same values. This saves 4 bytes for each
    trained value that the rank owns.
    """
    copied = optimizer.flatten

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        buffer, start = optimizer.grad_partitions_flat_buffer, tensors[0].storage_offset()
        address, stop = buffer.untyped_storage().data_ptr(), start
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() != address or tensor.storage_offset() != stop:
                return copied(tensors)
            stop += tensor.numel()
        return buffer[start:stop]

    def undo() -> None:
        optimizer.flatten = copied

    optimizer.flatten = flatten
    return undo
