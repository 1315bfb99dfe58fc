"""Record the collectives of one simulated rank, and give small ones their true result.

    model, engine, DeepSpeed --torch.distributed--> CallRecorder --Call--> comparison in the parent process
                                                        |  ^
                                                        |  +-- values of the other ranks, if the message is small
                                                        +----> fake process group, which sends nothing

The fake group of torch returns at once: a gather repeats this rank's own shard. Gathered weights and
reduced gradients are therefore false, which does not matter here, but sums, flags, counts and split sizes decide what a
rank does next. So other messages of at most 64 KiB, and every all-to-all, are exchanged between the simulated ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mmscale.errors import UnsupportedError

MOST_EXCHANGED_BYTES = 1 << 16
_NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "barrier": "barrier",
    "reduce_": "reduce",
}
"""The usual name of each operator of ``torch.ops.c10d``. Releases of torch rename only the Python functions."""
_INPUTS = ("input_tensors", "input_tensor", "inputs", "input", "tensors")
_LISTED = ("params", "params_to_reduce", "param_list")
"""Local variables of DeepSpeed's functions that hold the parameters of a message."""
_MOVES_WEIGHTS = ("gather", "scatter", "_zero_init_param")
"""Parts of the names of DeepSpeed's functions that send weights or gradients."""
_ZERO = "/deepspeed/runtime/zero/"
_OURS = ("/mmscale/", "/data_pipeline/")
_NOT_OURS = ("/mmscale/check/", "/mmscale/dist.py", "/mmscale/engine/step_clock.py")
_MOST_NAMES = 3


class Call(NamedTuple):
    """One collective of a rank.

    Attributes:
        name: Kind: ``all_reduce``, ``all_gather``, ...
        group: Its ranks, relative to this one, so that equal groups of different ranks compare equal.
        tensors: dtype and shape of the message; without the number of rows for an all-to-all, where it may differ.
        parameters: The parameters that DeepSpeed gathers or reduces; empty for other messages.
        place: The module whose weights are gathered, or file and function of the call.
        where: Stage, step and batch, for messages only.
    """

    name: str
    group: str
    tensors: str
    parameters: str
    place: str
    where: str

    @property
    def compared(self) -> tuple[str, ...]:
        """The fields that must be equal on all ranks."""
        return self[:5]

    def __str__(self) -> str:
        of = f" of {self.parameters}" if self.parameters else ""
        return f"{self.name}{of} ({self.tensors}; {self.group}) in {self.place}"


Exchange = Callable[[Call, Sequence[int], list[Tensor]], list[list[Tensor]]]
"""Sends this rank's tensors to the ranks of a group. Returns the tensors of each of them, in the order of the group."""


