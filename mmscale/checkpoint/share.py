"""What one rank gives to a checkpoint: its tensors, and the notes about them.

    safetensors file: header length (8 bytes) | header (JSON) | values of tensor 0 | of tensor 1 | ...
    notes:            tensor -> range in the parameter, format, first byte, CRC-32 (filled in by whoever writes)

The values stay where they are; ``bytes_of`` views them one after the other for a writer, so no second copy of a rank's
share need exist. What is kept in 8 bits is dequantised then, and what is cut out of another model read, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmscale.checkpoint.manifest import RankNotes, TensorEntry, TrainState, rank_files
from mmscale.dist import World
from mmscale.engine.engine import Engine
from mmscale.engine.optimizers.eight_bit import QuantisedRange
from mmscale.hf.tensor_file import FORMAT_NAMES, file_header


@dataclass(frozen=True)
class Deferred:
    """Values that nobody has yet; to who saves them like a tensor that is made when asked for.

    Attributes:
        shape: Of the tensor.
        dtype: Its number format.
        make: Gives it.
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


Values = Tensor | QuantisedRange | Deferred


class Piece(NamedTuple):
    """Values of a parameter or a buffer, from ``start`` on in its flattened form."""

    key: str
    """``NAME|kind``."""
    start: int
    values: Values
    """In the shape that the file is to say, which of a parameter's range is flat, whatever view of it this is."""
    whole: bool = False
    """Of a tensor that rank 0 keeps for all: it is no range of a parameter's values."""


@dataclass(frozen=True)
class RankShare:
    """Everything that one rank writes.

    Attributes:
        names: Of the file of tensors and of the notes.
        header: First bytes of the file of tensors.
        values: The tensors, in the order of the notes.
        notes: As JSON values; each tensor's ``crc32`` is still 0.
    """

    names: tuple[str, str]
    header: bytes
    values: list[Values]
    notes: dict[str, Any]

    @classmethod
    def of(cls, rank: int, pieces: list[Piece], loader: str | None, random_state: dict[str, str]) -> RankShare:
        """Lays out ``pieces`` in a file."""
        header = file_header(
            (key, values.dtype, values.shape if whole else (values.numel(),)) for key, _, values, whole in pieces
        )
        tensors, offset = {}, len(header)
        for key, start, values, whole in pieces:
            stop, dtype = start + values.numel(), FORMAT_NAMES[values.dtype]
            tensors[key] = TensorEntry(start=start, stop=stop, whole=whole, dtype=dtype, offset=offset, crc32=0)
            offset += values.nbytes
        notes = RankNotes(rank=rank, tensors=tensors, loader=loader, random_state=random_state)
        return cls(rank_files(rank), header, [piece.values for piece in pieces], notes.model_dump())

    @property
    def lengths(self) -> list[int]:
        """Bytes of each tensor."""
        return [values.nbytes for values in self.values]

    def bytes_of(self) -> Iterator[memoryview]:
        """The bytes of each tensor; from a device, one tensor at a time is copied to the host."""
        for values in self.values:
            yield flat_bytes(values).cpu().numpy().data


def flat_bytes(values: Values) -> Tensor:
    """The values as bytes, ``(nbytes,)``, a view where they are contiguous and lie there as they are saved."""
    if isinstance(values, Deferred):
        values = values.make()
    values = values.float() if isinstance(values, QuantisedRange) else values
    return values.detach().contiguous().view(-1).view(torch.uint8)


def share_of(engine: Engine, state: TrainState) -> RankShare:
    """This rank's share: views of masters, moments and frozen weights; rank 0 has what is kept whole too."""
    pieces: list[Piece] = []
    for owned in engine.partition.owned():
        kinds = {"master" if owned.trained else "frozen": owned.master, **owned.moments}
        pieces.extend(Piece(f"{owned.name}|{kind}", owned.start, values) for kind, values in kinds.items())
    if engine.world.is_main:
        whole = {f"{name}|buffer": values for name, values in persistent_buffers(engine.model).items()}
        whole |= engine.partition.whole_state()
        pieces.extend(Piece(key, 0, values, whole=True) for key, values in whole.items())
    loader = None if state.loader is None else state.loader.to_json()
    return RankShare.of(engine.world.rank, pieces, loader, _random_state(engine.world))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state, by name."""
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
