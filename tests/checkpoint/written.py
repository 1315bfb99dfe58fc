"""Checkpoints written by hand: any ranges on any number of ranks, without an engine."""

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
from mmscale.checkpoint.share import Piece, RankShare
from mmscale.io.files import complete, write_share


def write_checkpoint(
    folder: Path,
    ranks: Sequence[Sequence[Piece]],
    parameters: Mapping[str, tuple[int, ...]],
    *,
    step: int = 3,
    frozen: Sequence[str] = (),
    loaders: Sequence[str | None] | None = None,
    doomed: Sequence[Path] = (),
    random_state: Mapping[str, str] | None = None,
    **manifest: Any,
) -> Path:
    """Writes ``folder/step-N`` as the ranks of a run do.

    Args:
        folder: The ``checkpoints`` folder.
        ranks: The tensors of each rank.
        parameters: Shape of each parameter.
        step: Of the run and of the stage.
        frozen: Parameters that the stage does not train.
        loaders: The loader's state of each rank.
        doomed: Older checkpoints to remove.
        random_state: Of each rank, beside that of the processor's generator.
        manifest: Further or other fields of the manifest.
    """
    final = folder / folder_name(step)
    partial = folder / (final.name + ".partial")
    partial.mkdir(parents=True)
    files = {}
    for rank, pieces in enumerate(ranks):
        loader = None if loaders is None else loaders[rank]
        generator = {"cpu": bytes(torch.get_rng_state().tolist()).hex(), **(random_state or {})}
        share = RankShare.of(rank, [*pieces], loader, generator)
        written = write_share(partial, share.names, share.header, share.notes, share.bytes_of())
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
    complete(partial, final, (MANIFEST, seal(Manifest.model_validate(values))), doomed)
    return final


def whole_pieces(parameters: Mapping[str, Tensor], kinds: Sequence[str] = ("master", "exp_avg", "exp_avg_sq")) -> Any:
    """One rank's tensors, which hold all of every parameter in each kind: the parameter plus the kind's number."""
    return [
        Piece(f"{name}|{kind}", 0, values + number)
        for name, values in parameters.items()
        for number, kind in enumerate(kinds)
        if math.prod(values.shape)
    ]