class CallRecorder(TorchDispatchMode):
    """Records every collective inside its context.

    Args:
        record: Called with each collective that needs no true result.
        exchange: Called with each collective that does.

    Attributes:
        where: Copied into each ``Call``.
    """

    def __init__(self, record: Callable[[Call], None], exchange: Exchange) -> None:
        super().__init__()
        self.where = ""
        self._record, self._exchange = record, exchange
        self._parameter_names: dict[int, str] = {}
        self._module_names: dict[int, str] = {}

    def name_parts(self, model: nn.Module) -> None:
        """Use the names of this model's modules and parameters. Call it for each new model."""
        self._parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._module_names = {id(module): name or "the whole model" for name, module in model.named_modules()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; record it if it is a collective."""
        if func.namespace == "c10d":
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            result = func(*_harmless(given), **(kwargs or {}))
            self._collective(func, given)
            return result
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and "wait" not in func.name():
            raise UnsupportedError(
                f"{func.name()}: the check does not simulate functional collectives; call torch.distributed instead"
            )
        return result

    def _collective(self, func: Any, given: dict[str, Any]) -> None:
        name = _NAMES.get(func._schema.name.partition("::")[2])
        if name is None:
            raise UnsupportedError(f"{func.name()}: the check does not simulate this collective")
        group = ProcessGroup.unbox(given["process_group"])
        members = torch_dist.get_process_group_ranks(group)
        tensors = _flat(next((given[key] for key in _INPUTS if key in given), []))
        place, parameters, operation, moves_weights = self._locate()
        call = Call(name, _describe_group(members), _describe(name, tensors), parameters, place, self.where)
        size = sum(each.numel() * each.element_size() for each in tensors)
        if name != "all_to_all" and (moves_weights or size > MOST_EXCHANGED_BYTES):
            self._record(call)
            return
        if name == "all_to_all":
            tensors.append(torch.tensor(given["input_split_sizes"], dtype=torch.int64))
        with torch.no_grad(), _disable_current_modes():
            theirs = self._exchange(call, members, [each.detach().contiguous() for each in tensors])
            _write_result(name, given, theirs, members.index(torch_dist.get_rank()), operation)

    def _locate(self) -> tuple[str, str, Any, bool]:
        """Return the place of the collective, the names of its parameters, and the operation of a reduction.

        The last value is whether DeepSpeed sends weights or gradients.
        """
        frame: FrameType | None = sys._getframe(3)
        place, module, parameters, operation, moves_weights = "", "", "", None, False
        while frame is not None and not place:
            path = frame.f_code.co_filename.replace(os.sep, "/")
            if path.endswith("/distributed_c10d.py") and operation is None:
                operation = frame.f_locals.get("op")
            elif _ZERO in path:
                found = frame.f_locals
                # Other functions get this rank's part of the parameters, for example to compute its part of a norm.
                if any(part in frame.f_code.co_name for part in _MOVES_WEIGHTS):
                    moves_weights = True
                    if not parameters:
                        parameters = self._names(next((found[key] for key in _LISTED if key in found), ()))
                if not module and isinstance(current := found.get("current_submodule"), nn.Module):
                    module = self._module_names.get(id(current), type(current).__name__)
            elif is_own_file(path):
                place = f"{'/'.join(path.split('/')[-2:])}, {frame.f_code.co_name}"
            frame = frame.f_back
        return module or place or "DeepSpeed", parameters, operation, moves_weights

    def _names(self, parameters: Any) -> str:
        if not isinstance(parameters, list | tuple | set):
            return ""
        names = sorted(self._parameter_names.get(id(each), "") for each in parameters)
        names = [name for name in names if name]
        more = len(names) - _MOST_NAMES
        return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more ({names[-1]})" if more > 0 else "")


def is_own_file(path: str) -> bool:
    """Return whether a file has code of this project that may cause a collective, not only pass it on."""
    return any(part in path for part in _OURS) and not any(part in path for part in _NOT_OURS)


def _harmless(given: dict[str, Any]) -> list[Any]:
    """Return the arguments for the fake group, which rejects an all-to-all from a rank that sends nothing."""
    if "output_split_sizes" not in given:
        return [*given.values()]
    nothing = torch.empty(0)
    empty = {"output": nothing, "input": nothing, "output_split_sizes": [], "input_split_sizes": []}
    return [*(given | empty).values()]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for part in value for each in _flat(part)]


def _describe(name: str, tensors: Sequence[Tensor]) -> str:
    parts = []
    for each in tensors:
        shape = tuple(each.shape[1:]) if name == "all_to_all" else tuple(each.shape)
        parts.append(f"{str(each.dtype).removeprefix('torch.')} {shape}")
    return ", ".join(parts) or "nothing"


def _describe_group(members: Sequence[int]) -> str:
    if len(members) == torch_dist.get_world_size():
        return "all ranks"
    stride = members[1] - members[0] if len(members) > 1 else 0
    return f"{len(members)} ranks, {stride} apart"


def _write_result(
    name: str, given: dict[str, Any], theirs: list[list[Tensor]], own: int, operation: torch_dist.ReduceOp | None
) -> None:
    """Write the true result of a collective into its output tensors.

    Args:
        name: Kind of the collective.
        given: Its arguments by name.
        theirs: Inputs of each rank of the group.
        own: Number of this rank in the group.
        operation: Operation of a reduction; None for a sum.
    """
    match name:
        case "all_reduce":
            for index, into in enumerate(given["tensors"]):
                into.copy_(_reduced([each[index] for each in theirs], operation))
        case "reduce":
            if own == given["root_rank"]:
                given["tensors"][0].copy_(_reduced([each[0] for each in theirs], operation))
        case "broadcast":
            given["tensors"][0].copy_(theirs[given["root_rank"]][0])
        case "all_gather" | "gather":
            # ``gather`` has outputs on one rank only. Coalesced messages have one output for each input.
            outputs = given.get("output_tensors", given.get("output_tensor", given.get("outputs", [])))
            if isinstance(outputs, Tensor):
                outputs = [outputs]
            for index, into in enumerate(outputs):
                parts = [each[index] for each in theirs]
                if isinstance(into, Tensor):
                    into.view(-1).copy_(torch.cat([part.flatten() for part in parts]))
                else:
                    for each, part in zip(into, parts, strict=True):
                        each.copy_(part)
        case "reduce_scatter":
            outputs = given.get("output_tensors", given.get("output_tensor", given.get("outputs", [])))
            listed = isinstance(given.get("input_tensors"), list)  # One tensor for each rank.
            for index, into in enumerate([outputs] if isinstance(outputs, Tensor) else outputs):
                whole = [torch.cat([t.flatten() for t in e]) if listed else e[index].flatten() for e in theirs]
                parts = [each.chunk(len(theirs))[own] for each in whole]
                into.view(-1).copy_(_reduced(parts, operation))
        case "all_to_all":
            _write_all_to_all(given["output"], theirs, own, given["output_split_sizes"])


def _write_all_to_all(output: Tensor, theirs: list[list[Tensor]], own: int, sizes: Sequence[int]) -> None:
    """Write the rows that each rank sends to this one. ``theirs`` has the rows and the split sizes of each rank."""
    parts = []
    for rank, (rows, splits) in enumerate(theirs):
        lengths = splits.tolist() or [len(rows) // len(theirs)] * len(theirs)
        part = rows.split(lengths)[own]
        expected = sizes[rank] if sizes else len(part)
        if len(part) != expected:
            raise RuntimeError(f"rank {rank} of the group sends {len(part)} rows, this rank expects {expected}")
        parts.append(part)
    output.copy_(torch.cat(parts))


def _reduced(parts: Sequence[Tensor], operation: torch_dist.ReduceOp | None) -> Tensor:
    stacked = torch.stack([*parts])
    kind = str(operation or torch_dist.ReduceOp.SUM).rpartition(".")[2]
    match kind:
        case "MAX":
            return stacked.amax(0)
        case "MIN":
            return stacked.amin(0)
        case "AVG":
            return stacked.mean(0)
        case "SUM":
            return stacked.sum(0, dtype=stacked.dtype)
    raise UnsupportedError(f"ReduceOp.{kind}: the check does not simulate this operation")
