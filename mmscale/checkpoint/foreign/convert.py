"""Checkpoints of DeepSpeed, turned into ours.

    DeepSpeed's files --mapped--> names, ranges --renamed, checked--> step-N.partial --verified--> step-N

One file is written for each rank that saved (one for all at stage 0 and for the universal format of stages 1 and 2),
tensor by tensor from the mapped source, so no more than one tensor is in memory. What such files cannot tell (the
position in the data, random state) stays unset, and the report says so.

DeepSpeed's own converters are not used. Both call ``torch.load(weights_only=False)``, so a file can run code.
``zero_to_fp32`` returns weights without moments and step counts, and reads neither stage 0 nor the universal format.
``ds_to_universal`` omits frozen parameters of stage 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmscale.checkpoint.foreign.files import DeepSpeedFolder, find_folder
from mmscale.checkpoint.foreign.layouts import ForeignState, ModelStates, read_model_states, read_state
from mmscale.checkpoint.foreign.write import IMPORTED, PRECISIONS, first, new_share, write_checkpoint
from mmscale.checkpoint.manifest import FORMAT, Manifest
from mmscale.checkpoint.save import model_config_values, persistent_buffers, tied_names
from mmscale.checkpoint.share import Piece, RankShare
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.optim.schedule import freeze, parameter_groups
from mmscale.optim.stages import StageConfig

_PREFIXES = ("module.model.", "module.", "model.", "")


@dataclass(frozen=True)
class Recipient:
    """The run that is to go on from the checkpoint.

    Attributes:
        model: With ``components()``; on the meta device it costs nothing. Its ``requires_grad`` flags are set.
        stages: The run's stages; the one that trains what the checkpoint trained is taken.
    """

    model: nn.Module
    stages: Sequence[StageConfig]


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
    rules, table = _rename_table(head.names, renames)
    chosen: int | None = None
    groups: list[list[str]] | None = None
    if recipient is not None:
        head = _with_ties(head, recipient.model, table)
        chosen, groups = _choose_stage(recipient, head, table, stage)
    elif head.groups is None:
        raise CheckpointError(
            f"{folder.path} is of ZeRO stage 0, which stores the optimizer's state without names; give the run's "
            "configuration (--config), whose model and stages tell whose it is"
        )
    state = read_state(folder, head, groups)
    if recipient is not None:
        _check_names(folder, state, head, table, recipient.model)
    manifest = _manifest(state, head, table, recipient, chosen)
    path = write_checkpoint(directory, manifest, _shares(state, head, table))
    return _report(path, folder, state, manifest, rules, table)


def _rename_table(names: Sequence[str], renames: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """The rules in force and, of every name, the name here.

    Raises:
        CheckpointError: a name matches no rule, a rule matches no name, or two names become one.
    """
    rules = dict(renames or {next(p for p in _PREFIXES if all(name.startswith(p) for name in names)): ""})
    table: dict[str, str] = {}
    unmatched, used = [], set()
    for name in names:
        fitting = [old for old in rules if name.startswith(old)]
        if not fitting:
            unmatched.append(name)
            continue
        old = max(fitting, key=len)
        used.add(old)
        table[name] = rules[old] + name[len(old) :]
    if unmatched:
        raise CheckpointError(f"no rename matches {first(unmatched)}; the rules are {rules}")
    if idle := [old for old in rules if old not in used]:
        raise CheckpointError(f"the renames of {idle} match no name; there are {first(list(names))}")
    if len(set(table.values())) != len(table):
        twice = sorted(new for new in set(table.values()) if list(table.values()).count(new) > 1)
        raise CheckpointError(f"after renaming, several parameters are called {first(twice)}; the rules are {rules}")
    return rules, table


def _with_ties(head: ModelStates, model: nn.Module, table: Mapping[str, str]) -> ModelStates:
    """Stage 0 does not say what is tied; the model does."""
    if head.groups is not None:
        return head
    foreign = {new: old for old, new in table.items()}
    ties = {second: owner for second, owner in tied_names(model).items() if {second, owner} <= set(foreign)}
    return replace(head, tied={foreign[second]: foreign[owner] for second, owner in ties.items()})


def _choose_stage(
    recipient: Recipient, head: ModelStates, table: Mapping[str, str], wanted: str | None
) -> tuple[int, list[list[str]]]:
    """The stage that trains what the checkpoint trained.

    Returns:
        Its index, and the names in the source by optimizer group.

    Raises:
        CheckpointError: none does, or several do and none of them is ``wanted``.
    """
    names = [stage.name for stage in recipient.stages]
    if wanted is not None and wanted not in names:
        raise CheckpointError(f"the configuration has no stage {wanted!r}; it has {names}")
    fitting = []
    for index, stage in enumerate(recipient.stages):
        if wanted in (None, stage.name) and (groups := _groups(recipient.model, stage, head, table)) is not None:
            fitting.append((index, groups))
    if len(fitting) == 1:
        index, groups = fitting[0]
        freeze(recipient.model, recipient.model.components(), recipient.stages[index])  # type: ignore[operator]
        return index, groups
    if fitting:
        raise CheckpointError(
            f"the stages {[names[index] for index, _ in fitting]} train the same parameters; name one with --stage"
        )
    here = set(parameter_table(recipient.model))
    unknown = sorted({table[name] for name in head.trained} - here)
    if unknown:
        raise CheckpointError(f"{head.path}: the model has no {first(unknown)}; rename the source's parameters")
    if head.groups is None:
        raise CheckpointError(f"{head.path}: its optimizer's groups fit none of the stages {names} (numbers or shapes)")
    raise CheckpointError(f"{head.path} trained {first(sorted(table[n] for n in head.trained))}; none of {names} does")


def _groups(
    model: nn.Module, stage: StageConfig, head: ModelStates, table: Mapping[str, str]
) -> list[list[str]] | None:
    """Names in the source, by optimizer group, if ``stage`` trains what the checkpoint trained; else None."""
    components = model.components()  # type: ignore[operator]
    freeze(model, components, stage)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [
        [name_of[id(parameter)] for parameter in group["params"]]
        for group in parameter_groups(model, components, stage)
    ]
    foreign = {new: old for old, new in table.items()}
    if not all(name in foreign for group in named for name in group):
        return None
    groups = [[foreign[name] for name in group] for group in named]
    if head.groups is not None:
        return groups if {name for group in groups for name in group} == set(head.trained) else None
    return groups if _fits(head, groups) else None


def _fits(head: ModelStates, groups: list[list[str]]) -> bool:
    """Whether stage 0's optimizer state has these groups, with moments of these shapes."""
    optimizer: Any = head.raw.get("optimizer") or {}
    optimizer = optimizer.get("optimizer_state_dict", optimizer)
    if [len(group["params"]) for group in optimizer.get("param_groups", [])] != [len(names) for names in groups]:
        return False
    flat = [name for names in groups for name in names]
    states = optimizer.get("state", {})
    return all(
        not states or states.get(index, {}).get("exp_avg", torch.empty(0)).shape == head.module[name].shape
        for index, name in enumerate(flat)
    )


