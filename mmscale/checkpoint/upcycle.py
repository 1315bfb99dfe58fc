"""Sparse upcycling: a warm start of blocks with experts from the dense feed-forwards of a checkpoint.

Expert e gets slice e mod g of the dense feed-forward, where g = F / expert_dim:

    gate_up_proj[e]   rows of gate_proj (F, D), then of up_proj (F, D)
    down_proj[e]      columns of down_proj (D, F), times g / scale

With g = 1 every expert is a copy of the whole. The router keeps its fresh values. The weights of the chosen experts sum
to ``scale``, so the block computes what the dense one did. With g > 1 the router's rows of the g slices of a copy are
equal (a virtual group). A row then chooses A / g whole copies with g equal weights each, and the sum is again the dense
output. Rows of one copy part in training, because their slices have different gradients.

Source: Komatsuzaki et al. 2022, "Sparse upcycling" (arXiv 2212.05055), section 3; for slices He et al. 2024, "Upcycling
large language models into mixture of experts" (arXiv 2410.07524), section 3. The second differs in the router: it does
not renormalise the weights of the chosen experts, so its function is equal only on average.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from data_pipeline.io.strict import first_fault
from mmscale.checkpoint.manifest import Manifest
from mmscale.checkpoint.reshard import CheckpointReader
from mmscale.engine.partition import OwnedRange
from mmscale.errors import CheckpointError
from mmscale.models.config import ModelConfig, read_model_config
from mmscale.nn.block import DenseMlpConfig, MlpBase
from mmscale.nn.expert_parallel import full_shape
from mmscale.nn.init import first_values
from mmscale.nn.moe import MoeConfig, MoeMlp
from mmscale.nn.router import RouterOrder

_BLOCKS = "decoder.layers."


class Upcycled(NamedTuple):
    """A parameter of a block with experts whose values come from the dense feed-forward of the same block."""

    name: str
    sources: tuple[str, ...]
    """Stored names of the dense matrices; empty for a router whose rows are equal within a virtual group."""
    experts: int
    """E, experts in the block."""
    slices: int
    """g, slices of the dense feed-forward; 1 if each expert is a copy of it."""
    factor: float
    """Factor on the values."""


def upcycling_problem(dense: MlpBase, experts: MoeConfig) -> str | None:
    """Return why a block with ``experts`` cannot start with the function of a ``dense`` one; None if it can.

    The message names the keys of ``experts``. The functions of two blocks that fit are equal in evaluation. In training
    they differ by what ``experts`` adds to it: jitter, expert dropout, and tokens over the capacity.
    """
    if not isinstance(dense, DenseMlpConfig):
        return "the loaded weights have experts already; leave out `upcycle`"
    if not dense.gated or dense.bias:
        what = "has biases" if dense.bias else "is not gated"
        return f"the dense feed-forward {what}, and experts are gated without biases; leave out `upcycle`"
    if dense.activation is not experts.activation:
        return f"activation={experts.activation.value}: must be {dense.activation.value}, as in the dense feed-forward"
    if experts.shared_dim:
        return f"shared_dim={experts.shared_dim}: a shared expert would add to the dense output; set it to 0"
    if not experts.renormalise and experts.router is not RouterOrder.TOPK_THEN_SOFTMAX:
        return (
            "renormalise=false: the weights of the chosen experts do not sum to 1, so the block would not compute what "
            "the dense one does; set renormalise: true, or router: topk_then_softmax"
        )
    slices, rest = divmod(dense.hidden_dim, experts.expert_dim)
    if rest or not slices:
        return (
            f"expert_dim={experts.expert_dim}: must be {dense.hidden_dim}, the width of the dense feed-forward, or a "
            "divisor of it"
        )
    for key in ("experts_per_token", "num_experts"):
        if getattr(experts, key) % slices:
            return (
                f"{key}={getattr(experts, key)}: must be a multiple of {slices}, because an expert of expert_dim="
                f"{experts.expert_dim} is 1/{slices} of the dense feed-forward ({dense.hidden_dim})"
            )
    if experts.num_experts // experts.choice_groups % slices:
        return f"choice_groups={experts.choice_groups}: each group must have a multiple of {slices} experts"
    return None


def upcycled_parameters(model: nn.Module, manifest: Manifest, components: Collection[str] | None) -> Iterator[Upcycled]:
    """Yield the parameters of blocks with experts that a checkpoint's dense feed-forwards fill. Reads no weights.

    A block without a feed-forward in the checkpoint is skipped.

    Args:
        model: The model with experts. It may be on the meta device or sharded.
        manifest: The manifest of the checkpoint.
        components: Components that are loaded; None for all.

    Raises:
        CheckpointError: a block cannot compute what the dense one did.
    """
    if components is not None and "decoder" not in components:
        return
    blocks: list[MlpBase] = []
    for path, module in model.named_modules():
        if not isinstance(module, MoeMlp) or not path.startswith(_BLOCKS):
            continue
        matrices = (f"{path}.up_proj.weight", f"{path}.experts.down_proj")
        if all(manifest.stored_name(name) is None for name in matrices):
            continue
        blocks = blocks or _stored_blocks(manifest)
        number, experts = int(path.split(".")[2]), module.config
        dense = blocks[number] if number < len(blocks) else experts
        if (problem := upcycling_problem(dense, experts)) is not None:
            raise CheckpointError(f"upcycle: {path}: {problem}")
        assert isinstance(dense, DenseMlpConfig), "checked"
        gate, up, down = _dense_matrices(manifest, path, dense.hidden_dim, full_shape(module.gate.weight)[1])
        slices = dense.hidden_dim // experts.expert_dim
        yield Upcycled(f"{path}.experts.gate_up_proj", (gate, up), experts.num_experts, slices, 1.0)
        factor = slices / experts.scale
        yield Upcycled(f"{path}.experts.down_proj", (down,), experts.num_experts, slices, factor)
        if slices > 1:
            yield Upcycled(f"{path}.gate.weight", (), experts.num_experts, slices, 1.0)


def _dense_matrices(manifest: Manifest, path: str, hidden_dim: int, width: int) -> list[str]:
    """Return the stored names of gate_proj, up_proj and down_proj of a block.

    Raises:
        CheckpointError: a matrix is missing or has another shape.
    """
    found = []
    for name, shape in (("gate", (hidden_dim, width)), ("up", (hidden_dim, width)), ("down", (width, hidden_dim))):
        stored = manifest.stored_name(f"{path}.{name}_proj.weight")
        if stored is None or manifest.parameters[stored].shape != shape:
            raise CheckpointError(
                f"upcycle: {path}: the checkpoint has no feed-forward of {hidden_dim} channels on a stream of {width}"
            )
        found.append(stored)
    return found


def fill_upcycled(reader: CheckpointReader, model: nn.Module, owned: OwnedRange, one: Upcycled, *, ema: bool) -> None:
    """Set this rank's range of a parameter to the values that ``one`` describes. Sends nothing.

    Args:
        reader: The dense checkpoint.
        model: The model with experts.
        owned: The range; mutated.
        one: The parameter's entry.
        ema: Read the averages of the weights instead of the weights.
    """
    shape = full_shape(model.get_parameter(one.name))
    if not one.sources:
        path, _, _ = one.name.rpartition(".")
        rows = first_values(model.get_submodule(path), one.name, (one.experts // one.slices, shape[1]), seed=0)
        owned.master.copy_(rows.repeat_interleave(one.slices, 0).view(-1)[owned.start : owned.stop])
        return
    size = math.prod(shape[1:])
    read: dict[tuple[int, int, int], Tensor] = {}  # Several experts of this rank have the same slice.
    for expert in range(owned.start // size, -(-owned.stop // size)):
        first, last = max(owned.start, expert * size), min(owned.stop, (expert + 1) * size)
        key = (expert % one.slices, first - expert * size, last - expert * size)
        if key not in read:
            read[key] = (_rows if len(one.sources) > 1 else _columns)(reader, one, shape, *key, ema=ema)
        owned.master[first - owned.start : last - owned.start].copy_(read[key])


def _rows(
    reader: CheckpointReader, one: Upcycled, shape: tuple[int, ...], part: int, start: int, stop: int, *, ema: bool
) -> Tensor:
    """Return the values ``start:stop`` of an expert's ``(2 F / g, D)``: rows of gate_proj, then of up_proj."""
    half = math.prod(shape[1:]) // 2
    values = torch.empty(stop - start)
    for number, name in enumerate(one.sources):
        low, high = max(start, number * half), min(stop, (number + 1) * half)
        if low < high:
            begin = part * half + low - number * half
            reader.fill(values[low - start : high - start], name, reader.weights_kind(name, ema=ema), begin)
    return values


def _columns(
    reader: CheckpointReader, one: Upcycled, shape: tuple[int, ...], part: int, start: int, stop: int, *, ema: bool
) -> Tensor:
    """Return the values ``start:stop`` of an expert's ``(D, F / g)``: columns of down_proj, times the factor."""
    width, (name,) = shape[2], one.sources
    first, last = start // width, -(-stop // width)
    values = torch.empty((last - first) * width * one.slices)
    reader.fill(values, name, reader.weights_kind(name, ema=ema), first * width * one.slices)
    columns = values.view(last - first, one.slices, width)[:, part].flatten()
    return columns[start - first * width : stop - first * width] * one.factor


def _stored_blocks(manifest: Manifest) -> list[MlpBase]:
    """Return the feed-forward of each block of the checkpoint's decoder.

    Raises:
        CheckpointError: the checkpoint has no valid configuration of a model.
    """
    try:
        config = read_model_config(manifest.model_config_values or {})
    except ValidationError as error:
        raise CheckpointError(
            f"upcycle: the checkpoint has no valid configuration of its model: {first_fault(error)}"
        ) from error
    return list(config.decoder.block_mlps()) if isinstance(config, ModelConfig) else []
