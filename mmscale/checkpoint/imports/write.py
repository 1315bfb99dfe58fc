"""Write an imported or pruned checkpoint atomically. Mapped and lazy tensors are read or computed one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.checkpoint.contents import count_non_finite
from mmscale.checkpoint.manifest import FORMAT, MANIFEST, FileEntry, Manifest, folder_name, seal
from mmscale.checkpoint.reshard import verify
from mmscale.checkpoint.save import model_config_values, tied_names
from mmscale.checkpoint.share import RankShare, TensorPiece
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.hf.tensor_file import FORMAT_NAMES
from mmscale.io.files import new_folder, write_file, write_share

IMPORTED = "imported"
"""Stage name of a checkpoint that was imported without a run configuration."""
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MAX_LISTED = 10


def new_share(rank: int, pieces: list[TensorPiece], source: Path) -> RankShare:
    """Return the share of a rank without training history: no loader state, and the state of a fresh generator.

    Lazy tensors are not checked for NaN here; ``write_checkpoint`` checks all values after it has written them.

    Raises:
        CheckpointError: a checkpoint cannot store the number format of a piece, or values are NaN or infinite.
    """
    unsupported = [f"{key} ({values.dtype})" for key, _, values, _ in pieces if values.dtype not in FORMAT_NAMES]
    if unsupported:
        raise CheckpointError(f"{source}: a checkpoint cannot store the number format of {first(unsupported)}")
    bad = [
        f"{key} ({count} of {values.numel()})"
        for key, _, values, _ in pieces
        if isinstance(values, Tensor) and (count := count_non_finite(values))
    ]
    if bad:
        raise CheckpointError(f"{source} holds values that are NaN or infinite: {first(bad)}; nothing was written")
    fresh = bytes(torch.Generator().get_state().tolist()).hex()
    return RankShare.of(rank, pieces, None, {"cpu": fresh})


def precision_of(pieces: Iterable[TensorPiece]) -> str:
    """Return the precision of the weights: their common number format, or ``fp32`` if they have several."""
    formats = {piece.values.dtype for piece in pieces}
    return PRECISIONS.get(formats.pop(), "fp32") if len(formats) == 1 else "fp32"


def manifest_of_weights(
    model: nn.Module,
    precision: str,
    stage: str,
    extra: dict[str, Any],
    buffers: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Manifest:
    """Return the manifest of a one-rank checkpoint at step 0 that has only frozen weights. ``files`` is empty.

    Args:
        model: Gives names, shapes, ties and configuration; may be on the meta device.
        precision: Precision of the weights.
        stage: Origin of the weights, stored as the name of the stage.
        extra: Further information as JSON values, stored as ``TrainState.extra``.
        buffers: Shapes of the buffers that the checkpoint will hold, by name.
    """
    table = parameter_table(model)
    return Manifest.model_validate(
        {
            "format": FORMAT,
            "state": {"step": 0, "stage_index": 0, "stage_step": 0, "tokens": 0, "samples": 0, "extra": extra},
            "stage": stage,
            "world_size": 1,
            "zero_stage": 0,
            "precision": precision,
            "optimizer_steps": 0,
            "parameters": {name: {**entry, "trained": False} for name, entry in table.items()},
            "buffers": {name: tuple(shape) for name, shape in buffers.items()},
            "tied": tied_names(model),
            "model_config_values": model_config_values(model),
            "files": {},
            "versions": {"torch": torch.__version__},
        }
    )


def first(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first 10 ``names``, and append the number of the others."""
    more = len(names) - _MAX_LISTED
    return separator.join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def write_checkpoint(directory: Path, manifest: Manifest, shares: Iterable[RankShare]) -> Path:
    """Write ``directory/step-N`` and verify it, in one process.

    Args:
        directory: ``checkpoints`` folder of a run.
        manifest: The manifest with empty ``files``.
        shares: The share of each rank, in order. An iterator may create each share when it is written.

    Raises:
        CheckpointError: ``step-N`` already exists, cannot be written or does not pass ``verify``.
    """
    final = directory / folder_name(manifest.state.step)
    if final.exists():
        raise CheckpointError(f"{final} already exists; give another run folder")
    try:
        with new_folder(final) as partial:
            files: dict[str, FileEntry] = {}
            for share in shares:
                written = write_share(partial, share.names, share.header, share.metadata, share.bytes_of())
                files |= {
                    name: FileEntry(bytes=size, crc32=crc32)
                    for name, (size, crc32) in zip(share.names, written, strict=True)
                }
            text = seal(manifest.model_copy(update={"files": files}))
            write_file(partial / MANIFEST, [memoryview(text.encode())])
            if problems := verify(partial):
                raise CheckpointError(f"{partial} was written but does not verify: {'; '.join(problems)}")
    except OSError as error:
        raise CheckpointError(f"cannot write {final}: {error}") from error
    return final
