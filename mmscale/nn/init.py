"""Initial values of every parameter, as a pure function of the seed and the parameter's full name.

Neither the order of construction, nor the number of ranks, nor other parameters change the values of a parameter.
Random parameters are normal with standard deviation ``1 / sqrt(last dimension)``: the fan-in of projections and stacked
experts. A tower may set a fixed deviation instead. Projections that write to a residual stream of L blocks are divided
by ``sqrt(2 L)``. A module may state other rules for its own parameters: constants (``constant_init``), a uniform
distribution around 0 (``uniform_init``), the norms of the rows of another one (``row_norm_init``), or a function of the
shape (``fixed_init``). Parameters of ``fixed_init`` are never trained.

Source: LeCun et al. 1998, "Efficient backprop" (fan-in); Radford et al. 2019 (GPT-2), section 2.3 (residual outputs).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

GatherParameters = Callable[[list[nn.Parameter]], AbstractContextManager[object]]
"""Returns a context in which sharded parameters (ZeRO-3) are whole and writable; on exit it keeps the new values."""

_RESIDUAL_OUTPUTS = ("o_proj", "down_proj")


def _already_whole(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    return nullcontext()


def set_init_scale(tower: nn.Module, num_layers: int, std: float | None) -> None:
    """Set the scale that ``initialise_`` uses for each module of a tower, as attributes of the modules.

    Args:
        tower: The blocks and all modules that share their residual stream. Mutated.
        num_layers: L, number of blocks on that stream.
        std: Fixed standard deviation, or None for ``1 / sqrt(fan-in)``.
    """
    for module in tower.modules():
        module.init_std = std  # type: ignore[assignment]
        module.init_residual_gain = 1 / math.sqrt(2 * num_layers)  # type: ignore[assignment]


def initialise_(model: nn.Module, seed: int, gather: GatherParameters = _already_whole) -> None:
    """Overwrite every parameter of ``model`` with its initial values.

    Args:
        model: Must not be on the meta device. Parameters may be sharded if ``gather`` can make them whole.
        seed: Seed of the run.
        gather: Called with the parameters of one module at a time. If it is collective, all ranks must call this
            function.
    """
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p not in seen}
        if not own:
            continue
        seen.update(own.values())
        with gather(list(own.values())), torch.no_grad():
            for name, parameter in own.items():
                if parameter.numel():  # Empty on ranks where ``gather`` did not make it whole.
                    full_name = f"{path}.{name}" if path else name
                    parameter.copy_(first_values(module, full_name, parameter.shape, seed))


def first_values(module: nn.Module, full_name: str, shape: Iterable[int], seed: int) -> Tensor:
    """Return the initial values of one parameter, float32 on the CPU.

    Args:
        module: Owner of the parameter. Its attributes from ``set_init_scale`` and its own rules apply.
        full_name: Name of the parameter in the whole model.
        shape: Shape of the whole parameter, not of a shard.
        seed: Seed of the run.
    """
    path, _, name = full_name.rpartition(".")
    if (values_of := getattr(module, "fixed_init", {}).get(name)) is not None:
        fixed: Tensor = values_of(*shape)
        return fixed
    if (source := getattr(module, "row_norm_init", {}).get(name)) is not None:
        # ``module`` may be sharded, so its parameters need not have their shapes.
        rows = first_values(module, f"{path}.{source}", (module.out_features, module.in_features), seed)  # type: ignore[arg-type]
        return torch.linalg.norm(rows, dim=1)
    mean, std = value_rule(module, full_name, tuple(shape))
    values = torch.empty(tuple(shape), dtype=torch.float32)
    if not std:
        return values.fill_(mean)
    digest = hashlib.sha256(f"{seed}/{full_name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if (bound := getattr(module, "uniform_init", {}).get(name)) is not None:
        return values.uniform_(-bound, bound, generator=generator)
    return values.normal_(mean, std, generator=generator)


def fixed_parameters(model: nn.Module) -> set[int]:
    """Return the ``id()`` of each parameter that no stage trains: those of ``fixed_init``."""
    return {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "fixed_init", ())}


def value_rule(module: nn.Module, full_name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation of a parameter's initial values; a deviation of 0 means a constant."""
    path = full_name.split(".")
    constant = _constant(module, path[-1])
    if constant is not None:
        return constant, 0.0
    if (bound := getattr(module, "uniform_init", {}).get(path[-1])) is not None:
        return 0.0, bound / math.sqrt(3)
    std = getattr(module, "init_std", None) or 1 / math.sqrt(shape[-1])
    if any(name in _RESIDUAL_OUTPUTS for name in path[-2:]):
        std *= getattr(module, "init_residual_gain", 1.0)
    return 0.0, std


def _constant(module: nn.Module, name: str) -> float | None:
    """Return the constant initial value of a parameter, or None if its initial values are random."""
    constants: dict[str, float] = getattr(module, "constant_init", {})
    if name in constants:
        return constants[name]
    if name == "bias":
        return 0.0
    return 1.0 if isinstance(module, nn.LayerNorm | nn.RMSNorm) else None
