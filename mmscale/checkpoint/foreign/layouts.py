"""DeepSpeed's layouts, read as ranges of named parameters.

stage 0         the optimizer's state by index: the names come from the model that reads it
stages 1, 2     param_slice_mappings: which part of a rank's flat tensor belongs to whom
stage 3         param_shapes in order: rank r holds piece r of ceil(numel / W) values of each
universal       zero/NAME/*.pt; what is frozen only in *_model_states.pt

Every value stays on the disk: a ``Piece`` is a view of a mapped file, and its key has DeepSpeed's name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmscale.checkpoint.foreign.files import DeepSpeedFolder, FragmentAddress, LossScaler, load_pt
from mmscale.checkpoint.share import Piece
from mmscale.engine.partition import share
from mmscale.errors import CheckpointError

Shape = tuple[int, ...]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's: the only optimizer whose checkpoints are read."""
_KNOWN = frozenset(
    {
        *("module", "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
        *("optimizer", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
        *("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size"),
        *("checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info"),
    }
)


@dataclass(frozen=True)
class ModelStates:
    """What a ``*_model_states.pt`` says.

    Attributes:
        path: The file.
        module: Weights by name; empty placeholders at stage 3.
        groups: Shapes of the trained parameters, by optimizer group; None at stage 0.
        frozen: Shapes of frozen parameters, where the file lists them.
        fragments: Their values: whole below stage 3, this rank's share at stage 3.
        buffers: Names of persistent buffers.
        tied: Second name of a parameter -> the first.
        raw: Everything else.
    """

    path: Path
    module: dict[str, Tensor]
    groups: list[dict[str, Shape]] | None
    frozen: dict[str, Shape]
    fragments: dict[str, Tensor]
    buffers: list[str]
    tied: dict[str, str]
    raw: dict[str, Any]

    @property
    def trained(self) -> dict[str, Shape]:
        """Shapes of all trained parameters; empty at stage 0, which does not tell."""
        return {name: shape for group in self.groups or [] for name, shape in group.items()}

    @property
    def names(self) -> list[str]:
        """Every name in the file, of parameters and of buffers."""
        return list(dict.fromkeys([*self.module, *self.trained, *self.frozen, *self.tied]))

    @property
    def world_size(self) -> int:
        """Ranks that saved."""
        return int(self.raw.get("dp_world_size") or 1)


@dataclass(frozen=True)
class ForeignState:
    """A whole checkpoint; see ``ModelStates`` for the names of fields that it shares.

    Attributes:
        zero_stage: 0-3.
        steps: Steps of the optimizer, on which the bias correction of AdamW depends.
        trained: Shapes by name.
        frozen: Shapes by name.
        ranks: By rank of the checkpoint to be written, its pieces.
        repaired: Frozen parameters that ``zero/`` lacks and that were found in ``*_model_states.pt``.
        left_out: What is in the files and was not taken over, and why.
    """

    zero_stage: int
    steps: int
    trained: dict[str, Shape]
    frozen: dict[str, Shape]
    ranks: list[list[Piece]]
    repaired: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def read_model_states(path: Path) -> ModelStates:
    """Reads names and shapes; values are mapped.

    Raises:
        CheckpointError: the file is damaged or none of DeepSpeed's.
    """
    raw = load_pt(path)
    module = _entry(raw, "module", Mapping, path)
    weights = {name: values for name, values in module.items() if isinstance(values, Tensor)}
    groups = _entry(raw, "param_shapes", list | None, path)
    return ModelStates(
        path,
        weights,
        None if groups is None else [_shapes(group) for group in groups],
        _shapes(raw.get("frozen_param_shapes") or {}),
        dict(raw.get("frozen_param_fragments") or {}),
        [name for name in raw.get("buffer_names") or [] if name in weights],
        dict(raw.get("shared_params") or {}),
        {key: value for key, value in raw.items() if key != "module"},
    )


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
    states = [_entry(load_pt(file), "optimizer_state_dict", Mapping, file) for file in files]
    for file, state in zip(files, states, strict=True):
        counts = state.get("partition_count", world_size)
        if {counts} != {world_size} if isinstance(counts, int) else set(counts) != {world_size}:
            raise CheckpointError(f"{file}: groups are split in {counts} parts among {world_size} ranks; not imported")
    stage = int(states[0].get("zero_stage", 1))  # bf16's optimizer of stage 1 does not say.
    trained, steps = [], []
    reached: dict[str, int] = {}
    for rank, (file, state) in enumerate(zip(files, states, strict=True)):
        mine, step = _sharded(file, state, head, rank) if stage == 3 else _flat(file, state, head, reached)
        trained.append(mine)
        steps.append(step)
    frozen, theirs = _frozen_pieces(folder, head, world_size)
    _check_cover(folder.path, head.trained, trained)
    ranks = [mine + others for mine, others in zip(trained, theirs, strict=True)]
    dropped = _left_out(head, states[0].get("loss_scaler"))
    return ForeignState(stage, _same(steps, folder.path), head.trained, frozen, ranks, (), dropped)


def _flat(file: Path, state: Mapping[str, Any], head: ModelStates, reached: dict[str, int]) -> tuple[list[Piece], int]:
    """Stages 1 and 2: a rank's part of a parameter follows that of the rank before, which ended at ``reached``."""
    optimizer = _entry(state, "base_optimizer_state", Mapping, file)  # A list: DeepSpeed's elastic_checkpoint.
    masters = _entry(state, "single_partition_of_fp32_groups", list, file)
    mappings = _entry(state, "param_slice_mappings", list, file)
    if len(masters) != len(mappings):
        raise CheckpointError(f"{file} has {len(masters)} groups, its param_slice_mappings {len(mappings)}")
    pieces: list[Piece] = []
    for index, mapping in enumerate(mappings):
        flat = _kinds(file, optimizer, index, masters[index])
        for name in mapping:
            address = _entry(mapping, name, FragmentAddress, file)
            if name not in head.trained:
                raise CheckpointError(f"{file}: {name} is not listed in {head.path.name}")
            start = reached.get(name, 0)
            reached[name] = start + max(address.numel, 0)
            pieces.extend(_cut(file, name, flat, address.start, start, reached[name]))
    return pieces, _step_count(file, optimizer)


def _sharded(file: Path, state: Mapping[str, Any], head: ModelStates, rank: int) -> tuple[list[Piece], int]:
    """Stage 3."""
    optimizer = _entry(state, "optimizer_state_dict", Mapping, file)
    masters = _entry(state, "fp32_flat_groups", list, file)
    groups = head.groups or []
    if len(masters) != len(groups):
        raise CheckpointError(f"{file} has {len(masters)} groups, {head.path.name} lists {len(groups)}")
    pieces: list[Piece] = []
    for index, (master, shapes) in enumerate(zip(masters, groups, strict=True)):
        flat, offset = _kinds(file, optimizer, index, master), 0
        for name, shape in shapes.items():
            pieces.extend(_cut(file, name, flat, offset, *share(math.prod(shape), rank, head.world_size)))
            offset += -(-math.prod(shape) // head.world_size)
        if offset != master.numel():
            raise CheckpointError(f"{file}: group {index} has {master.numel()} values, its parameters need {offset}")
    return pieces, _step_count(file, optimizer)


def _unsharded(head: ModelStates, groups: Sequence[Sequence[str]]) -> ForeignState:
    """Stage 0: whole tensors, and in bf16 masters beside the weights."""
    optimizer = _entry(head.raw, "optimizer", Mapping, head.path)
    masters = optimizer.get("fp32_groups")
    inner = optimizer.get("optimizer_state_dict", optimizer)  # Wrapped in bf16.
    pieces: list[Piece] = []
    trained: dict[str, Shape] = {}
    for number, names in enumerate(groups):
        for place, name in enumerate(names):
            weights = head.module[name] if masters is None else masters[number][place]
            trained[name] = tuple(head.module[name].shape)
            flat = _kinds(head.path, inner, len(trained) - 1, weights)
            pieces.extend(_cut(head.path, name, flat, 0, 0, math.prod(trained[name])))
    ignored = {*trained, *head.buffers, *head.tied}
    frozen = {name: tuple(values.shape) for name, values in head.module.items() if name not in ignored}
    pieces.extend(Piece(f"{name}|frozen", 0, _flattened(head.module[name])) for name in frozen)
    _check_cover(head.path, trained, [pieces])
    return ForeignState(0, _step_count(head.path, inner), trained, frozen, [pieces], (), _left_out(head, None))


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
            pieces.extend(_cut(path / name, name, flat, start, start, stop))
        if flat["master"].numel() != math.prod(shape):
            raise CheckpointError(f"{path / name / 'fp32.pt'} has {flat['master'].numel()} values, not {list(shape)}")
    if stepped and not counts:
        counts = [_step_count(path / "optimizer_state.pt", stored.get("optimizer_state_dict", stored))]
    frozen, values = _frozen_pieces(folder, head, world_size)
    repaired = tuple(name for name in frozen if not (path / name / "fp32.pt").is_file())
    joined = [mine + theirs for mine, theirs in zip(ranks, values, strict=True)]
    dropped = _left_out(head, stored.get("loss_scaler"))
    return ForeignState(stage, _same(counts or [0], path), trained, frozen, joined, repaired, dropped)


def _frozen_pieces(
    folder: DeepSpeedFolder, head: ModelStates, world_size: int
) -> tuple[dict[str, Shape], list[list[Piece]]]:
    """Frozen parameters out of the model states: shapes, and by rank the pieces."""
    known = {*head.trained, *head.buffers, *head.tied}
    whole = {name: values for name, values in head.module.items() if name not in known and name not in head.frozen}
    whole |= {name: head.module[name] for name in head.frozen if name in head.module and head.module[name].numel()}
    split = {name: shape for name, shape in head.frozen.items() if name not in whole}
    shapes = {name: tuple(values.shape) for name, values in whole.items()} | split
    ranks: list[list[Piece]] = []
    for rank in range(world_size):
        pieces: list[Piece] = []
        for name, values in whole.items():
            start, stop = share(values.numel(), rank, world_size)
            pieces.extend(_cut(folder.path, name, {"frozen": _flattened(values)}, start, start, stop))
        ranks.append([*pieces, *_fragments(folder, head, split, rank)])
    return shapes, ranks


def _fragments(folder: DeepSpeedFolder, head: ModelStates, shapes: Mapping[str, Shape], rank: int) -> Iterator[Piece]:
    """This rank's share of frozen parameters at stage 3."""
    if not shapes:
        return
    file = folder.model_states.get(rank)
    fragments = {} if file is None else (head if rank == 0 else read_model_states(file)).fragments
    missing = [name for name in shapes if name not in fragments]
    if missing:
        where = f"the model states of rank {rank}" if file is None else file.name
        raise CheckpointError(
            f"{folder.path} does not hold the frozen parameters {', '.join(missing)}: {where} should and does not"
            f"{', and the universal format leaves them out' if folder.universal else ''}; save again without "
            "exclude_frozen_parameters and keep every rank's *_model_states.pt"
        )
    for name, shape in shapes.items():
        flat = {"frozen": _flattened(fragments[name])}
        yield from _cut(file or folder.path, name, flat, 0, *share(math.prod(shape), rank, head.world_size))


def _one(path: Path) -> Tensor:
    stored = load_pt(path) if path.is_file() else None
    values = stored.get("param") if isinstance(stored, Mapping) else stored
    if not isinstance(values, Tensor):
        raise CheckpointError(f"{path} is missing or holds no tensor; convert the checkpoint again")
    return _flattened(values)


def _kinds(file: Path, optimizer: Mapping[str, Any], index: int, master: Tensor) -> dict[str, Tensor]:
    """Flat masters and moments of one entry of the optimizer; zero moments before its first step."""
    states = _entry(optimizer, "state", Mapping, file)
    if not isinstance(master, Tensor):
        raise CheckpointError(f"{file}: the weights of optimizer entry {index} are no tensor")
    if not states:
        return {"master": _flattened(master)} | {key: _zeros(_flattened(master)) for key in MOMENTS}
    state = states.get(index, {})
    absent = [key for key in MOMENTS if not isinstance(state.get(key), Tensor)]
    if absent:
        raise CheckpointError(
            f"{file}: entry {index} of the optimizer has {sorted(map(str, state))}, not {', '.join(absent)}; "
            "only the state of Adam and AdamW is imported"
        )
    return {"master": _flattened(master)} | {key: _flattened(state[key]) for key in MOMENTS}


def _zeros(like: Tensor) -> Tensor:
    """Zeros that take no memory: pages of a ``calloc`` that nobody writes."""
    return torch.from_numpy(np.zeros(like.numel(), np.float32))


def _step_count(file: Path, optimizer: Mapping[str, Any]) -> int:
    """Steps of an optimizer by its ``state_dict``: from its states, or from its groups where it counts there."""
    states = _entry(optimizer, "state", Mapping, file).values()
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
    found: dict[str, int] = {}
    for piece in itertools.chain.from_iterable(ranks):
        found[piece.key] = found.get(piece.key, 0) + piece.values.numel()
    for name, shape in shapes.items():
        for key in (f"{name}|{kind}" for kind in ("master", *MOMENTS)):
            if (numel := found.get(key, 0)) != math.prod(shape):
                raise CheckpointError(f"{path}: the ranks hold {numel} of the {math.prod(shape)} values of {key}")


def _left_out(head: ModelStates, scaler: object) -> dict[str, str]:
    """What the files hold and our format or this import does not take."""
    raw = head.raw
    found = {"optimizer settings": "learning rates, betas and decay come from the stage's configuration"}
    for key in ("lr_scheduler", "data_sampler", "random_ltd"):
        if raw.get(key) is not None:
            found[key] = "schedules and data are functions of the step here; the object's state was dropped"
    if isinstance(scaler, LossScaler) and vars(scaler).get("cur_scale", 1) != 1:
        found["loss_scaler"] = f"scale {vars(scaler)['cur_scale']}: fp16 loss scaling is not resumed"
    if raw.get("skipped_steps"):
        found["skipped_steps"] = f"{raw['skipped_steps']} of the steps were skipped; the count was dropped"
    found |= {str(key): "client state of the saver" for key in raw if key not in _KNOWN}
    return found


def _cut(file: Path, name: str, flat: Mapping[str, Tensor], offset: int, start: int, stop: int) -> Iterator[Piece]:
    """Values ``start:stop`` of a parameter, whose first is at ``offset`` of each flat tensor, as pieces."""
    end = offset + stop - start
    for kind, values in flat.items() if start < stop else ():
        if offset < 0 or end > values.numel():
            raise CheckpointError(f"{file}: {name}|{kind} should lie at {offset}:{end} of {values.numel()}")
        yield Piece(f"{name}|{kind}", start, values[offset:end])


def _flattened(values: Tensor) -> Tensor:
    """``(n,)``; a view, unless the tensor was saved transposed."""
    return values.detach().reshape(-1)


def _shapes(group: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(int(size) for size in shape) for name, shape in group.items()}


def _entry(state: Any, key: str, kind: Any, path: Path) -> Any:
    """``state[key]``, which must be a ``kind``.

    Raises:
        CheckpointError: it is not there.
    """
    if not isinstance(state, Mapping) or key not in state or not isinstance(state[key], kind):
        raise CheckpointError(f"{path}: {key!r} is missing or of another kind: not a layout of DeepSpeed known here")
    return state[key]
