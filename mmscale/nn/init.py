"""First values of every parameter: a pure function of the seed and the parameter's name.

Neither the order of construction, nor the number of ranks, nor a frozen or absent sibling changes what a parameter
gets. One rule for every matrix: normal with standard deviation ``1 / sqrt(last dimension)``, which is fan-in for
projections, stacked experts, embeddings and position tables alike; a tower may fix the deviation instead. Projections
that write to a residual stream of L blocks are divided by ``sqrt(2 L)``.

Source: LeCun et al. 1998, "Efficient backprop" (fan-in); Radford et al. 2019 (GPT-2), section 2.3 (residual outputs).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]
"""Makes parameters whole and writable for the length of a ``with`` block (ZeRO-3); keeps what was written."""

_RESIDUAL_OUTPUTS = ("o_proj", "down_proj")


def _at_hand(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    return nullcontext()


def set_init_scale(tower: nn.Module, num_layers: int, std: float | None) -> None:
    """Notes on each module of a tower how ``initialise_`` shall scale it.

    Args:
        tower: Blocks and whatever shares their residual stream.
        num_layers: L, blocks on that stream.
        std: Fixed standard deviation, or None for fan-in.
    """
    for module in tower.modules():
        module.init_std = std  # type: ignore[assignment]
        module.init_residual_gain = 1 / math.sqrt(2 * num_layers)  # type: ignore[assignment]


def initialise_(model: nn.Module, seed: int, gather: Gather = _at_hand) -> None:
    """Overwrites every parameter of ``model`` with its first values.

    Args:
        model: Materialised; parameters may be sharded if ``gather`` can make them whole.
        seed: Of the run.
        gather: Called with the parameters of one module at a time. All ranks must call together if it is collective.
    """
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p not in seen}
        if not own:
            continue
        seen.update(own.values())
        with gather(list(own.values())), torch.no_grad():
            for name, parameter in own.items():
                if parameter.numel():  # A rank that gathers nothing writes nothing.
                    full_name = f"{path}.{name}" if path else name
                    parameter.copy_(first_values(module, full_name, parameter.shape, seed))


def first_values(module: nn.Module, full_name: str, shape: Iterable[int], seed: int) -> Tensor:
    """First values of one parameter, float32 on the host: for callers that fill shards themselves.

    Args:
        module: Owner of the parameter; its notes from ``set_init_scale`` and ``constant_init`` count.
        full_name: Name of the parameter in the whole model.
        shape: Of the whole parameter.
        seed: Of the run.
    """
    mean, std = value_rule(module, full_name, tuple(shape))
    values = torch.empty(tuple(shape), dtype=torch.float32)
    if not std:
        return values.fill_(mean)
    digest = hashlib.sha256(f"{seed}/{full_name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return values.normal_(mean, std, generator=generator)


def value_rule(module: nn.Module, full_name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """What ``first_values`` draws from: mean and standard deviation; all values are the mean where that is 0."""
    path = full_name.split(".")
    constant = _constant(module, path[-1])
    if constant is not None:
        return constant, 0.0
    std = getattr(module, "init_std", None) or 1 / math.sqrt(shape[-1])
    if any(name in _RESIDUAL_OUTPUTS for name in path[-2:]):
        std *= getattr(module, "init_residual_gain", 1.0)
    return 0.0, std


def _constant(module: nn.Module, name: str) -> float | None:
    """The value that all entries start from, or None for a random parameter."""
    constants: dict[str, float] = getattr(module, "constant_init", {})
    if name in constants:
        return constants[name]
    if name == "bias":
        return 0.0
    return 1.0 if isinstance(module, nn.LayerNorm | nn.RMSNorm) else None
