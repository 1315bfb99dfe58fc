"""Read the layouts of DeepSpeed checkpoints as ranges of named parameters.

stage 0         optimizer state by index; the importing model gives the names
stages 1, 2     param_slice_mappings: the part of a rank's flat tensor that belongs to each parameter
stage 3         param_shapes in order: rank r holds part r, of ceil(numel / W) values, of each parameter
universal       zero/NAME/*.pt; frozen parameters only in *_model_states.pt

The values of contiguous tensors stay on disk: a ``TensorPiece`` is a view of a memory-mapped file, and its key has
DeepSpeed's name. A tensor that is not contiguous is copied. Moments are zeros before the first optimizer step.
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

from mmscale.checkpoint.imports.files import DeepSpeedFolder, FragmentAddress, LossScaler, load_pt
from mmscale.checkpoint.share import TensorPiece
from mmscale.engine.partition import shard_range
from mmscale.errors import CheckpointError

Shape = tuple[int, ...]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The moments of Adam and AdamW, the only optimizers whose state is imported."""
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
    """The contents of a ``*_model_states.pt`` file.

    Attributes:
        path: The file.
        module: Weights and buffers by name; empty placeholders for parameters at stage 3.
        groups: Shapes of the trained parameters, by optimizer group; None at stage 0.
        frozen: Shapes of frozen parameters, if the file lists them.
        fragments: Values of those frozen parameters: complete below stage 3, this rank's share at stage 3.
        buffers: Names of persistent buffers.
        tied: Further name of a tied parameter -> its first name.
        raw: The file's dictionary without ``module``.
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
        """Shapes of all trained parameters; empty at stage 0, whose file does not list them."""
        return {name: shape for group in self.groups or [] for name, shape in group.items()}

    @property
    def names(self) -> list[str]:
        """All names of parameters and buffers in the file, without duplicates."""
        return list(dict.fromkeys([*self.module, *self.trained, *self.frozen, *self.tied]))

    @property
    def world_size(self) -> int:
        """Number of ranks that saved the checkpoint."""
        return int(self.raw.get("dp_world_size") or 1)


@dataclass(frozen=True)
class ImportedState:
    """The complete state of a DeepSpeed checkpoint.

    Attributes:
        zero_stage: ZeRO stage that saved, 0-3.
        steps: Step count of the optimizer, which the bias correction of AdamW needs.
        trained: Shapes of the trained parameters, by name.
        frozen: Shapes of the frozen parameters, by name.
        ranks: Pieces by rank of the checkpoint to be written.
        repaired: Names of frozen parameters that are missing in ``zero/`` and were read from ``*_model_states.pt``.
        left_out: Name of each state in the files that is not imported -> the reason.
    """

    zero_stage: int
    steps: int
    trained: dict[str, Shape]
    frozen: dict[str, Shape]
    ranks: list[list[TensorPiece]]
    repaired: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def read_model_states(path: Path) -> ModelStates:
    """Read a ``*_model_states.pt`` file. Its values are memory-mapped.

    Raises:
        CheckpointError: the file is damaged or was not written by DeepSpeed.
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


def read_state(folder: DeepSpeedFolder, head: ModelStates, groups: Sequence[Sequence[str]] | None) -> ImportedState:
    """Locate all values of a checkpoint.

    Args:
        folder: The checkpoint.
        head: Its first ``*_model_states.pt`` file.
        groups: Only for stage 0: parameter names of each optimizer group, in the optimizer's order.

    Raises:
        CheckpointError: values are missing, their number differs from the parameter shapes, or the optimizer is neither
            Adam nor AdamW.
    """
    if folder.universal:
        return _read_universal(folder, head)
    if head.groups is None:
        return _read_stage_0(head, groups or [])
    world_size = head.world_size
    if set(folder.optim_states) != set(range(world_size)):
        raise CheckpointError(
            f"{folder.path} has *_optim_states.pt of the ranks {sorted(folder.optim_states)}, "
            f"expected those of all {world_size} ranks that saved"
        )
    files = [folder.optim_states[rank] for rank in range(world_size)]
    states = [_entry(load_pt(file), "optimizer_state_dict", Mapping, file) for file in files]
    for file, state in zip(files, states, strict=True):
        counts = state.get("partition_count", world_size)
        if {counts} != {world_size} if isinstance(counts, int) else set(counts) != {world_size}:
            raise CheckpointError(
                f"{file}: its optimizer groups are split into {counts} parts for {world_size} ranks, which cannot be "
                "imported; expected one part for each rank"
            )
    stage = int(states[0].get("zero_stage", 1))  # The bf16 optimizer of stage 1 does not store its stage.
    trained, steps = [], []
    next_start: dict[str, int] = {}
    for rank, (file, state) in enumerate(zip(files, states, strict=True)):
        mine, step = (
            _read_stage_3(file, state, head, rank) if stage == 3 else _read_stage_1_2(file, state, head, next_start)
        )
        trained.append(mine)
        steps.append(step)
    frozen, theirs = _frozen_pieces(folder, head, world_size)
    _check_cover(folder.path, head.trained, trained)
    ranks = [mine + others for mine, others in zip(trained, theirs, strict=True)]
    dropped = _dropped_state(head, states[0].get("loss_scaler"))
    return ImportedState(stage, _common_count(steps, folder.path), head.trained, frozen, ranks, (), dropped)


