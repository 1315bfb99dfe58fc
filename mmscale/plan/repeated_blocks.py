"""Run one of the equal blocks of a pass on the meta device, and repeat its memory for the others.

    forward     first of a kind: run it alone with inputs of the same shapes, and count what it allocates and saves
                every one:       allocate outputs of the same shapes, and one tensor of the size of what it saves
    backward    first of a kind: run it alone, forward and backward, and count before each gradient
                every one:       report the same gradients, at the same distance from the bytes that are live now

Blocks are of one kind if their modules have equal classes, settings and parameter shapes, and their inputs have equal
shapes. A model of 140 blocks is then as fast as one of five. The events are those of the whole pass. Their bytes differ
where blocks share a tensor: the first of them allocates it, and the gradient of one input of several blocks is summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.dropout import Dropout
from mmscale.plan.live_bytes import LiveBytes, storage_key


@dataclass(frozen=True)
class _Structure:
    """Nested values without their tensors, so that it does not keep these.

    Attributes:
        leaves: The other values; ``_Shape`` in the place of a tensor.
        tree: The nesting.
    """

    leaves: tuple[Any, ...]
    tree: Any

    @classmethod
    def split(cls, values: Any) -> tuple[_Structure, list[Tensor]]:
        """Return the structure and the tensors of ``values``."""
        leaves, tree = tree_flatten(values)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return cls(tuple(_Shape if isinstance(leaf, Tensor) else leaf for leaf in leaves), tree), tensors

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """Return the values with other tensors."""
        waiting = iter(tensors)
        return tree_unflatten([next(waiting) if leaf is _Shape else leaf for leaf in self.leaves], self.tree)


@dataclass(frozen=True)
class _Shape:
    """A tensor without values."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tensor.size(), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def allocate(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class _Forward:
    """The forward pass of a kind of block.

    Attributes:
        peak: Largest number of bytes above those at its beginning.
        outputs: Its tensors.
        structure: Its other outputs.
        saved_inputs, saved_outputs: Indices of the tensors that the backward pass needs.
        saved_bytes: Bytes of other tensors that it needs.
    """

    peak: int
    outputs: tuple[_Shape, ...]
    structure: _Structure
    saved_inputs: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    saved_bytes: int


@dataclass
class _Backward:
    """The backward pass of a kind of block, in bytes above those at its beginning.

    Attributes:
        gradients: For each gradient of a parameter: its name in the block, the peak before it, and the bytes at it.
        peak: The peak after the last of them.
        inputs: Indices of the inputs that get a gradient.
    """

    gradients: list[tuple[str, int, int]] = field(default_factory=list)
    peak: int = 0
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Call:
    """One call of a block, without its tensors, so that it does not keep them."""

    name: str
    run: Callable[..., Any]
    kind: Any
    """Equal for calls that allocate the same tensors."""
    shapes: tuple[_Shape, ...]
    structure: _Structure

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[_Structure, list[Tensor]]:
        """Run the block with other tensors."""
        args, kwargs = self.structure.fill(inputs)
        return _Structure.split(self.run(*args, **kwargs))


