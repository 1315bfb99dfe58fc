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
from pickletools import genops, markobject
from typing import Any

import torch

from data_pipeline.io.untrusted import open_regular
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
# What ``torch.save`` writes, which pickles with protocol 2.
_OPERATIONS = frozenset(
    {
        *("PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "GLOBAL", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"),
        *("EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE"),
        *("NEWOBJ", "BINPERSID", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"),
    }
)
_MOST_PICKLE_BYTES = 1 << 28
_MOST_OPERATIONS = 5_000_000
"""Of a pickle, and values that it holds; about 100 for each tensor; 15 seconds in all."""
_MOST_DEPTH = 100
_DAMAGE = (
    *(RuntimeError, UnpicklingError, OSError, EOFError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError),
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
        raise CheckpointError(f"{path} cannot be read: {_cause(error)}") from error
    _measure(path, loaded, 1, {})
    return loaded


def _cause(error: Exception) -> str:
    """Return one line. torch puts advice around the cause, such as to read the file with trust."""
    text = str(error)
    text = text.partition("WeightsUnpickler error: ")[2] or text
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _measure(path: Path, value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values and of levels in ``value``, where a shared container counts at every place.

    Args:
        path: Names the file in messages.
        value: A part of what was loaded.
        depth: Levels down to it, itself included.
        known: Results so far, by ``id``.

    Raises:
        CheckpointError: too many of either, as in a container that contains itself, or an inflated tensor.
    """
    if id(value) not in known and depth <= _MOST_DEPTH:
        parts: list[Any] = []
        if isinstance(value, torch.Tensor):
            # A tensor of stride 0 may claim any size; a copy of it would take the memory that it claims.
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                shape = list(value.shape)
                raise CheckpointError(f"{path}: a tensor of shape {shape} claims more values than it stores")
        elif isinstance(value, Mapping):
            parts = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            parts = list(value)
        elif isinstance(value, LossScaler | FragmentAddress):
            parts = list(vars(value).values())
        measures = [_measure(path, part, depth + 1, known) for part in parts]
        known[id(value)] = (
            1 + sum(size for size, _ in measures),
            1 + max((height for _, height in measures), default=0),
        )
    size, height = known.get(id(value), (1, 1))
    if depth + height - 1 > _MOST_DEPTH or size > _MOST_OPERATIONS:
        raise CheckpointError(
            f"{path} nests deeper than {_MOST_DEPTH} levels or holds more than {_MOST_OPERATIONS} values; "
            "no checkpoint of DeepSpeed does"
        )
    return size, height


def _named_classes(path: Path) -> set[str]:
    """Classes and functions that the pickle would call, read off it without running it.

    Raises:
        CheckpointError: the file is damaged, or its pickle is larger or nests deeper than any of ``torch.save``.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            size = path.stat().st_size
            for entry in archive.infolist():
                stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
                if not stored or entry.header_offset + entry.file_size > size:
                    raise CheckpointError(f"{path}: {entry.filename} is compressed or cut; torch.save writes neither")
            (pickled,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if pickled.file_size > _MOST_PICKLE_BYTES:
                raise CheckpointError(f"{path}: its pickle has {pickled.file_size} bytes, at most {_MOST_PICKLE_BYTES}")
            text = archive.read(pickled)
        return _scan(path, text)
    except (zipfile.BadZipFile, RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is no file that torch.save wrote, or it is damaged: {_cause(error)}") from error


def _scan(path: Path, text: bytes) -> set[str]:
    """Follow the pickle's stack without values, and return the names that it would call.

    A slot of the stack is the number of levels below it. Without this bound a dictionary key of a million nested tuples
    would overflow the stack of the process: Python computes the hash of a tuple by recursion, unchecked.
    """
    found: set[str] = set()
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for number, (opcode, argument, _) in enumerate(genops(text)):
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if name not in _OPERATIONS:
            raise CheckpointError(f"{path} uses the pickle operation {name}; torch.save writes none")
        if number >= _MOST_OPERATIONS:
            raise CheckpointError(f"{path}: its pickle has more than {_MOST_OPERATIONS} operations")
        if name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif before or after:
            below = before.index(markobject) if markobject in before else len(before)  # Operands under the mark.
            start = (marks.pop() if markobject in before else len(stack)) - below
            if start < 0:
                raise ValueError(f"{name} takes more than there is")
            taken = stack[start:]
            del stack[start:]
            if after:
                # An operation that leaves a value of its first operand's type, such as APPEND, fills that operand. So
                # does REDUCE by this rule: the level of its function is 1, which is no more than that of a new value.
                fills = before[:1] == after
                stack.append(max([taken.pop(0) if fills else 1, *(1 + levels for levels in taken)]))
                if stack[-1] > _MOST_DEPTH:
                    raise CheckpointError(f"{path}: its pickle nests deeper than {_MOST_DEPTH} levels")
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