def _read_stage_1_2(
    file: Path, state: Mapping[str, Any], head: ModelStates, next_start: dict[str, int]
) -> tuple[list[TensorPiece], int]:
    """Read one rank of stage 1 or 2. Call it for the ranks in order.

    Args:
        file: Path for messages.
        state: The file's ``optimizer_state_dict``.
        head: Names and shapes.
        next_start: End of the values of each parameter that the lower ranks hold; mutated.

    Returns:
        Pieces of the rank, and the optimizer's step count.
    """
    optimizer = _entry(
        state, "base_optimizer_state", Mapping, file
    )  # It is a list with DeepSpeed's elastic_checkpoint.
    masters = _entry(state, "single_partition_of_fp32_groups", list, file)
    mappings = _entry(state, "param_slice_mappings", list, file)
    if len(masters) != len(mappings):
        raise CheckpointError(f"{file} has {len(masters)} groups, its param_slice_mappings {len(mappings)}")
    pieces: list[TensorPiece] = []
    for index, mapping in enumerate(mappings):
        flat = _flat_state(file, optimizer, index, masters[index])
        for name in mapping:
            address = _entry(mapping, name, FragmentAddress, file)
            if name not in head.trained:
                raise CheckpointError(f"{file}: {name} is not listed in {head.path.name}")
            start = next_start.get(name, 0)
            next_start[name] = start + max(address.numel, 0)
            pieces.extend(_slice_pieces(file, name, flat, address.start, start, next_start[name]))
    return pieces, _step_count(file, optimizer)


