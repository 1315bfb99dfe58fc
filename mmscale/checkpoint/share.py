"""The share of one rank in a checkpoint: its tensors and their metadata.

    safetensors file: header length (8 bytes) | header (JSON) | values of tensor 0 | values of tensor 1 | ...
    metadata:         tensor -> range in the parameter, dtype, offset, CRC-32 (filled in by ``write_share``)

A share holds views, not copies. ``bytes_of`` yields the bytes of one tensor at a time, so memory never holds a second
copy of the share. It dequantises 8-bit state and materialises lazy tensors at that moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmscale.checkpoint.manifest import RankMetadata, TensorEntry, TrainState, rank_files
from mmscale.dist import World
from mmscale.engine.engine import Engine
from mmscale.engine.optimizers.eight_bit import QuantisedRange
from mmscale.hf.tensor_file import FORMAT_NAMES, file_header


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written.

    Attributes:
        shape: Shape of the tensor.
        dtype: Number format of the tensor.
        make: Returns the tensor. Each call computes it again.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel() * self.dtype.itemsize


Values = Tensor | QuantisedRange | LazyTensor


class TensorPiece(NamedTuple):
    """A range of a parameter's values, or one unsharded tensor."""

    key: str
    """``NAME|kind``."""
    start: int
    """Index of the first value in the flattened parameter; 0 for an unsharded tensor."""
    values: Values
    """The file stores the range of a parameter flat, and an unsharded tensor in this shape."""
    whole: bool = False
    """True for an unsharded tensor, which only rank 0 stores: a buffer or factored optimizer state."""


@dataclass(frozen=True)
class RankShare:
    """Everything that one rank writes.

    Attributes:
        names: Names of the tensor file and of the metadata file.
        header: Header of the tensor file, with its length.
        values: The tensors, in the order of the metadata.
        metadata: A ``RankMetadata`` as JSON values. Each tensor's ``crc32`` is 0 until ``write_share`` sets it.
    """

    names: tuple[str, str]
    header: bytes
    values: list[Values]
    metadata: dict[str, Any]

    @classmethod
    def of(cls, rank: int, pieces: list[TensorPiece], loader: str | None, random_state: dict[str, str]) -> RankShare:
        """Assign each tensor its offset in the file, and build header and metadata."""
        header = file_header(
            (key, values.dtype, values.shape if whole else (values.numel(),)) for key, _, values, whole in pieces
        )
        tensors, offset = {}, len(header)
        for key, start, values, whole in pieces:
            stop, dtype = start + values.numel(), FORMAT_NAMES[values.dtype]
            tensors[key] = TensorEntry(start=start, stop=stop, whole=whole, dtype=dtype, offset=offset, crc32=0)
            offset += values.nbytes
        metadata = RankMetadata(rank=rank, tensors=tensors, loader=loader, random_state=random_state)
        return cls(rank_files(rank), header, [piece.values for piece in pieces], metadata.model_dump())

    @property
    def lengths(self) -> list[int]:
        """Number of bytes of each tensor."""
        return [values.nbytes for values in self.values]

    def bytes_of(self) -> Iterator[memoryview]:
        """Yield the bytes of each tensor in order. Copies tensors of a device to the host, one at a time."""
        for values in self.values:
            yield flat_bytes(values).cpu().numpy().data


def flat_bytes(values: Values) -> Tensor:
    """Return the values as ``(nbytes,)`` uint8 on their device: a view of a contiguous tensor, else a copy."""
    if isinstance(values, LazyTensor):
        values = values.make()
    values = values.float() if isinstance(values, QuantisedRange) else values
    return values.detach().contiguous().view(-1).view(torch.uint8)


def share_of(engine: Engine, state: TrainState) -> RankShare:
    """Return this rank's share: views of masters, moments and frozen weights; on rank 0 also the unsharded tensors.

    Frozen weights that another checkpoint holds (``Engine.frozen_sources``) are left out.
    """
    pieces: list[TensorPiece] = []
    for owned in engine.partition.owned():
        if not owned.trained and owned.name in engine.frozen_sources:
            continue
        kinds = {"master" if owned.trained else "frozen": owned.master, **owned.moments}
        pieces.extend(TensorPiece(f"{owned.name}|{kind}", owned.start, values) for kind, values in kinds.items())
    if engine.world.is_main:
        whole = {f"{name}|buffer": values for name, values in persistent_buffers(engine.model).items()}
        whole |= engine.partition.whole_state()
        pieces.extend(TensorPiece(key, 0, values, whole=True) for key, values in whole.items())
    loader = None if state.loader is None else state.loader.to_json()
    return RankShare.of(engine.world.rank, pieces, loader, _random_state(engine.world))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in the model's ``state_dict``, by name."""
    found = {}
    for path, module in model.named_modules():
        for name, values in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = values
    return found


def _random_state(world: World) -> dict[str, str]:
    states = {"cpu": bytes(torch.get_rng_state().tolist()).hex()}
    if world.device.type == "cuda":
        states["cuda"] = bytes(torch.cuda.get_rng_state(world.device).tolist()).hex()
    return states