def _check_names(
    folder: DeepSpeedFolder, state: ForeignState, head: ModelStates, table: Mapping[str, str], model: nn.Module
) -> None:
    """Compares names, shapes, ties and buffers.

    Raises:
        CheckpointError: they differ, or frozen parameters were not saved.
    """
    here = {name: (tuple(entry["shape"]), entry["trained"]) for name, entry in parameter_table(model).items()}
    there = {table[name]: shape for name, shape in (state.trained | state.frozen).items()}
    missing = sorted(set(here) - set(there))
    if missing and not any(here[name][1] for name in missing):
        raise CheckpointError(
            f"{folder.path} does not hold the frozen parameters {', '.join(missing)}: it was saved with "
            "exclude_frozen_parameters or they were dropped since; save again with them"
        )
    wrong = [f"{name} is only in the model" for name in missing]
    wrong += [f"{name} is only in the checkpoint" for name in sorted(set(there) - set(here))]
    wrong += [
        f"{name} is {list(there[name])} in the checkpoint, {list(here[name][0])} in the model"
        for name in sorted(set(here) & set(there))
        if here[name][0] != there[name]
    ]
    tied = {table[second]: table[owner] for second, owner in head.tied.items()}
    if tied != tied_names(model):
        wrong.append(f"tied parameters are {tied} in the checkpoint, {tied_names(model)} in the model")
    buffers = {table[name] for name in head.buffers}
    wrong += [f"the buffer {name} is not in both" for name in sorted(buffers ^ set(persistent_buffers(model)))]
    if wrong:
        raise CheckpointError(f"{folder.path} is of another model: {first(wrong, '; ')}")


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
            "tied": {table[second]: table[owner] for second, owner in head.tied.items()},
            "model_config_values": None if recipient is None else model_config_values(recipient.model),
            "files": {},
            "versions": {"torch": torch.__version__, "deepspeed": str(head.raw.get("ds_version"))},
        }
    )


def _shares(state: ForeignState, head: ModelStates, table: Mapping[str, str]) -> Iterator[RankShare]:
    """One for each rank that saved."""
    for rank, found in enumerate(state.ranks):
        pieces = []
        for piece in found:
            name, _, kind = piece.key.rpartition("|")
            pieces.append(piece._replace(key=f"{table[name]}|{kind}"))
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
