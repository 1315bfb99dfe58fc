"""Import a DeepSpeed checkpoint.

    DeepSpeed's files --mapped--> names, ranges --renamed, checked--> step-N.partial --verified--> step-N

The import writes one rank for each rank that saved, or a single rank at stage 0 and for the universal format of stages
1 and 2. It copies one tensor at a time from the mapped source, so memory holds one tensor. DeepSpeed's files have no
data position and no random state. The new checkpoint has no data position and the random state of a fresh generator,
and the report lists both.

DeepSpeed's converters ``zero_to_fp32`` and ``ds_to_universal`` are not used. Both call
``torch.load(weights_only=False)``, so a file can run code. ``zero_to_fp32`` returns weights without moments and step
counts, and reads neither stage 0 nor the universal format. ``ds_to_universal`` omits frozen parameters of stage 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmscale.checkpoint.imports.files import DeepSpeedFolder, find_folder
from mmscale.checkpoint.imports.layouts import ImportedState, ModelStates, read_model_states, read_state
from mmscale.checkpoint.imports.write import IMPORTED, PRECISIONS, first, new_share, write_checkpoint
from mmscale.checkpoint.manifest import FORMAT, Manifest
from mmscale.checkpoint.save import model_config_values, persistent_buffers, tied_names
from mmscale.checkpoint.share import RankShare, TensorPiece
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.optim.schedule import freeze, parameter_groups
from mmscale.optim.stages import StageConfig

_PREFIXES = ("module.model.", "module.", "model.", "")


@dataclass(frozen=True)
class ImportTarget:
    """The run that will resume from the imported checkpoint.

    Attributes:
        model: Model with ``components()``, best on the meta device. The import changes its ``requires_grad`` flags.
        stages: Stages of the run. The import chooses the stage that trains the parameters that the checkpoint trained.
    """

    model: nn.Module
    stages: Sequence[StageConfig]


@dataclass(frozen=True)
class ImportReport:
    """Result of ``import_checkpoint``.

    Attributes:
        checkpoint: Folder that was written.
        source: Folder that was read.
        layout: ``zero-N`` or ``universal-N``, where N is the ZeRO stage that saved.
        deepspeed: Version of DeepSpeed that saved.
        world_size: Number of ranks in the written checkpoint. Any number of ranks can resume from it.
        step: Step of the run.
        stage: Name of the stage.
        stage_step: Steps within the stage: DeepSpeed's ``global_steps``.
        optimizer_steps: AdamW's step count.
        trained: Number of trained parameters; master and both moments of each were imported.
        frozen: Number of frozen parameters.
        buffers: Number of buffers.
        tied: Further name of a tied parameter -> its first name.
        renamed: Name prefix in the source -> prefix in the written checkpoint.
        repaired: Frozen parameters that the universal format omits, read from the model states.
        not_taken_over: State that was not imported -> the consequence.
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
    target: ImportTarget | None = None,
    *,
    renames: Mapping[str, str] | None = None,
    stage: str | None = None,
) -> ImportReport:
    """Write ``directory/step-N`` from a DeepSpeed checkpoint, in one process.

    Args:
        source: Folder of one DeepSpeed checkpoint, of any ZeRO stage or in the universal format.
        directory: ``checkpoints`` folder of a run.
        target: Run whose model and stages the checkpoint must match. Required for stage 0, whose optimizer state has no
            names. None imports weights and moments without comparing them with a model. A run can then load only the
            weights (warm start), because the stage is unknown.
        renames: Name prefix in the source -> new prefix. Every name must match a prefix, and every prefix a name; the
            longest match applies. None strips the prefixes that DeepSpeed and mmscale's engine add to every name.
        stage: Name of the stage in ``target``. Required if several of its stages train the same parameters.

    Raises:
        CheckpointError: the source is damaged, incomplete, of another model, or not a DeepSpeed checkpoint; or
            ``renames`` or ``stage`` do not fit it; or ``step-N`` already exists or cannot be written.
    """
    folder = find_folder(source)
    try:
        return _import(folder, directory, target, renames, stage)
    # A value in a pickle may have any type, such as an integer in place of a list.
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder.path}: not a known DeepSpeed layout: {error!r:.200}") from error


def _import(
    folder: DeepSpeedFolder,
    directory: Path,
    target: ImportTarget | None,
    renames: Mapping[str, str] | None,
    stage: str | None,
) -> ImportReport:
    head = read_model_states(folder.model_states[min(folder.model_states)])
    rules, table = _rename_table(head.names, renames)
    chosen: int | None = None
    groups: list[list[str]] | None = None
    if target is not None:
        head = _with_ties(head, target.model, table)
        chosen, groups = _choose_stage(target, head, table, stage)
    elif head.groups is None:
        raise CheckpointError(
            f"{folder.path} is of ZeRO stage 0, which stores the optimizer state without parameter names; give the "
            "run's configuration (--config), whose model and stages provide the names"
        )
    state = read_state(folder, head, groups)
    if target is not None:
        _check_names(folder, state, head, table, target.model)
    manifest = _manifest(state, head, table, target, chosen)
    path = write_checkpoint(directory, manifest, _rank_shares(state, head, table))
    return _report(path, folder, state, manifest, rules, table)


