"""Checkpoints of DeepSpeed, turned into ours.

    DeepSpeed's files --mapped--> names, ranges --renamed, checked--> step-N.partial --verified--> step-N

One file is written for each rank that saved (one for all at stage 0 and for the universal format of stages 1 and 2),
tensor by tensor from the mapped source, so no more than one tensor is in memory. What such files cannot tell (the
position in the data, random state) stays unset, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mmscale.checkpoint.foreign.files import DeepSpeedFolder, find_folder
from mmscale.checkpoint.foreign.layouts import read_state
from mmscale.checkpoint.foreign.match import Recipient, check_names, choose_stage, rename_table, with_ties
from mmscale.checkpoint.foreign.states import ForeignState, ModelStates, read_model_states
from mmscale.checkpoint.foreign.write import IMPORTED, PRECISIONS, new_share, write_checkpoint
from mmscale.checkpoint.manifest import FORMAT, Manifest
from mmscale.checkpoint.save import model_config_values
from mmscale.checkpoint.share import Piece, RankShare
from mmscale.errors import CheckpointError


@dataclass(frozen=True)
class ImportReport:
    """What ``import_checkpoint`` did.

    Attributes:
        checkpoint: Folder that was written.
        source: Folder that was read.
        layout: ``zero-N`` or ``universal-N``, N the ZeRO stage that saved.
        deepspeed: Version of DeepSpeed that saved.
        world_size: Ranks that the checkpoint is written for; any number may resume.
        step: Of the run.
        stage: Its name.
        stage_step: Steps within the stage, DeepSpeed's ``global_steps``.
        optimizer_steps: AdamW's step count.
        trained: Number of trained parameters, with masters and both moments.
        frozen: Number of frozen parameters.
        buffers: Number of buffers.
        tied: Second name -> first name.
        renamed: Prefix in the source -> prefix here.
        repaired: Frozen parameters that the universal format lacks, taken from the model states.
        not_taken_over: What was left behind or is not in such files, and what happens instead.
        checked_against_model: Whether names, shapes and ties were compared with a model.
    """

    checkpoint: str
    source: str
    layout: str
    deepspeed: str
    world_size: int
    step: int
    stage: str
    stage_step: int
    optimizer_steps: int
    trained: int
    frozen: int
    buffers: int
    tied: dict[str, str]
    renamed: dict[str, str]
    repaired: tuple[str, ...]
    not_taken_over: dict[str, str]
    checked_against_model: bool


def import_checkpoint(
    source: Path,
    directory: Path,
    recipient: Recipient | None = None,
    *,
    renames: Mapping[str, str] | None = None,
    stage: str | None = None,
) -> ImportReport:
    """Writes ``directory/step-N`` from a DeepSpeed checkpoint.

    Args:
        source: Folder of one DeepSpeed checkpoint, of any ZeRO stage or in the universal format.
        directory: ``checkpoints`` folder of a run.
        recipient: Whom to check names, shapes and stage against; needed for stage 0, whose optimizer has no names.
        renames: Prefix in the source -> prefix here; every name must match one, the longest counts. None strips what
            DeepSpeed and our engine put in front of every name.
        stage: Name of the recipient's stage, where its stages do not differ in what they train.

    Raises:
        CheckpointError: the source is damaged, not whole, of another model, or not DeepSpeed's.
    """
    folder = find_folder(source)
    try:
        return _import(folder, directory, recipient, renames, stage)
    # Any value of the pickles may have any type: an integer where a list is expected, a tensor where a shape is.
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder.path}: not a layout of DeepSpeed known here: {error!r:.200}") from error


def _import(
    folder: DeepSpeedFolder,
    directory: Path,
    recipient: Recipient | None,
    renames: Mapping[str, str] | None,
    stage: str | None,
) -> ImportReport:
    head = read_model_states(folder.model_states[min(folder.model_states)])
    rules, table = rename_table(head.names, renames)
    chosen: int | None = None
    groups: list[list[str]] | None = None
    if recipient is not None:
        head = with_ties(head, recipient.model, table)
        chosen, groups = choose_stage(recipient, head, table, stage)
    elif head.groups is None:
        raise CheckpointError(
            f"{folder.path} is of ZeRO stage 0, which stores the optimizer's state without names; give the run's "
            "configuration (--config), whose model and stages tell whose it is"
        )
    state = read_state(folder, head, groups)
    if recipient is not None:
        check_names(folder, state, head, table, recipient.model)
    manifest = _manifest(state, head, table, recipient, chosen)
    path = write_checkpoint(directory, manifest, _shares(state, head, table))
    return _report(path, folder, state, manifest, rules, table)


def _manifest(
    state: ForeignState, head: ModelStates, table: Mapping[str, str], recipient: Recipient | None, chosen: int | None
) -> Manifest:
    """The manifest without its list of files."""
    steps = int(head.raw.get("global_steps") or 0)
    index, before, name = 0, 0, IMPORTED
    if recipient is not None and chosen is not None:
        planned = recipient.stages[chosen]
        if steps > planned.steps:
            raise CheckpointError(f"{head.path} is after {steps} steps; stage {planned.name} has {planned.steps}")
        index, name = chosen, planned.name
        before = sum(stage.steps for stage in recipient.stages[:chosen])
    parameters = {
        table[name]: {"shape": list(shape), "trained": trained}
        for shapes, trained in ((state.trained, True), (state.frozen, False))
        for name, shape in shapes.items()
    }
    weights = (head.module[name].dtype for name in (*state.trained, *state.frozen) if name in head.module)
    return Manifest.model_validate(
        {
            "format": FORMAT,
            "state": {
                "step": before + steps,
                "stage_index": index,
                "stage_step": steps,
                "tokens": 0,
                "samples": 0,
                "extra": {"imported": str(head.path.parent)},
            },
            "stage": name,
            "world_size": len(state.ranks),
            "zero_stage": state.zero_stage,
            "precision": PRECISIONS.get(next(weights, torch.float32), "fp32"),
            "optimizer_steps": state.steps,
            "parameters": parameters,
            "buffers": {table[name]: tuple(head.module[name].shape) for name in head.buffers},
            "tied": {table[second]: table[first] for second, first in head.tied.items()},
            "model_config_values": None if recipient is None else model_config_values(recipient.model),
            "files": {},
            "versions": {"torch": torch.__version__, "deepspeed": str(head.raw.get("ds_version"))},
        }
    )


def _shares(state: ForeignState, head: ModelStates, table: Mapping[str, str]) -> Iterator[RankShare]:
    """One for each rank that saved."""
    for rank, found in enumerate(state.ranks):
        pieces = [Piece(f"{table[piece.name]}|{piece.kind}", piece.start, piece.values) for piece in found]
        if rank == 0:
            pieces.extend(Piece(f"{table[name]}|buffer", 0, head.module[name], whole=True) for name in head.buffers)
        yield new_share(rank, pieces, head.path.parent)


def _report(
    path: Path,
    folder: DeepSpeedFolder,
    state: ForeignState,
    manifest: Manifest,
    rules: dict[str, str],
    table: Mapping[str, str],
) -> ImportReport:
    left = {
        "position in the data": "not in such files: the loader starts at its first sample",
        "random state": "not in such files: generators start as in a new run",
        "counts of tokens and samples": "not in such files: they start at 0",
        **state.left_out,
    }
    checked = manifest.stage != IMPORTED
    if not checked:
        left["stage and model configuration"] = (
            f"unknown without --config: the stage is called {IMPORTED!r}, and only weights can be taken (warm start)"
        )
    return ImportReport(
        checkpoint=str(path),
        source=str(folder.path),
        layout=f"{'universal' if folder.universal else 'zero'}-{state.zero_stage}",
        deepspeed=manifest.versions["deepspeed"],
        world_size=manifest.world_size,
        step=manifest.state.step,
        stage=manifest.stage,
        stage_step=manifest.state.stage_step,
        optimizer_steps=state.steps,
        trained=len(state.trained),
        frozen=len(state.frozen),
        buffers=len(manifest.buffers),
        tied=manifest.tied,
        renamed=rules,
        repaired=tuple(table[name] for name in state.repaired),
        not_taken_over=left,
        checked_against_model=checked,
    )
