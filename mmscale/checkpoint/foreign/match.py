"""Whose is what: names of a foreign checkpoint against the model and the stages of the run that is to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mmscale.checkpoint.foreign.files import DeepSpeedFolder
from mmscale.checkpoint.foreign.states import ForeignState, ModelStates
from mmscale.checkpoint.save import persistent_buffers, tied_names
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.optim.schedule import freeze, parameter_groups
from mmscale.optim.stages import StageConfig

_PREFIXES = ("module.model.", "module.", "model.", "")
_SHOWN = 10


@dataclass(frozen=True)
class Recipient:
    """The run that is to go on from the checkpoint.

    Attributes:
        model: With ``components()``; on the meta device it costs nothing. Its ``requires_grad`` flags are set.
        stages: The run's stages; the one that trains what the checkpoint trained is taken.
    """

    model: nn.Module
    stages: Sequence[StageConfig]


def rename_table(names: Sequence[str], renames: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
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


def with_ties(head: ModelStates, model: nn.Module, table: Mapping[str, str]) -> ModelStates:
    """Stage 0 does not say what is tied; the model does."""
    if head.groups is not None:
        return head
    foreign = {new: old for old, new in table.items()}
    ties = {
        foreign[second]: foreign[first]
        for second, first in tied_names(model).items()
        if {second, first} <= set(foreign)
    }
    return replace(head, tied=ties)


def choose_stage(
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


def check_names(
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
    tied = {table[second]: table[first] for second, first in head.tied.items()}
    if tied != tied_names(model):
        wrong.append(f"tied parameters are {tied} in the checkpoint, {tied_names(model)} in the model")
    buffers = {table[name] for name in head.buffers}
    wrong += [f"the buffer {name} is not in both" for name in sorted(buffers ^ set(persistent_buffers(model)))]
    if wrong:
        raise CheckpointError(f"{folder.path} is of another model: {first(wrong, '; ')}")


def first(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of ``names`` and how many more there are."""
    more = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