def _rename_table(names: Sequence[str], renames: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the prefix rules that apply, and the table of old name -> new name.

    Raises:
        CheckpointError: a name matches no rule, a rule applies to no name, or two names become equal.
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
    if unused := [old for old in rules if old not in used]:
        raise CheckpointError(f"the renames of {unused} apply to no name; the names are {first(list(names))}")
    if len(set(table.values())) != len(table):
        twice = sorted(new for new in set(table.values()) if list(table.values()).count(new) > 1)
        raise CheckpointError(f"after renaming, several parameters have the name {first(twice)}; the rules are {rules}")
    return rules, table


def _with_ties(head: ModelStates, model: nn.Module, table: Mapping[str, str]) -> ModelStates:
    """Return ``head`` with tied names. At stage 0, whose files do not list them, they come from the model."""
    if head.groups is not None:
        return head
    source_names = {new: old for old, new in table.items()}
    ties = {second: owner for second, owner in tied_names(model).items() if {second, owner} <= set(source_names)}
    return replace(head, tied={source_names[second]: source_names[owner] for second, owner in ties.items()})


def _choose_stage(
    target: ImportTarget, head: ModelStates, table: Mapping[str, str], wanted: str | None
) -> tuple[int, list[list[str]]]:
    """Choose the stage that trains exactly the parameters that the checkpoint trained, and freeze the model for it.

    Returns:
        Index of the stage, and the names in the source by optimizer group.

    Raises:
        CheckpointError: no stage does, several do and ``wanted`` is None, or no stage has the name ``wanted``.
    """
    names = [stage.name for stage in target.stages]
    if wanted is not None and wanted not in names:
        raise CheckpointError(f"the configuration has no stage {wanted!r}; it has {names}")
    fitting = []
    for index, stage in enumerate(target.stages):
        if wanted in (None, stage.name) and (groups := _groups(target.model, stage, head, table)) is not None:
            fitting.append((index, groups))
    if len(fitting) == 1:
        index, groups = fitting[0]
        freeze(target.model, target.model.components(), target.stages[index])  # type: ignore[operator]
        return index, groups
    if fitting:
        raise CheckpointError(
            f"the stages {[names[index] for index, _ in fitting]} train the same parameters; name one with --stage"
        )
    here = set(parameter_table(target.model))
    unknown = sorted({table[name] for name in head.trained} - here)
    if unknown:
        raise CheckpointError(f"{head.path}: the model has no {first(unknown)}; rename the source's parameters")
    if head.groups is None:
        raise CheckpointError(
            f"{head.path}: the sizes or shapes of its optimizer groups match none of the stages {names}"
        )
    raise CheckpointError(
        f"{head.path} trained {first(sorted(table[n] for n in head.trained))}; none of the stages {names} does"
    )


def _groups(
    model: nn.Module, stage: StageConfig, head: ModelStates, table: Mapping[str, str]
) -> list[list[str]] | None:
    """Return the source's names by optimizer group if ``stage`` trains what the checkpoint trained; else None.

    Changes the ``requires_grad`` flags of ``model``.
    """
    components = model.components()  # type: ignore[operator]
    freeze(model, components, stage)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [
        [name_of[id(parameter)] for parameter in group["params"]]
        for group in parameter_groups(model, components, stage)
    ]
    source_names = {new: old for old, new in table.items()}
    if not all(name in source_names for group in named for name in group):
        return None
    groups = [[source_names[name] for name in group] for group in named]
    if head.groups is not None:
        return groups if {name for group in groups for name in group} == set(head.trained) else None
    return groups if _fits(head, groups) else None


def _fits(head: ModelStates, groups: list[list[str]]) -> bool:
    """Whether the optimizer state of stage 0 has groups of these sizes, with moments of these shapes."""
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
    folder: DeepSpeedFolder, state: ImportedState, head: ModelStates, table: Mapping[str, str], model: nn.Module
) -> None:
    """Compare names, shapes, ties and buffers of checkpoint and model.

    Raises:
        CheckpointError: they differ, or the checkpoint lacks frozen parameters.
    """
    here = {name: (tuple(entry["shape"]), entry["trained"]) for name, entry in parameter_table(model).items()}
    there = {table[name]: shape for name, shape in (state.trained | state.frozen).items()}
    missing = sorted(set(here) - set(there))
    if missing and not any(here[name][1] for name in missing):
        raise CheckpointError(
            f"{folder.path} does not hold the frozen parameters {', '.join(missing)}: it was saved with "
            "exclude_frozen_parameters, or they were removed later; save again with them"
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
    state: ImportedState, head: ModelStates, table: Mapping[str, str], target: ImportTarget | None, chosen: int | None
) -> Manifest:
    """Return the manifest with empty ``files``."""
    steps = int(head.raw.get("global_steps") or 0)
    index, before, name = 0, 0, IMPORTED
    if target is not None and chosen is not None:
        planned = target.stages[chosen]
        if steps > planned.steps:
            raise CheckpointError(
                f"{head.path} was saved after {steps} steps; stage {planned.name} has only {planned.steps}"
            )
        index, name = chosen, planned.name
        before = sum(stage.steps for stage in target.stages[:chosen])
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
            "model_config_values": None if target is None else model_config_values(target.model),
            "files": {},
            "versions": {"torch": torch.__version__, "deepspeed": str(head.raw.get("ds_version"))},
        }
    )


def _rank_shares(state: ImportedState, head: ModelStates, table: Mapping[str, str]) -> Iterator[RankShare]:
    """Yield the share of each rank of the new checkpoint, under the new names."""
    for rank, found in enumerate(state.ranks):
        pieces = []
        for piece in found:
            name, _, kind = piece.key.rpartition("|")
            pieces.append(piece._replace(key=f"{table[name]}|{kind}"))
        if rank == 0:
            pieces.extend(
                TensorPiece(f"{table[name]}|buffer", 0, head.module[name], whole=True) for name in head.buffers
            )
        yield new_share(rank, pieces, head.path.parent)


def _report(
    path: Path,
    folder: DeepSpeedFolder,
    state: ImportedState,
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
            f"unknown without --config: the stage is called {IMPORTED!r}, and a run can load only weights (warm start)"
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
