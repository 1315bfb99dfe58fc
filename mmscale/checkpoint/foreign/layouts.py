"""DeepSpeed's layouts, read as ranges of named parameters.

stage 0         the optimizer's state by index: the names come from the model that reads it
stages 1, 2     param_slice_mappings: which part of a rank's flat tensor belongs to whom
stage 3         param_shapes in order: rank r holds piece r of ceil(numel / W) values of each
universal       zero/NAME/*.pt; what is frozen only in *_model_states.pt
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmscale.checkpoint.foreign.files import DeepSpeedFolder, FragmentAddress, load_pt
from mmscale.checkpoint.foreign.states import (
    ForeignState,
    ModelStates,
    Piece,
    Shape,
    cut,
    entry,
    flattened,
    frozen_pieces,
    left_out,
)
from mmscale.engine.partition import share
from mmscale.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's: the only optimizer whose checkpoints are read."""


def read_state(folder: DeepSpeedFolder, head: ModelStates, groups: Sequence[Sequence[str]] | None) -> ForeignState:
    """Reads where every value lies.

    Args:
        folder: The checkpoint.
        head: Its first ``*_model_states.pt``.
        groups: For stage 0: names of the parameters of each optimizer group, in the optimizer's order.

    Raises:
        CheckpointError: values are missing, do not add up to their parameters, or are of another optimizer than AdamW.
    """
    if folder.universal:
        return _universal(folder, head)
    if head.groups is None:
        return _unsharded(head, groups or [])
    world_size = head.world_size
    if set(folder.optim_states) != set(range(world_size)):
        raise CheckpointError(
            f"{folder.path} has *_optim_states.pt of the ranks {sorted(folder.optim_states)}; {world_size} ranks saved"
        )
    files = [folder.optim_states[rank] for rank in range(world_size)]
    states = [entry(load_pt(file), "optimizer_state_dict", Mapping, file) for file in files]
    for file, state in zip(files, states, strict=True):
        counts = state.get("partition_count", world_size)
        if {counts} != {world_size} if isinstance(counts, int) else set(counts) != {world_size}:
            raise CheckpointError(f"{file}: groups are split in {counts} parts among {world_size} ranks; not imported")
    stage = int(states[0].get("zero_stage", 1))  # bf16's optimizer of stage 1 does not say.
    read = _sharded if stage == 3 else _flat
    pieces, steps = [], []
    for rank, (file, state) in enumerate(zip(files, states, strict=True)):
        mine, step = read(file, state, head, rank)
        pieces.append(mine)
        steps.append(step)
    placed = list(_placed(pieces)) if stage < 3 else pieces
    frozen, values = frozen_pieces(folder, head, world_size)
    _check_cover(folder.path, head.trained, placed)
    ranks = [mine + theirs for mine, theirs in zip(placed, values, strict=True)]
    return ForeignState(
        stage, _same(steps, folder.path), head.trained, frozen, ranks, (), left_out(head, states[0].get("loss_scaler"))
    )


def _flat(file: Path, state: Mapping[str, Any], head: ModelStates, rank: int) -> tuple[list[Piece], int]:
    """Stages 1 and 2. Where a piece starts in its parameter is known only from the ranks before: ``_placed``."""
    del rank
    optimizer = entry(state, "base_optimizer_state", Mapping, file)  # A list: DeepSpeed's elastic_checkpoint.
    masters = entry(state, "single_partition_of_fp32_groups", list, file)
    mappings = entry(state, "param_slice_mappings", list, file)
    if len(masters) != len(mappings):
        raise CheckpointError(f"{file} has {len(masters)} groups, its param_slice_mappings {len(mappings)}")
    pieces: list[Piece] = []
    for index, mapping in enumerate(mappings):
        flat = _kinds(file, optimizer, index, masters[index])
        for name in mapping:
            address = entry(mapping, name, FragmentAddress, file)
            if name not in head.trained:
                raise CheckpointError(f"{file}: {name} is not listed in {head.path.name}")
            if address.numel:
                pieces.extend(cut(file, name, flat, address.start, address.numel))
    return pieces, step_count(file, optimizer)