def _read_stage_3(file: Path, state: Mapping[str, Any], head: ModelStates, rank: int) -> tuple[list[TensorPiece], int]:
    """Read one rank of stage 3: its pieces, and the optimizer's step count."""
    optimizer = _entry(state, "optimizer_state_dict", Mapping, file)
    masters = _entry(state, "fp32_flat_groups", list, file)
    groups = head.groups or []
    if len(masters) != len(groups):
        raise CheckpointError(f"{file} has {len(masters)} groups, {head.path.name} lists {len(groups)}")
    pieces: list[TensorPiece] = []
    for index, (master, shapes) in enumerate(zip(masters, groups, strict=True)):
        flat, offset = _flat_state(file, optimizer, index, master), 0
        for name, shape in shapes.items():
            pieces.extend(
                _slice_pieces(file, name, flat, offset, *shard_range(math.prod(shape), rank, head.world_size))
            )
            offset += -(-math.prod(shape) // head.world_size)
        if offset != master.numel():
            raise CheckpointError(f"{file}: group {index} has {master.numel()} values, its parameters need {offset}")
    return pieces, _step_count(file, optimizer)


def _read_stage_0(head: ModelStates, groups: Sequence[Sequence[str]]) -> ImportedState:
    """Read a checkpoint of stage 0: unsharded tensors. A bf16 run stores its masters separately, as ``fp32_groups``."""
    optimizer = _entry(head.raw, "optimizer", Mapping, head.path)
    masters = optimizer.get("fp32_groups")
    inner = optimizer.get("optimizer_state_dict", optimizer)  # The bf16 optimizer wraps the state.
    pieces: list[TensorPiece] = []
    trained: dict[str, Shape] = {}
    for number, names in enumerate(groups):
        for position, name in enumerate(names):
            weights = head.module[name] if masters is None else masters[number][position]
            trained[name] = tuple(head.module[name].shape)
            flat = _flat_state(head.path, inner, len(trained) - 1, weights)
            pieces.extend(_slice_pieces(head.path, name, flat, 0, 0, math.prod(trained[name])))
    ignored = {*trained, *head.buffers, *head.tied}
    frozen = {name: tuple(values.shape) for name, values in head.module.items() if name not in ignored}
    pieces.extend(TensorPiece(f"{name}|frozen", 0, _flattened(head.module[name])) for name in frozen)
    _check_cover(head.path, trained, [pieces])
    return ImportedState(0, _step_count(head.path, inner), trained, frozen, [pieces], (), _dropped_state(head, None))


def _read_universal(folder: DeepSpeedFolder, head: ModelStates) -> ImportedState:
    path = folder.path / "zero"
    trained = head.trained
    missing = [name for name in trained if not (path / name / "fp32.pt").is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks trained parameters: {', '.join(missing)}; convert the checkpoint again")
    stored = load_pt(path / "optimizer_state.pt")
    stage = int(stored.get("zero_stage", 1))
    world_size = head.world_size if stage == 3 else 1
    stepped = any((path / name / "exp_avg.pt").is_file() for name in trained)
    ranks: list[list[TensorPiece]] = [[] for _ in range(world_size)]
    counts = []
    for name, shape in trained.items():
        flat = {"master": _read_flat(path / name / "fp32.pt")}
        flat |= {key: _read_flat(path / name / f"{key}.pt") if stepped else _zeros(flat["master"]) for key in MOMENTS}
        if (step := path / name / "step.pt").is_file():
            counts.append(int(load_pt(step)))
        for rank, pieces in enumerate(ranks):
            start, stop = shard_range(math.prod(shape), rank, world_size)
            pieces.extend(_slice_pieces(path / name, name, flat, start, start, stop))
        if flat["master"].numel() != math.prod(shape):
            raise CheckpointError(f"{path / name / 'fp32.pt'} has {flat['master'].numel()} values, not {list(shape)}")
    if stepped and not counts:
        counts = [_step_count(path / "optimizer_state.pt", stored.get("optimizer_state_dict", stored))]
    frozen, values = _frozen_pieces(folder, head, world_size)
    repaired = tuple(name for name in frozen if not (path / name / "fp32.pt").is_file())
    joined = [mine + theirs for mine, theirs in zip(ranks, values, strict=True)]
    dropped = _dropped_state(head, stored.get("loss_scaler"))
    return ImportedState(stage, _common_count(counts or [0], path), trained, frozen, joined, repaired, dropped)


def _frozen_pieces(
    folder: DeepSpeedFolder, head: ModelStates, world_size: int
) -> tuple[dict[str, Shape], list[list[TensorPiece]]]:
    """Read the frozen parameters from the model states: their shapes, and their pieces by rank."""
    known = {*head.trained, *head.buffers, *head.tied}
    whole = {name: values for name, values in head.module.items() if name not in known and name not in head.frozen}
    whole |= {name: head.module[name] for name in head.frozen if name in head.module and head.module[name].numel()}
    split = {name: shape for name, shape in head.frozen.items() if name not in whole}
    shapes = {name: tuple(values.shape) for name, values in whole.items()} | split
    ranks: list[list[TensorPiece]] = []
    for rank in range(world_size):
        pieces: list[TensorPiece] = []
        for name, values in whole.items():
            start, stop = shard_range(values.numel(), rank, world_size)
            pieces.extend(_slice_pieces(folder.path, name, {"frozen": _flattened(values)}, start, start, stop))
        ranks.append([*pieces, *_fragments(folder, head, split, rank)])
    return shapes, ranks


def _fragments(
    folder: DeepSpeedFolder, head: ModelStates, shapes: Mapping[str, Shape], rank: int
) -> Iterator[TensorPiece]:
    """Yield this rank's share of the frozen parameters at stage 3."""
    if not shapes:
        return
    file = folder.model_states.get(rank)
    fragments = {} if file is None else (head if rank == 0 else read_model_states(file)).fragments
    missing = [name for name in shapes if name not in fragments]
    if missing:
        where = f"the model states of rank {rank}" if file is None else file.name
        raise CheckpointError(
            f"{folder.path} does not hold the frozen parameters {', '.join(missing)}, expected in {where}"
            f"{' because the universal format omits them' if folder.universal else ''}; save again without "
            "exclude_frozen_parameters and keep every rank's *_model_states.pt"
        )
    for name, shape in shapes.items():
        flat = {"frozen": _flattened(fragments[name])}
        yield from _slice_pieces(
            file or folder.path, name, flat, 0, *shard_range(math.prod(shape), rank, head.world_size)
        )


def _read_flat(path: Path) -> Tensor:
    stored = load_pt(path) if path.is_file() else None
    values = stored.get("param") if isinstance(stored, Mapping) else stored
    if not isinstance(values, Tensor):
        raise CheckpointError(f"{path} is missing or holds no tensor; convert the checkpoint again")
    return _flattened(values)


def _flat_state(file: Path, optimizer: Mapping[str, Any], index: int, master: Tensor) -> dict[str, Tensor]:
    """Return the flat master and moments of one optimizer entry; the moments are zeros before the first step."""
    states = _entry(optimizer, "state", Mapping, file)
    if not isinstance(master, Tensor):
        raise CheckpointError(f"{file}: the weights of optimizer entry {index} are not a tensor")
    if not states:
        return {"master": _flattened(master)} | {key: _zeros(_flattened(master)) for key in MOMENTS}
    state = states.get(index, {})
    absent = [key for key in MOMENTS if not isinstance(state.get(key), Tensor)]
    if absent:
        raise CheckpointError(
            f"{file}: entry {index} of the optimizer has {sorted(map(str, state))} but lacks {', '.join(absent)}; "
            "only the state of Adam and AdamW is imported"
        )
    return {"master": _flattened(master)} | {key: _flattened(state[key]) for key in MOMENTS}


def _zeros(like: Tensor) -> Tensor:
    """Return float32 zeros that use no physical memory: NumPy allocates them with ``calloc``."""
    return torch.from_numpy(np.zeros(like.numel(), np.float32))


def _step_count(file: Path, optimizer: Mapping[str, Any]) -> int:
    """Return the step count in an optimizer's ``state_dict``: from its states, else from its groups; 0 if empty."""
    states = _entry(optimizer, "state", Mapping, file).values()
    counts = [int(state["step"]) for state in states if "step" in state]
    counts = counts or [int(group["step"]) for group in optimizer.get("param_groups", []) if "step" in group]
    if states and not counts:
        raise CheckpointError(f"{file}: the optimizer state has no step count")
    return _common_count(counts or [0], file)


def _common_count(counts: Sequence[int], path: Path) -> int:
    if len(set(counts)) > 1:
        raise CheckpointError(f"{path}: parameters have the step counts {sorted(set(counts))}, expected a single count")
    return counts[0]


def _check_cover(path: Path, shapes: Mapping[str, Shape], ranks: Iterable[list[TensorPiece]]) -> None:
    found: dict[str, int] = {}
    for piece in itertools.chain.from_iterable(ranks):
        found[piece.key] = found.get(piece.key, 0) + piece.values.numel()
    for name, shape in shapes.items():
        for key in (f"{name}|{kind}" for kind in ("master", *MOMENTS)):
            if (numel := found.get(key, 0)) != math.prod(shape):
                raise CheckpointError(f"{path}: the ranks hold {numel} of the {math.prod(shape)} values of {key}")


def _dropped_state(head: ModelStates, scaler: object) -> dict[str, str]:
    """Return the state in the files that is not imported, with the reasons."""
    raw = head.raw
    found = {"optimizer settings": "learning rates, betas and decay come from the stage's configuration"}
    for key in ("lr_scheduler", "data_sampler", "random_ltd"):
        if raw.get(key) is not None:
            found[key] = "mmscale computes schedules and data from the step; the saved object's state was dropped"
    if isinstance(scaler, LossScaler) and vars(scaler).get("cur_scale", 1) != 1:
        found["loss_scaler"] = f"scale {vars(scaler)['cur_scale']}: fp16 loss scaling is not resumed"
    if raw.get("skipped_steps"):
        found["skipped_steps"] = f"{raw['skipped_steps']} of the steps were skipped; the count was dropped"
    found |= {str(key): "client state of the program that saved" for key in raw if key not in _KNOWN}
    return found


def _slice_pieces(
    file: Path, name: str, flat: Mapping[str, Tensor], offset: int, start: int, stop: int
) -> Iterator[TensorPiece]:
    """Yield the values ``start:stop`` of a parameter as one piece per kind.

    Args:
        file: Path for messages.
        name: Name of the parameter.
        flat: Flat tensors by kind.
        offset: Index of the value ``start`` in each flat tensor.
        start: First value, in the flattened parameter.
        stop: End of the values. Yields nothing if it equals ``start``.

    Raises:
        CheckpointError: a flat tensor is too short.
    """
    end = offset + stop - start
    for kind, values in flat.items() if start < stop else ():
        if offset < 0 or end > values.numel():
            raise CheckpointError(
                f"{file}: {name}|{kind} needs the values {offset}:{end}, the tensor has {values.numel()}"
            )
        yield TensorPiece(f"{name}|{kind}", start, values[offset:end])


def _flattened(values: Tensor) -> Tensor:
    """Return the values as ``(n,)``: a view of a contiguous tensor, else a copy."""
    return values.detach().reshape(-1)


def _shapes(group: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(int(size) for size in shape) for name, shape in group.items()}


def _entry(state: Any, key: str, kind: Any, path: Path) -> Any:
    """Return ``state[key]``.

    Raises:
        CheckpointError: the key is missing, or its value is not of type ``kind``.
    """
    if not isinstance(state, Mapping) or key not in state or not isinstance(state[key], kind):
        raise CheckpointError(f"{path}: {key!r} is missing or has another type: not a known DeepSpeed layout")
    return state[key]
