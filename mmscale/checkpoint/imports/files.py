"""Find and load the files of a DeepSpeed checkpoint, without trusting them.

    global_step40/   mp_rank_00_model_states.pt                      weights, buffers, names (stages 0-2)
                     [bf16_]zero_pp_rank_R_mp_rank_00_*_states.pt    the share of rank R
                     zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt     the universal format

A ``.pt`` file is a zip archive of a pickle and raw storages. The pickle may only name the classes and functions listed
here. Inert stand-ins replace the classes of DeepSpeed, so none of its code runs. Storages are memory-mapped: a tensor
uses memory only when its values are read, and no tensor may be larger than its storage.
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
    """Stand-in for DeepSpeed's ``ZeroStageEnum``."""


class LossScaler:
    """Stand-in for DeepSpeed's fp16 loss scalers; has the attributes that were pickled."""


@dataclass(frozen=True)
class FragmentAddress:
    """Stand-in for DeepSpeed's ``fragment_address``: a rank's part of a parameter in its flat tensor."""

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
# A subset of what torch allows. torch would also accept ``bytearray(10**12)``, for example.
_ALLOWED = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",  # Tensors with attributes, which ZeRO stage 3 saves.
        *(f"torch.{name}" for name in _NUMBERS),
        *(f"torch.{name}Storage" for name in _STORAGES),
        *_STAND_INS,
    }
)
# The operations of pickles that ``torch.save`` writes (protocol 2).
_OPERATIONS = frozenset(
    {
        *("PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "GLOBAL", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"),
        *("EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE"),
        *("NEWOBJ", "BINPERSID", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"),
    }
)
_MAX_PICKLE_BYTES = 1 << 28
_MAX_OPERATIONS = 5_000_000
"""Largest number of operations of a pickle, and of values in it. A tensor needs about 100 operations; the check of a
pickle at this limit takes 15 s."""
_MAX_DEPTH = 100
_DAMAGE = (
    *(RuntimeError, UnpicklingError, OSError, EOFError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError),
)


def load_pt(path: Path) -> Any:
    """Load a file that ``torch.save`` wrote. Its tensors are mapped from the file.

    Raises:
        CheckpointError: the file is missing, damaged or compressed, names a class that is not allowed, or exceeds a
            limit of size or depth.
    """
    named = _named_classes(path)
    refused = sorted(named - _ALLOWED)
    if refused:
        raise CheckpointError(
            f"{path} contains a pickled {', '.join(refused)}, which could run code when it is loaded; only tensors and "
            "DeepSpeed's own records are imported: save again without it (often it is in client_state or a scheduler)"
        )
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGE as error:
        raise CheckpointError(f"{path} cannot be read: {_cause(error)}") from error
    _check_size(path, loaded, 1, {})
    return loaded


def _cause(error: Exception) -> str:
    """Return the cause in one line, without torch's advice to load the file with ``weights_only=False``."""
    text = str(error)
    text = text.partition("WeightsUnpickler error: ")[2] or text
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _check_size(path: Path, value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values and of nesting levels in ``value``. Each reference to a shared container counts.

    Args:
        path: File name for messages.
        value: A part of the loaded object.
        depth: Nesting level of ``value``; 1 for the whole object.
        known: Results so far, by ``id``; mutated.

    Raises:
        CheckpointError: there are too many values or levels (as in a container that contains itself), or a tensor
            claims more values than its storage has.
    """
    if id(value) not in known and depth <= _MAX_DEPTH:
        parts: list[Any] = []
        if isinstance(value, torch.Tensor):
            # A tensor of stride 0 may claim any size, and a copy of it would allocate that size.
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                shape = list(value.shape)
                raise CheckpointError(f"{path}: a tensor of shape {shape} claims more values than it stores")
        elif isinstance(value, Mapping):
            parts = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            parts = list(value)
        elif isinstance(value, LossScaler | FragmentAddress):
            parts = list(vars(value).values())
        sizes = [_check_size(path, part, depth + 1, known) for part in parts]
        known[id(value)] = (1 + sum(size for size, _ in sizes), 1 + max((height for _, height in sizes), default=0))
    size, height = known.get(id(value), (1, 1))
    if depth + height - 1 > _MAX_DEPTH or size > _MAX_OPERATIONS:
        raise CheckpointError(
            f"{path} nests deeper than {_MAX_DEPTH} levels or holds more than {_MAX_OPERATIONS} values; "
            "a DeepSpeed checkpoint never does"
        )
    return size, height


def _named_classes(path: Path) -> set[str]:
    """Return the classes and functions that the pickle names, without running it.

    Raises:
        CheckpointError: the file is damaged or compressed, or its pickle exceeds a limit of size or depth.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            size = path.stat().st_size
            for entry in archive.infolist():
                stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
                if not stored or entry.header_offset + entry.file_size > size:
                    raise CheckpointError(
                        f"{path}: {entry.filename} is compressed or truncated; torch.save does not compress"
                    )
            (pickled,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if pickled.file_size > _MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: its pickle has {pickled.file_size} bytes, expected at most {_MAX_PICKLE_BYTES}"
                )
            text = archive.read(pickled)
        return _scan(path, text)
    except (zipfile.BadZipFile, RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is not a file of torch.save, or it is damaged: {_cause(error)}") from error


def _scan(path: Path, text: bytes) -> set[str]:
    """Simulate the pickle's stack without values. Return the classes and functions that the pickle names.

    Each stack slot holds the number of nesting levels of its value. The limit on levels is needed because Python hashes
    nested tuples by unchecked recursion: a dictionary key of a million nested tuples would overflow the process stack.

    Raises:
        CheckpointError: the pickle uses an operation that ``torch.save`` does not write, or exceeds a limit.
    """
    found: set[str] = set()
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for number, (opcode, argument, _) in enumerate(genops(text)):
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if name not in _OPERATIONS:
            raise CheckpointError(f"{path} uses the pickle operation {name}, which torch.save never writes")
        if number >= _MAX_OPERATIONS:
            raise CheckpointError(f"{path}: its pickle has more than {_MAX_OPERATIONS} operations")
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
                raise ValueError(f"{name} pops more values than the stack has")
            operands = stack[start:]
            del stack[start:]
            if after:
                # An operation whose result has the type of its first operand, such as APPEND, fills that operand. The
                # rule also matches REDUCE, where it is harmless: the level of its function is 1, as for a new value.
                fills = before[:1] == after
                stack.append(max([operands.pop(0) if fills else 1, *(1 + levels for levels in operands)]))
                if stack[-1] > _MAX_DEPTH:
                    raise CheckpointError(f"{path}: its pickle nests deeper than {_MAX_DEPTH} levels")
    return found


@dataclass(frozen=True)
class DeepSpeedFolder:
    """The files of one DeepSpeed checkpoint.

    Attributes:
        path: Folder of one step.
        model_states: ``*_model_states.pt`` files by rank; only rank 0 below ZeRO stage 3.
        optim_states: ``*_optim_states.pt`` files by rank; empty at stage 0 and in the universal format.
        universal: Whether the checkpoint is in the universal format.
    """

    path: Path
    model_states: dict[int, Path]
    optim_states: dict[int, Path]
    universal: bool


_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")


def find_folder(source: Path) -> DeepSpeedFolder:
    """Find the checkpoint in ``source``; if there is none, in the only subfolder that has one.

    Raises:
        CheckpointError: there is no checkpoint, several subfolders have one, or the checkpoint uses tensor parallelism,
            pipeline parallelism or DeepSpeed-MoE.
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
        raise CheckpointError(
            f"{path} has no *_model_states.pt, the file with the names and shapes of the parameters; copy it there"
        )
    return DeepSpeedFolder(path, files["model"], files["optim"], (path / "zero").is_dir())


def _states(path: Path) -> list[re.Match[str]]:
    return [match for file in sorted(path.iterdir()) if (match := _FILE.fullmatch(file.name))]