def _placed(ranks: Iterable[list[Piece]]) -> Iterator[list[Piece]]:
    """Each rank's pieces follow those of the rank before."""
    reached: dict[tuple[str, str], int] = {}
    for pieces in ranks:
        placed = []
        for piece in pieces:
            start = reached.get((piece.name, piece.kind), 0)
            reached[piece.name, piece.kind] = start + piece.values.numel()
            placed.append(Piece(piece.name, piece.kind, start, piece.values))
        yield placed


def _sharded(file: Path, state: Mapping[str, Any], head: ModelStates, rank: int) -> tuple[list[Piece], int]:
    """Stage 3."""
    optimizer = entry(state, "optimizer_state_dict", Mapping, file)
    masters = entry(state, "fp32_flat_groups", list, file)
    groups = head.groups or []
    if len(masters) != len(groups):
        raise CheckpointError(f"{file} has {len(masters)} groups, {head.path.name} lists {len(groups)}")
    pieces: list[Piece] = []
    for index, (master, shapes) in enumerate(zip(masters, groups, strict=True)):
        flat, offset = _kinds(file, optimizer, index, master), 0
        for name, shape in shapes.items():
            start, stop = share(math.prod(shape), rank, head.world_size)
            if start < stop:
                found = cut(file, name, flat, offset, stop - start)
                pieces.extend(Piece(name, piece.kind, start, piece.values) for piece in found)
            offset += -(-math.prod(shape) // head.world_size)
        if offset != master.numel():
            raise CheckpointError(f"{file}: group {index} has {master.numel()} values, its parameters need {offset}")
    return pieces, step_count(file, optimizer)


def _unsharded(head: ModelStates, groups: Sequence[Sequence[str]]) -> ForeignState:
    """Stage 0: whole tensors, and in bf16 masters beside the weights."""
    optimizer = entry(head.raw, "optimizer", Mapping, head.path)
    masters = optimizer.get("fp32_groups")
    inner = optimizer.get("optimizer_state_dict", optimizer)  # Wrapped in bf16.
    pieces: list[Piece] = []
    trained: dict[str, Shape] = {}
    for number, names in enumerate(groups):
        for place, name in enumerate(names):
            weights = head.module[name] if masters is None else masters[number][place]
            trained[name] = tuple(head.module[name].shape)
            flat = _kinds(head.path, inner, len(trained) - 1, weights)
            pieces.extend(cut(head.path, name, flat, 0, math.prod(trained[name])))
    ignored = {*trained, *head.buffers, *head.tied}
    frozen = {name: tuple(values.shape) for name, values in head.module.items() if name not in ignored}
    pieces.extend(Piece(name, "frozen", 0, flattened(head.module[name])) for name in frozen)
    _check_cover(head.path, trained, [pieces])
    return ForeignState(0, step_count(head.path, inner), trained, frozen, [pieces], (), left_out(head, None))


def _universal(folder: DeepSpeedFolder, head: ModelStates) -> ForeignState:
    path = folder.path / "zero"
    trained = head.trained
    missing = [name for name in trained if not (path / name / "fp32.pt").is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks trained parameters: {', '.join(missing)}; convert the checkpoint again")
    stored = load_pt(path / "optimizer_state.pt")
    stage = int(stored.get("zero_stage", 1))
    world_size = head.world_size if stage == 3 else 1
    stepped = any((path / name / "exp_avg.pt").is_file() for name in trained)
    ranks: list[list[Piece]] = [[] for _ in range(world_size)]
    counts = []
    for name, shape in trained.items():
        flat = {"master": _one(path / name / "fp32.pt")}
        flat |= {key: _one(path / name / f"{key}.pt") if stepped else _zeros(flat["master"]) for key in MOMENTS}
        if (step := path / name / "step.pt").is_file():
            counts.append(int(load_pt(step)))
        for rank, pieces in enumerate(ranks):
            start, stop = share(math.prod(shape), rank, world_size)
            if start < stop:
                found = cut(path / name, name, flat, start, stop - start)
                pieces.extend(Piece(name, piece.kind, start, piece.values) for piece in found)
        if flat["master"].numel() != math.prod(shape):
            raise CheckpointError(f"{path / name / 'fp32.pt'} has {flat['master'].numel()} values, not {list(shape)}")
    if stepped and not counts:
        counts = [step_count(path / "optimizer_state.pt", stored.get("optimizer_state_dict", stored))]
    frozen, values = frozen_pieces(folder, head, world_size)
    repaired = tuple(name for name in frozen if not (path / name / "fp32.pt").is_file())
    joined = [mine + theirs for mine, theirs in zip(ranks, values, strict=True)]
    dropped = left_out(head, stored.get("loss_scaler"))
    return ForeignState(stage, _same(counts or [0], path), trained, frozen, joined, repaired, dropped)


def _one(path: Path) -> Tensor:
    stored = load_pt(path) if path.is_file() else None
    values = stored.get("param") if isinstance(stored, Mapping) else stored
    if not isinstance(values, Tensor):
        raise CheckpointError(f"{path} is missing or holds no tensor; convert the checkpoint again")
    return flattened(values)


def _kinds(file: Path, optimizer: Mapping[str, Any], index: int, master: Tensor) -> dict[str, Tensor]:
    """Flat masters and moments of one entry of the optimizer; zero moments before its first step."""
    states = entry(optimizer, "state", Mapping, file)
    if not isinstance(master, Tensor):
        raise CheckpointError(f"{file}: the weights of optimizer entry {index} are no tensor")
    if not states:
        return {"master": flattened(master)} | {key: _zeros(flattened(master)) for key in MOMENTS}
    state = states.get(index, {})
    absent = [key for key in MOMENTS if not isinstance(state.get(key), Tensor)]
    if absent:
        raise CheckpointError(
            f"{file}: entry {index} of the optimizer has {sorted(map(str, state))}, not {', '.join(absent)}; "
            "only the state of Adam and AdamW is imported"
        )
    return {"master": flattened(master)} | {key: flattened(state[key]) for key in MOMENTS}


def _zeros(like: Tensor) -> Tensor:
    """Zeros that take no memory: pages of a ``calloc`` that nobody writes."""
    return torch.from_numpy(np.zeros(like.numel(), np.float32))


def step_count(file: Path, optimizer: Mapping[str, Any]) -> int:
    """Steps of an optimizer by its ``state_dict``: from its states, or from its groups where it counts there."""
    states = entry(optimizer, "state", Mapping, file).values()
    counts = [int(state["step"]) for state in states if "step" in state]
    counts = counts or [int(group["step"]) for group in optimizer.get("param_groups", []) if "step" in group]
    if states and not counts:
        raise CheckpointError(f"{file}: the optimizer does not say how many steps it took")
    return _same(counts or [0], file)


def _same(counts: Sequence[int], path: Path) -> int:
    if len(set(counts)) > 1:
        raise CheckpointError(f"{path}: parameters took {sorted(set(counts))} steps; they must be equal to be resumed")
    return counts[0]


def _check_cover(path: Path, shapes: Mapping[str, Shape], ranks: Iterable[list[Piece]]) -> None:
    found: dict[tuple[str, str], int] = {}
    for pieces in ranks:
        for piece in pieces:
            found[piece.name, piece.kind] = found.get((piece.name, piece.kind), 0) + piece.values.numel()
    for name, shape in shapes.items():
        for kind in ("master", *MOMENTS):
            if (numel := found.get((name, kind), 0)) != math.prod(shape):
                raise CheckpointError(
                    f"{path}: the ranks hold {numel} of the {math.prod(shape)} values of {name}|{kind}"
                )
