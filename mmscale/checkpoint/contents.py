"""Check that one rank's tensors agree with its metadata and the manifest, and that all values are finite.

Checksums show that no byte has changed since the files were written. These checks show that header, metadata and
manifest agree, so no value is read under a name, shape or dtype that differs from the saved one. They also show that
torch accepts the saved CPU random state, and that a CUDA random state has the right size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mmscale.checkpoint.manifest import Manifest, RankMetadata, TensorEntry, rank_files, read_rank_metadata
from mmscale.hf.tensor_file import FORMAT_NAMES, HeaderEntry, read_header

_CHUNK_VALUES = 4 << 20
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in FORMAT_NAMES.items()}
_FLOATS = [name for dtype, name in FORMAT_NAMES.items() if dtype.is_floating_point]
_CUDA_STATE_BYTES = 16
"""Size of a CUDA generator's state: seed and offset, 8 bytes each."""


def content_problems(path: Path, manifest: Manifest, rank: int) -> Iterator[str]:
    """Yield a sentence for each problem in the files of one rank.

    The values are read, and checked for NaN and infinity, only if header, metadata and manifest agree.

    Args:
        path: Checkpoint folder. The caller has verified the checksums of the rank's two files.
        manifest: Manifest of the folder.
        rank: Rank whose files are checked.

    Raises:
        CheckpointError: the metadata file cannot be read.
        OSError: the tensor file cannot be read.
        ValueError: the tensor file does not begin with a safetensors header.
        SafetensorError: safetensors cannot open the tensor file.
    """
    metadata = read_rank_metadata(path, rank)
    name = rank_files(rank)[0]
    if metadata.rank != rank:
        yield f"{rank_files(rank)[1]}: holds the metadata of rank {metadata.rank}"
    yield from (f"{rank_files(rank)[1]}: {problem}" for problem in _random_state_problems(metadata))
    problems = [
        *_manifest_problems(manifest, metadata),
        *_header_problems(read_header(path / name), manifest, metadata),
    ]
    if not problems:
        problems.extend(_non_finite_problems(path / name, metadata))
    yield from (f"{name}: {problem}" for problem in problems)


def count_non_finite(values: Tensor) -> int:
    """Return the number of NaN and infinite values in a tensor."""
    if not values.is_floating_point() or not values.numel():
        return 0
    flat = values.detach().reshape(-1)
    low, high = flat.aminmax()  # One pass without a copy. A NaN makes both results NaN.
    if math.isfinite(low) and math.isfinite(high):
        return 0
    return sum(int((~chunk.isfinite()).sum()) for chunk in flat.split(_CHUNK_VALUES))


def _random_state_problems(metadata: RankMetadata) -> Iterator[str]:
    """Yield a sentence if there is no CPU state, and for each state that torch does not accept (CUDA: wrong size)."""
    if "cpu" not in metadata.random_state:
        yield "random_state.cpu is missing"
    for device, text in metadata.random_state.items():
        try:
            state = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
            if device == "cpu":
                torch.Generator().set_state(state)  # Checks length and content.
            elif device == "cuda" and len(state) != _CUDA_STATE_BYTES:  # This machine may have no CUDA device.
                raise ValueError(f"{len(state)} bytes, expected {_CUDA_STATE_BYTES}")
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            yield f"random_state.{device} is not the state of a torch generator: {reason}"


def _manifest_problems(manifest: Manifest, metadata: RankMetadata) -> Iterator[str]:
    """Yield a sentence for each tensor that contradicts the manifest, and for each buffer that is missing."""
    for key, entry in metadata.tensors.items():
        name, _, kind = key.rpartition("|")
        if kind == "buffer":
            if name not in manifest.buffers or not entry.whole:
                yield f"{key} is in the file, but the manifest lists no such buffer"
        elif name not in manifest.parameters:
            yield f"{key} is in the file, but the manifest lists no such parameter"
        elif entry.dtype not in _FLOATS:
            yield f"{key} has the number format {entry.dtype}, expected one of {', '.join(_FLOATS)}"
        elif not entry.whole and not entry.start <= entry.stop <= math.prod(manifest.parameters[name].shape):
            shape = list(manifest.parameters[name].shape)
            yield f"{key} has the range {entry.start}:{entry.stop}, which is not inside its parameter of shape {shape}"
    if metadata.rank == 0:
        yield from (
            f"{name}|buffer is missing" for name in manifest.buffers if f"{name}|buffer" not in metadata.tensors
        )


def _header_problems(header: dict[str, HeaderEntry], manifest: Manifest, metadata: RankMetadata) -> Iterator[str]:
    """Yield a sentence for each difference between the header of the tensor file and the metadata."""
    for key in sorted(header.keys() ^ metadata.tensors.keys()):
        yield f"{key} is only in {'the header' if key in header else 'the metadata'}"
    for key, entry in metadata.tensors.items():
        if key not in header:
            continue
        there, count = header[key], entry.stop - entry.start
        if there.dtype != entry.dtype or entry.dtype not in _ITEM_BYTES:
            yield f"{key} has the number format {there.dtype} in the header, {entry.dtype} in the metadata"
        elif there.start != entry.offset or there.stop - there.start != count * _ITEM_BYTES[entry.dtype]:
            yield (
                f"{key} has the bytes {there.start}:{there.stop} in the header; by the metadata it has {count} values "
                f"from byte {entry.offset} on"
            )
        elif (wrong := _wrong_shape(key, there, entry, manifest)) is not None:
            yield wrong


def _wrong_shape(key: str, there: HeaderEntry, entry: TensorEntry, manifest: Manifest) -> str | None:
    name, _, kind = key.rpartition("|")
    if kind == "buffer" and name in manifest.buffers:
        expected = manifest.buffers[name]
    elif entry.whole:  # The optimizer determines its shape; ``resume`` compares it.
        return (
            None if math.prod(there.shape) == entry.stop else f"{key} has the shape {list(there.shape)} in the header"
        )
    else:
        expected = (entry.stop - entry.start,)
    if there.shape == expected:
        return None
    return f"{key} has the shape {list(there.shape)} in the header, {list(expected)} by metadata and manifest"


def _non_finite_problems(file: Path, metadata: RankMetadata) -> Iterator[str]:
    with safe_open(file, "pt") as opened:
        for key in metadata.tensors:
            if count := count_non_finite(values := opened.get_tensor(key)):
                yield f"{key}: {count} of {values.numel()} values are NaN or infinite"
