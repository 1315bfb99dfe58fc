"""Write checkpoints without an engine: any ranges, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmscale.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    SavedState,
    folder_name,
    rank_files,
    seal,
)
from mmscale.checkpoint.share import RankShare, TensorPiece
from mmscale.io.files import finalize, write_share


def write_checkpoint(
    folder: Path,
    ranks: Sequence[Sequence[TensorPiece]],
    parameters: Mapping[str, tuple[int, ...]],
    *,
    step: int = 3,
    frozen: Sequence[str] = (),
    loaders: Sequence[str | None] | None = None,
    stale: Sequence[Path] = (),
    random_state: Mapping[str, str] | None = None,
    **manifest: Any,
) -> Path:
    """Write ``folder/step-N`` as the ranks of a run do.

    Args:
        folder: The ``checkpoints`` folder.
        ranks: Tensors of each rank.
        parameters: Shape of each parameter.
        step: Step of the run and of the stage.
        frozen: Names of parameters that the stage does not train.
        loaders: Loader state of each rank.
        stale: Older checkpoints to remove.
        random_state: Random state of each rank, in addition to that of the CPU generator.
        manifest: Fields of the manifest that replace or extend the defaults.
    """
    final = folder / folder_name(step)
    partial = folder / (final.name + ".partial")
    partial.mkdir(parents=True)
    files = {}
    for rank, pieces in enumerate(ranks):
        loader = None if loaders is None else loaders[rank]
        generator = {"cpu": bytes(torch.get_rng_state().tolist()).hex(), **(random_state or {})}
        share = RankShare.of(rank, [*pieces], loader, generator)
        written = write_share(partial, share.names, share.header, share.metadata, share.bytes_of())
        for name, entry in zip(rank_files(rank), written, strict=True):
            files[name] = FileEntry(bytes=entry.bytes, crc32=entry.crc32)
    values = {
        "format": FORMAT,
        "state": SavedState(step=step, stage_index=0, stage_step=step, tokens=0, samples=0, extra={}),
        "stage": "all",
        "world_size": len(ranks),
        "zero_stage": 3,
        "precision": "fp32",
        "optimizer_steps": step,
        "parameters": {n: {"shape": shape, "trained": n not in frozen} for n, shape in parameters.items()},
        "buffers": {},
        "tied": {},
        "model_config_values": None,
        "files": files,
        "versions": {},
        **manifest,
    }
    finalize(partial, final, (MANIFEST, seal(Manifest.model_validate(values))), stale)
    return final


def whole_pieces(parameters: Mapping[str, Tensor], kinds: Sequence[str] = ("master", "exp_avg", "exp_avg_sq")) -> Any:
    """Return complete parameters as the pieces of one rank. The values of kind number n are the parameter plus n."""
    return [
        TensorPiece(f"{name}|{kind}", 0, values + number)
        for name, values in parameters.items()
        for number, kind in enumerate(kinds)
        if math.prod(values.shape)
    ]
