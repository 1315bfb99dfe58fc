"""Files that DeepSpeed pickled, opened without trust.

    global_step40/   mp_rank_00_model_states.pt                      weights, buffers, names (stages 0-2)
                     [bf16_]zero_pp_rank_R_mp_rank_00_*_states.pt    the share of rank R
                     zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt     the universal format

A ``.pt`` file is a zip of a pickle and raw storages. The pickle may name only what is listed here, and what is not
torch's is replaced by inert classes of ours, so no code of DeepSpeed runs. Storages are mapped, not read: a tensor
takes memory when its values are touched, and none can be larger than the file.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import Any

import torch

from data_pipeline.untrusted import open_regular
from mmscale.errors import CheckpointError
from mmscale.hf.read import require_no_folder


class ZeroStage(int):
    """Stands for ``ZeroStageEnum``."""


class LossScaler:
    """Stands for fp16's loss scalers; holds whatever attributes they had."""


@dataclass(frozen=True)
class FragmentAddress:
    """Where a rank's part of a parameter lies in its flat tensor."""

    numel: int
    start: int


_STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": LossScaler,
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
}
_NUMBERS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# Fewer than torch itself allows: ``bytearray(10**12)``, say, would be legal there.
_ALLOWED = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",  # Tensors with attributes, as stage 3 leaves them.
        *(f"torch.{name}" for name in _NUMBERS),
        *(f"torch.{name}Storage" for name in _STORAGES),
        *_STAND_INS,
    }
)
_DAMAGE = (
    RuntimeError,
    UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)


def load_pt(path: Path) -> Any:
    """What ``torch.save`` wrote, with tensors that are mapped from the file.

    Raises:
        CheckpointError: the file is missing, damaged or compressed, or names a class that is not on the list.
    """
    named = _named_classes(path)
    refused = sorted(named - _ALLOWED)
    if refused:
        raise CheckpointError(
            f"{path} pickles {', '.join(refused)}, which may run code when it is read; only tensors and "
            "DeepSpeed's own records are imported: save again without it (often it is in client_state or a scheduler)"
        )
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGE as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    _refuse_inflated(path, loaded)
    return loaded


def _refuse_inflated(path: Path, value: Any) -> None:
    """A tensor of stride 0 may claim any size; a copy of it would take the memory that it claims."""
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: a tensor of shape {list(value.shape)} claims more values than it stores")
    elif isinstance(value, Mapping | list | tuple) and not isinstance(value, torch.Size):
        for part in value.values() if isinstance(value, Mapping) else value:
            _refuse_inflated(path, part)


def _named_classes(path: Path) -> set[str]:
    """Classes and functions that the pickle would call, read off it without running it."""
    try:
        open_regular(path).close()
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            for entry in archive.infolist():
                stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
                if not stored or entry.header_offset + entry.file_size > size:
                    raise CheckpointError(f"{path}: {entry.filename} is compressed or cut; torch.save writes neither")
            (pickled,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            text = archive.read(pickled)
        found = set()
        for opcode, argument, _ in genops(text):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise CheckpointError(f"{path} uses the pickle operation {opcode.name}; torch.save writes none")
            if opcode.name == "GLOBAL":
                found.add(str(argument).replace(" ", "."))
    except (zipfile.BadZipFile, OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} is no file that torch.save wrote, or it is damaged: {error}") from error
    return found


@dataclass(frozen=True)
class DeepSpeedFolder:
    """A checkpoint of DeepSpeed.

    Attributes:
        path: Folder of one step.
        model_states: Files by rank; rank 0 alone below stage 3.
        optim_states: Files by rank; none at stage 0 and in the universal format.
        universal: Whether it is the universal format.
    """

    path: Path
    model_states: dict[int, Path]
    optim_states: dict[int, Path]
    universal: bool


_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")


def find_folder(source: Path) -> DeepSpeedFolder:
    """The checkpoint in ``source``, or in the only folder of ``source`` that holds one.

    Raises:
        CheckpointError: there is none, there are several, or it was cut by tensor or pipeline parallelism.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    found = [path for path in (source, *sorted(source.iterdir())) if path.is_dir() and _states(path)]
    if len(found) != 1 and source not in found:
        require_no_folder(source, "add --from hf")
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{source}: give the folder of one DeepSpeed checkpoint (with *_states.pt files in it); found: {names}"
        )
    path = found[0]
    layers = sorted(file.name for file in path.glob("layer_*.pt"))
    if layers:
        raise CheckpointError(f"{path} has {layers[0]}: pipeline and DeepSpeed-MoE checkpoints are not imported")
    files: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for match in _states(path):
        if int(match[2]):
            raise CheckpointError(f"{path / match[0]}: tensor-parallel checkpoints (mp_rank > 0) are not imported")
        files[match[3]][int(match[1] or 0)] = path / match[0]
    if not files["model"]:
        raise CheckpointError(f"{path} has no *_model_states.pt: the names and shapes of the parameters are in it")
    return DeepSpeedFolder(path, files["model"], files["optim"], (path / "zero").is_dir())


def _states(path: Path) -> list[re.Match[str]]:
    return [match for file in sorted(path.iterdir()) if (match := _FILE.fullmatch(file.name))]
