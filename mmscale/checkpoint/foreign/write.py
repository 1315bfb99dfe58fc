"""Writing a checkpoint that no run of ours has saved: whole or absent, tensor by tensor from mapped sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.checkpoint.contents import count_non_finite
from mmscale.checkpoint.manifest import FORMAT, MANIFEST, FileEntry, Manifest, folder_name, seal
from mmscale.checkpoint.reshard import verify
from mmscale.checkpoint.save import model_config_values, tied_names
from mmscale.checkpoint.share import Piece, RankShare
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.hf.tensor_file import FORMAT_NAMES
from mmscale.io.files import new_folder, write_file, write_share

IMPORTED = "imported"
"""Stage of a checkpoint that was imported without a configuration."""
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SHOWN = 10


def new_share(rank: int, pieces: list[Piece], source: Path) -> RankShare:
    """The share of a rank that has never run: no position in the data, a generator that nobody has used yet.

    Raises:
        CheckpointError: our checkpoints do not store the number format of a piece, or values are NaN or infinite.
    """
    odd = [f"{key} ({values.dtype})" for key, _, values, _ in pieces if values.dtype not in FORMAT_NAMES]
    if odd:
        raise CheckpointError(f"{source}: our checkpoints do not store the number formats of {first(odd)}")
    bad = [
        f"{key} ({count} of {values.numel()})"
        for key, _, values, _ in pieces
        if isinstance(values, Tensor) and (count := count_non_finite(values))
    ]
    if bad:
        raise CheckpointError(f"{source} holds values that are NaN or infinite: {first(bad)}; nothing was written")
    fresh = bytes(torch.Generator().get_state().tolist()).hex()
    return RankShare.of(rank, pieces, None, {"cpu": fresh})


def precision_of(pieces: Iterable[Piece]) -> str:
    """Of weights in one format; of several ``fp32``."""
    formats = {piece.values.dtype for piece in pieces}
    return PRECISIONS.get(formats.pop(), "fp32") if len(formats) == 1 else "fp32"


def manifest_of_weights(model: nn.Module, precision: str, stage: str, extra: dict[str, Any]) -> Manifest:
    """Of a checkpoint of one rank that holds weights which no optimizer has seen; without its list of files.

    Args:
        model: Its names and shapes; may be on the meta device.
        precision: Of the weights.
        stage: Where they come from, in the place of a stage's name.
        extra: More of that; JSON values.
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
            "buffers": {},
            "tied": tied_names(model),
            "model_config_values": model_config_values(model),
            "files": {},
            "versions": {"torch": torch.__version__},
        }
    )


def first(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of ``names`` and how many more there are."""
    more = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def write_checkpoint(directory: Path, manifest: Manifest, shares: Iterable[RankShare]) -> Path:
    """Writes ``directory/step-N``.

    Args:
        directory: ``checkpoints`` folder of a run.
        manifest: All of it but the files.
        shares: Of each rank, in order; one at a time is asked for.

    Raises:
        CheckpointError: it is already there or cannot be written.
    """
    final = directory / folder_name(manifest.state.step)
    if final.exists():
        raise CheckpointError(f"{final} is already there; give another run folder")
    try:
        with new_folder(final) as partial:
            files: dict[str, FileEntry] = {}
            for share in shares:
                written = write_share(partial, share.names, share.header, share.notes, share.bytes_of())
                files |= {
                    name: FileEntry(bytes=size, crc32=crc32)
                    for name, (size, crc32) in zip(share.names, written, strict=True)
                }
            text = seal(manifest.model_copy(update={"files": files}))
            write_file(partial / MANIFEST, [memoryview(text.encode())])
            if problems := verify(partial):
                raise CheckpointError(f"{partial} was not written as meant: {'; '.join(problems)}")
    except OSError as error:
        raise CheckpointError(f"cannot write {final}: {error}") from error
    return final
