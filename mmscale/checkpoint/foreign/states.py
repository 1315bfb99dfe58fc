"""What DeepSpeed's layouts have in common: the model states, and frozen parameters, which lie only there.

Every value stays where it is on the disk; a ``Piece`` is a view of a mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmscale.checkpoint.foreign.files import DeepSpeedFolder, LossScaler, load_pt
from mmscale.engine.partition import share
from mmscale.errors import CheckpointError

Shape = tuple[int, ...]
_KNOWN = frozenset(
    {
        *("module", "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
        *("optimizer", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
        *("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size"),
        *("checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info"),
    }
)


@dataclass(frozen=True)
class Piece:
    """A range of one kind of value of one parameter.

    Attributes:
        name: The parameter, as DeepSpeed called it.
        kind: ``master``, ``exp_avg``, ``exp_avg_sq`` or ``frozen``.
        start: First value, in the flattened parameter.
        values: ``(n,)``.
    """

    name: str
    kind: str
    start: int
    values: Tensor


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
    module = entry(raw, "module", Mapping, path)
    weights = {name: values for name, values in module.items() if isinstance(values, Tensor)}
    groups = entry(raw, "param_shapes", list | None, path)
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


def frozen_pieces(
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
        pieces = []
        for name, values in whole.items():
            start, stop = share(values.numel(), rank, world_size)
            if start < stop:
                pieces.append(Piece(name, "frozen", start, flattened(values)[start:stop]))
        pieces.extend(_fragments(folder, head, split, rank))
        ranks.append(pieces)
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
        start, stop = share(math.prod(shape), rank, head.world_size)
        if start < stop:
            yield from (
                Piece(name, "frozen", start, piece.values)
                for piece in cut(file or folder.path, name, {"frozen": flattened(fragments[name])}, 0, stop - start)
            )


def left_out(head: ModelStates, scaler: object) -> dict[str, str]:
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


def cut(file: Path, name: str, flat: Mapping[str, Tensor], start: int, numel: int) -> Iterator[Piece]:
    """A range of each kind of a rank's flat tensors, as pieces that start at 0 of the parameter."""
    for kind, values in flat.items():
        if start < 0 or start + numel > values.numel():
            raise CheckpointError(f"{file}: {name}|{kind} should lie at {start}:{start + numel} of {values.numel()}")
        yield Piece(name, kind, 0, values[start : start + numel])


def flattened(values: Tensor) -> Tensor:
    """``(n,)``; a view, unless the tensor was saved transposed."""
    return values.detach().reshape(-1)


def _shapes(group: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(int(size) for size in shape) for name, shape in group.items()}


def entry(state: Any, key: str, kind: Any, path: Path) -> Any:
    """``state[key]``, which must be a ``kind``.

    Raises:
        CheckpointError: it is not there.
    """
    if not isinstance(state, Mapping) or key not in state or not isinstance(state[key], kind):
        raise CheckpointError(f"{path}: {key!r} is missing or of another kind: not a layout of DeepSpeed known here")
    return state[key]
