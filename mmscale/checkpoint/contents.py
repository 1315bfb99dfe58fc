"""Whether the tensors of one rank are what the notes and the manifest say, and finite.

Checksums show that no byte changed since the files were written. These checks show that header, notes and manifest
agree with each other, so that no value is read under another name, shape or number format than it was saved with, and
that torch can take the random state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mmscale.checkpoint.manifest import Manifest, RankNotes, TensorEntry, rank_files, read_notes
from mmscale.hf.tensor_file import FORMAT_NAMES, HeaderEntry, read_header

_CHUNK_VALUES = 4 << 20
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in FORMAT_NAMES.items()}
_FLOATS = [name for dtype, name in FORMAT_NAMES.items() if dtype.is_floating_point]
_CUDA_STATE_BYTES = 16
"""State of a CUDA generator: seed and offset, 8 bytes each."""


def content_problems(path: Path, manifest: Manifest, rank: int) -> Iterator[str]:
    """Complaints about the tensors of one rank, each with the tensor's key. Reads all values.

    Args:
        path: Checkpoint folder; the checksums of the rank's two files are good.
        manifest: Of the folder.
        rank: Whose files.

    Raises:
        CheckpointError: the notes cannot be read.
        OSError: the file of tensors cannot be read.
        ValueError: it does not begin with a safetensors header.
    """
    notes = read_notes(path, rank)
    name = rank_files(rank)[0]
    if notes.rank != rank:
        yield f"{rank_files(rank)[1]}: these are the notes of rank {notes.rank}"
    yield from (f"{rank_files(rank)[1]}: {problem}" for problem in _random_state_problems(notes))
    problems = [*_known(manifest, notes), *_as_noted(read_header(path / name), manifest, notes)]
    if not problems:
        problems.extend(_non_finite(path / name, notes))
    yield from (f"{name}: {problem}" for problem in problems)


def count_non_finite(values: Tensor) -> int:
    """Number of NaN and infinite values of a tensor."""
    if not values.is_floating_point() or not values.numel():
        return 0
    flat = values.detach().reshape(-1)
    low, high = flat.aminmax()  # One pass without a copy; NaN is passed on.
    if math.isfinite(low) and math.isfinite(high):
        return 0
    return sum(int((~chunk.isfinite()).sum()) for chunk in flat.split(_CHUNK_VALUES))


def _random_state_problems(notes: RankNotes) -> Iterator[str]:
    """Complaints about states that torch's generators would not take."""
    if "cpu" not in notes.random_state:
        yield "random_state.cpu is missing"
    for device, text in notes.random_state.items():
        try:
            state = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
            if device == "cpu":
                torch.Generator().set_state(state)  # Checks length and content.
            elif device == "cuda" and len(state) != _CUDA_STATE_BYTES:  # There may be no such device here.
                raise ValueError(f"{len(state)} bytes, expected {_CUDA_STATE_BYTES}")
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            yield f"random_state.{device} is not the state of a generator of torch: {reason}"


def _known(manifest: Manifest, notes: RankNotes) -> Iterator[str]:
    """Tensors that the manifest does not list, or of a wrong format, and listed buffers that are not there."""
    for key, entry in notes.tensors.items():
        name, _, kind = key.rpartition("|")
        if kind == "buffer":
            if name not in manifest.buffers or not entry.whole:
                yield f"{key} is in the file, the manifest lists no such buffer"
        elif name not in manifest.parameters:
            yield f"{key} is in the file, the manifest lists no such parameter"
        elif entry.dtype not in _FLOATS:
            yield f"{key} has the number format {entry.dtype}, expected one of {', '.join(_FLOATS)}"
        elif not entry.whole and not entry.start <= entry.stop <= math.prod(manifest.parameters[name].shape):
            yield f"{key} is noted as the values {entry.start}:{entry.stop} of {manifest.parameters[name].shape}"
    if notes.rank == 0:
        yield from (f"{name}|buffer is missing" for name in manifest.buffers if f"{name}|buffer" not in notes.tensors)


def _as_noted(header: dict[str, HeaderEntry], manifest: Manifest, notes: RankNotes) -> Iterator[str]:
    """What the header of the file and the notes do not say alike."""
    for key in sorted(header.keys() ^ notes.tensors.keys()):
        yield f"{key} is only in {'the header' if key in header else 'the notes'}"
    for key, entry in notes.tensors.items():
        if key not in header:
            continue
        there, count = header[key], entry.stop - entry.start
        if there.dtype != entry.dtype or entry.dtype not in _ITEM_BYTES:
            yield f"{key} has the number format {there.dtype} in the header, {entry.dtype} in the notes"
        elif there.start != entry.offset or there.stop - there.start != count * _ITEM_BYTES[entry.dtype]:
            yield (
                f"{key} has the bytes {there.start}:{there.stop} in the header; the notes say {count} values from byte "
                f"{entry.offset} on"
            )
        elif (wrong := _wrong_shape(key, there, entry, manifest)) is not None:
            yield wrong


def _wrong_shape(key: str, there: HeaderEntry, entry: TensorEntry, manifest: Manifest) -> str | None:
    name, _, kind = key.rpartition("|")
    if kind == "buffer" and name in manifest.buffers:
        expected = manifest.buffers[name]
    elif entry.whole:  # Its shape follows from the optimizer, which the one who resumes knows.
        return (
            None if math.prod(there.shape) == entry.stop else f"{key} has the shape {list(there.shape)} in the header"
        )
    else:
        expected = (entry.stop - entry.start,)
    if there.shape == expected:
        return None
    return f"{key} has the shape {list(there.shape)} in the header, {list(expected)} by notes and manifest"


def _non_finite(file: Path, notes: RankNotes) -> Iterator[str]:
    with safe_open(file, "pt") as opened:
        for key in notes.tensors:
            if count := count_non_finite(values := opened.get_tensor(key)):
                yield f"{key} has {count} values of {values.numel()} that are NaN or infinite"