class RepeatedBlocks:
    """Replaces the blocks of a model during one pass.

    Args:
        live: The counter of the pass.
        event: Called with ``gradient`` and the name of a parameter when its gradient is complete.

    Attributes:
        rehearsing: Whether a block runs alone now. Hooks of its parameters must then call ``record`` instead of
            ``event``.
    """

    def __init__(self, live: LiveBytes, event: Callable[[str, str], None]) -> None:
        self.live, self.event = live, event
        self.rehearsing: _Backward | None = None
        self._base, self._prefix = 0, ""
        self._forwards: dict[Any, _Forward] = {}
        self._backwards: dict[Any, _Backward] = {}
        # Without an input that requires a gradient, the outputs of a trained block still do.
        self._anchor = torch.empty(0, device="meta", requires_grad=True)

    def replace(self, blocks: Sequence[tuple[str, nn.Module]], least: int) -> Callable[[], None]:
        """Repeat the blocks of each kind with at least ``least`` blocks. Return an undo function."""
        kinds = [_kind(block) for _, block in blocks]
        number, undo = Counter(kinds), ExitStack()
        for (name, block), kind in zip(blocks, kinds, strict=True):
            if number[kind] >= least:
                undo.callback(_set_forward, block, vars(block).get("forward"))
                block.forward = partial(self._call, name, kind, block.forward)
        return undo.close

    def record(self, name: str) -> None:
        """Record that the gradient of the parameter ``name`` is complete in a block that runs alone."""
        assert self.rehearsing is not None, "only called while a block runs alone"
        peak, level = self.live.peak - self._base, self.live.live - self._base
        self.rehearsing.gradients.append((name.removeprefix(self._prefix), peak, level))
        self.live.restart()

    def _call(self, name: str, block: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        structure, tensors = _Structure.split((args, kwargs))
        shapes = tuple(map(_Shape.of, tensors))
        kind = (block, torch.is_grad_enabled(), shapes, tuple(map(_identity, structure.leaves)))
        call = _Call(name, run, kind, shapes, structure)
        if kind not in self._forwards:
            self._forward(call)  # Fills caches, which stay in memory.
            self._forwards[kind] = self._forward(call)
        forward = self._forwards[kind]
        start = self.live.live
        if torch.is_grad_enabled() and any(shape.requires_grad for shape in forward.outputs):
            outputs = _Repeat.apply(self, call, forward, self._anchor, *tensors)
        else:
            outputs = [shape.allocate() for shape in forward.outputs]
        self.live.reach(start + forward.peak)
        return forward.structure.fill(outputs)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the peak of the pass while a block runs alone."""
        peak, peak_head = self.live.peak, self.live.peak_head
        yield
        self.live.peak, self.live.peak_head = peak, peak_head

    def _forward(self, call: _Call) -> _Forward:
        """Run the block of ``call`` alone."""
        live = self.live
        with self._alone():
            empty = live.live
            inputs = _Inputs.apply(None, call.shapes, self._anchor)
            start, input_sizes = live.live, [(storage_key(each), each.untyped_storage().nbytes()) for each in inputs]
            live.restart()
            structure, outputs = call(inputs)
            peak, shapes = live.peak - start, tuple(map(_Shape.of, outputs))
            output_sizes = [(storage_key(each), each.untyped_storage().nbytes()) for each in outputs]
            graph = [each.grad_fn for each in outputs]
            del inputs, outputs
            saved = [
                tuple(i for i, (key, _) in enumerate(sizes) if live.holds(key)) for sizes in (input_sizes, output_sizes)
            ]
            counted = dict([input_sizes[i] for i in saved[0]] + [output_sizes[i] for i in saved[1]])
            rest = live.live - empty - sum(counted.values())
            del graph
        return _Forward(peak, shapes, structure, saved[0], saved[1], max(0, rest))

    def backward(self, call: _Call, given: tuple[bool, ...]) -> _Backward:
        """Return the backward pass of a call whose outputs have a gradient where ``given`` is true."""
        key = (call.kind, given)
        if key in self._backwards:
            return self._backwards[key]
        found = _Backward()
        with self._alone(), torch.enable_grad():
            inputs = _Inputs.apply((self, found), call.shapes, self._anchor)
            outputs = call(inputs)[1]
            loss = _Loss.apply(self, *(each for each, has in zip(outputs, given, strict=True) if has))
            del inputs, outputs
            self.rehearsing, self._prefix = found, f"{call.name}."
            loss.backward()
            self.rehearsing = None
        self._backwards[key] = found
        return found

    def begin(self) -> None:
        """Begin to count the backward pass of a block that runs alone."""
        self._base = self.live.live
        self.live.restart()

    def end(self, found: _Backward) -> None:
        """End it."""
        found.peak = self.live.peak - self._base


class _Repeat(Function):
    """A block whose kind was run before."""

    @staticmethod
    def forward(ctx: Any, blocks: RepeatedBlocks, call: _Call, forward: _Forward, _: Tensor, *inputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.call = blocks, call
        outputs = tuple(shape.allocate() for shape in forward.outputs)
        saved = torch.empty(forward.saved_bytes, dtype=torch.uint8, device="meta")
        kept = [inputs[i] for i in forward.saved_inputs] + [outputs[i] for i in forward.saved_outputs]
        ctx.save_for_backward(saved, *kept)
        ctx.mark_non_differentiable(
            *(each for each, shape in zip(outputs, forward.outputs, strict=True) if not shape.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        blocks, call, live = ctx.blocks, ctx.call, ctx.blocks.live
        found = blocks.backward(call, tuple(each is not None for each in gradients))
        base = live.live
        for name, peak, level in found.gradients:
            live.reach(base + peak)
            live.live = base + level
            blocks.event("gradient", f"{call.name}.{name}")
            live.live = base
        live.reach(base + found.peak)
        peak, peak_head = live.peak, live.peak_head
        results = [shape.allocate() if i in found.inputs else None for i, shape in enumerate(call.shapes)]
        live.peak, live.peak_head = peak, peak_head  # What the block saved is still counted, but not in a real pass.
        return (None, None, None, None, *results)


class _Inputs(Function):
    """Inputs of a block that runs alone. Ends the count of its backward pass, which runs before this one."""

    @staticmethod
    def forward(ctx: Any, owner: tuple[RepeatedBlocks, _Backward] | None, shapes: tuple[_Shape, ...], _: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.owner = owner
        inputs = tuple(shape.allocate() for shape in shapes)
        ctx.mark_non_differentiable(
            *(each for each, shape in zip(inputs, shapes, strict=True) if not shape.requires_grad)
        )
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        blocks, found = ctx.owner
        found.inputs = tuple(i for i, each in enumerate(gradients) if each is not None)
        blocks.end(found)
        return None, None, None


class _Loss(Function):
    """A loss whose gradients belong to autograd alone, as those of a following block do."""

    @staticmethod
    def forward(ctx: Any, blocks: RepeatedBlocks, *outputs: Tensor) -> Tensor:
        ctx.blocks, ctx.shapes = blocks, tuple(map(_Shape.of, outputs))
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        gradients = [shape.allocate() for shape in ctx.shapes]
        ctx.blocks.begin()
        return (None, *gradients)


def _set_forward(block: nn.Module, forward: Any) -> None:
    """Undo ``RepeatedBlocks.replace``; None: the class's method."""
    del block.forward
    if forward is not None:
        block.forward = forward


def _kind(block: nn.Module) -> Any:
    """Return a value that is equal for blocks that allocate the same tensors for the same inputs."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, _setting(value)) for key, value in vars(module).items() if key[0] != "_" and key != "forward"),
            tuple((key, None if each is None else _Shape.of(each)) for key, each in _tensors(module)),
        )
        for name, module in block.named_modules()
    )


def _setting(value: Any) -> Any:
    """Return a hashable value for an attribute of a module."""
    if isinstance(value, bool | int | float | str | Enum) or callable(value):
        return value
    return repr(value) if isinstance(value, StrictConfig) else type(value)


def _identity(argument: Any) -> Any:
    """Return a hashable value for an argument that is no tensor. Blocks of a pass share such objects."""
    if isinstance(argument, Dropout):  # Each block has its own masks, of equal shapes.
        return argument.rate, id(argument.rows), id(argument.chosen)
    return argument if argument is None or argument is _Shape else id(argument)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]
