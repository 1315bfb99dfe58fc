"""Bytes that a rank sends in a step of a model with experts: ZeRO-3 alone, and with ``engine.expert_parallel``.

    python -m benchmarks.expert_traffic [--json] [--tokens 8192] [--recompute] [--no-count]

For one microbatch of T tokens on each of W ranks, in bf16 with gradients reduced in float32. N_e values belong to
experts and N_o to everything else; L layers have E experts of width F on a stream of D channels, and a token uses k.

    everything else    8 N_o (1 - 1 / W)             gather for forward (2) and backward (2), reduce gradients (4)
    experts            8 N_e / P (1 - P / W)         the same over the W / P ranks that hold the same experts
    tokens             8 L k T D (1 - 1 / P)         send rows and return outputs, in forward and backward, 2 bytes each

P is ``engine.expert_parallel``. ``--recompute`` (activation checkpointing) repeats the exchanges of the forward pass:
the factor is 12 instead of 8. The formula for tokens assumes balanced experts, and leaves out the weight that travels
with each row. With N_e = 3 L E F D, groups of any size reduce the bytes of a rank if and only if 8 k T < 24 E F, that
is k T < 3 E F (2 E F with recomputation).

    into a node        bytes that enter a node of 8 GPUs if each gathered value enters it once. Groups inside a node do
                       not change them: the ranks of a node together need all experts either way.

Every weight counts as gathered twice, as with ``engine.live_parameter_elements: 0``. By default ZeRO-3 keeps up to 10^9
values from the forward to the backward pass, and gathers those once.

The check counts the collectives of a real step on gloo ranks, in forward, backward and optimizer, through a dispatch
mode of torch. Its formula includes the padding of shards, the rows whose experts are on another rank, and their
weights. Not counted: messages of a few numbers (losses, norms, row counts).

Source of the first two lines: Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054), section 7; of the third: Lepikhin et
al. 2020, "GShard" (arXiv 2006.16668), section 3.2.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import Case, show
from benchmarks.steps.batches import make_batches
from benchmarks.steps.ranks import Side, stage
from mmscale.dist import World, all_reduce_sum
from mmscale.engine.config import EngineConfig
from mmscale.models.config import ModelConfig
from mmscale.nn.expert_parallel import full_shape, num_parts
from mmscale.nn.experts import Experts

WEIGHT_BYTES, GRADIENT_BYTES = 2, 4
VALUE_BYTES = 2 * WEIGHT_BYTES + GRADIENT_BYTES
"""Bytes sent for each value: gathered for the forward and the backward pass, and reduced as a gradient."""
NODE = 8
"""Ranks of a node."""


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a model that decide its traffic.

    Attributes:
        layers: L, layers with experts.
        dim: D.
        num_experts: E.
        experts_per_token: k.
        expert_dim: F.
        values: N_e + N_o.
    """

    name: str
    layers: int
    dim: int
    num_experts: int
    experts_per_token: int
    expert_dim: int
    values: int

    @property
    def expert_values(self) -> int:
        """N_e."""
        return self.layers * self.num_experts * 3 * self.expert_dim * self.dim

    def break_even(self, *, recompute: bool) -> float:
        """Return the tokens of a microbatch below which shared experts reduce the bytes that a rank sends."""
        return (2 if recompute else 3) * self.num_experts * self.expert_dim / self.experts_per_token


SHAPES = (
    MoeShape("OLMoE 1B-7B", 16, 2048, 64, 8, 1024, 6_919_161_856),
    MoeShape("Aria", 28, 2560, 64, 6, 1664, 25_307_311_216),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step with one microbatch.

    Attributes:
        rest: Sent by a rank for everything but experts.
        experts: Sent by a rank for weights and gradients of experts.
        tokens: Sent by a rank for rows of tokens and their gradients.
        into_node: Received by a node from other nodes.
    """

    rest: float
    experts: float
    tokens: float
    into_node: float

    @property
    def total(self) -> float:
        """Bytes sent by a rank."""
        return self.rest + self.experts + self.tokens


def traffic(shape: MoeShape, ranks: int, size: int, tokens: int, *, recompute: bool = False) -> Traffic:
    """Return the bytes by the formula.

    Args:
        shape: The model.
        ranks: W.
        size: P; 1 for ZeRO-3 alone.
        tokens: T.
        recompute: Whether the backward pass repeats the exchanges of the forward pass.
    """
    rest, experts = (VALUE_BYTES * n for n in (shape.values - shape.expert_values, shape.expert_values))
    exchanges = 6 if recompute else 4
    rows = exchanges * WEIGHT_BYTES * shape.layers * shape.experts_per_token * tokens * shape.dim
    nodes = math.ceil(ranks / NODE)
    # Consecutive ranks share experts, so a node holds min(P, 8) slices, each once or several times.
    slices = min(size, NODE)
    nodes_of_slice = nodes * slices // size
    return Traffic(
        rest=rest * (1 - 1 / ranks),
        experts=experts / size * (1 - size / ranks),
        tokens=rows * (1 - 1 / size),
        into_node=rest * (1 - 1 / nodes)
        + slices * experts / size * (1 - 1 / nodes_of_slice)
        + min(ranks, NODE) * rows * (1 - slices / size),
    )


@dataclass(frozen=True)
class TrafficTable:
    """The formula for published models.

    Attributes:
        tokens: T.
        recompute: As in ``traffic``.
        worlds: Numbers of ranks.
        sizes: Values of ``engine.expert_parallel``.
    """

    tokens: int
    recompute: bool
    worlds: tuple[int, ...]
    sizes: tuple[int, ...]

    def rows(self) -> Iterator[tuple[MoeShape, int, int, Traffic]]:
        """Yield each model, number of ranks and size, with its bytes."""
        for shape in SHAPES:
            for ranks in self.worlds:
                for size in self.sizes:
                    if ranks % size == 0:
                        yield shape, ranks, size, traffic(shape, ranks, size, self.tokens, recompute=self.recompute)

    def line(self) -> str:
        """Return a table in Markdown, in GB (10^9 bytes)."""
        lines = [
            "| model | GPUs | `expert_parallel` | experts | tokens | rest | sent by a GPU | into a node |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for shape, ranks, size, found in self.rows():
            values = (found.experts, found.tokens, found.rest, found.total, found.into_node)
            lines.append(f"| {shape.name} | {ranks} | {size} | {' | '.join(f'{v / 1e9:.1f}' for v in values)} |")
        borders = ", ".join(f"{each.name} {each.break_even(recompute=self.recompute):,.0f}" for each in SHAPES)
        return "\n".join(
            [*lines, f"\ntokens of a microbatch below which a GPU sends less with shared experts: {borders}"]
        )

    def cases(self) -> list[Case]:
        """Return the totals; the peer is ZeRO-3 alone."""
        alone = {(shape.name, ranks): found for shape, ranks, size, found in self.rows() if size == 1}
        cases = []
        for shape, ranks, size, found in self.rows():
            name = f"{shape.name}, {ranks} GPUs, expert_parallel {size}, {self.tokens} tokens"
            for what in ("total", "into_node"):
                peers = {} if size == 1 else {"ZeRO-3 alone": getattr(alone[shape.name, ranks], what)}
                cases.append(Case(f"{name}: {what.replace('_', ' ')}", getattr(found, what), peers, "bytes"))
        return cases


@dataclass(frozen=True)
class CountedRow:
    """Counted bytes of a small model, as means over the ranks, and those of the formula with padded shards."""

    ranks: int
    size: int
    counted: dict[str, float]
    expected: dict[str, float]

    def line(self) -> str:
        """Return the row for people."""
        parts = [f"{name} {value:,.0f} (formula {self.expected[name]:,.0f})" for name, value in self.counted.items()]
        return f"counted on {self.ranks} gloo ranks, expert_parallel {self.size}: bytes {', '.join(parts)}"

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        name = f"{self.ranks} gloo ranks, expert_parallel {self.size}"
        return [
            Case(f"{name}: {what}", value, {"formula": self.expected[what]}, "bytes")
            for what, value in self.counted.items()
        ]


class Collectives(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives of tensors with several values, by kind.

    A ring sends (G - 1) / G of the whole message in a gather or a reduce-scatter among G ranks. An exchange sends
    everything but the rank's own part. An integer exchange (of row counts) does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            ranks = ProcessGroup.unbox(args[2]).size()
            whole = max(args[0].nbytes, args[1].nbytes)
            self.sent[name.strip("_").removesuffix("_base")] += whole * (ranks - 1) / ranks
        elif name == "alltoall_base_" and args[1].is_floating_point():
            own = ProcessGroup.unbox(args[2]).rank()
            rows = sum(args[4]) - args[4][own]
            self.sent["alltoall"] += rows * args[1][:1].nbytes
        elif name not in ("allreduce_", "broadcast_", "barrier", "alltoall_base_", "allgather_"):
            raise ValueError(f"count the bytes of {name}")


def small_model(experts_per_token: int = 2) -> ModelConfig:
    """Return a decoder of two blocks with four experts."""
    experts = {"kind": "moe", "num_experts": 4, "experts_per_token": experts_per_token, "expert_dim": 24}
    decoder = {"vocab_size": 2048, "hidden_dim": 48, "num_layers": 2, "attention": {"num_heads": 6}, "mlp": experts}
    return ModelConfig.model_validate({"decoder": decoder})


class CountingRank:
    """One process that builds an engine, and counts what it sends in a step."""

    def __init__(self, side: str, world: World) -> None:
        del side
        self.world = world

    def count(self, size: int, recompute: bool) -> dict[str, dict[str, float]]:
        """Return the counted and the expected bytes, as means over the ranks. All ranks must call."""
        from mmscale.engine.construct import construct
        from mmscale.engine.engine import Engine
        from mmscale.models.build import build_model
        from mmscale.nn.init import initialise_
        from mmscale.objectives.next_token import NextToken

        world = self.world
        config = EngineConfig(
            precision="bf16",
            device="cpu",
            expert_parallel=size,
            activation_checkpointing=recompute,
            live_parameter_elements=0,
        )
        build = functools.partial(build_model, small_model(), seed=None, dtype=torch.bfloat16)
        model = construct(build, config, world, functools.partial(initialise_, seed=0))
        engine = Engine(model, NextToken(world=world), stage(), config, world)
        batches = make_batches("dense", "equal", world.rank, world.world_size, steps=2, max_tokens=256)
        engine.train_step([batches[0].packed])  # DeepSpeed records the order of the modules in the first step.
        rows = _count_rows_elsewhere(model, world.rank % size, size)
        with Collectives() as collectives:
            engine.train_step([batches[1].packed])
        sent = all_reduce_sum(
            world, {**dict.fromkeys(("allgather", "reduce_scatter", "alltoall"), 0), **collectives.sent}
        )
        # The hook saw each row in each forward pass, and a recomputation is one more.
        away = all_reduce_sum(world, {"sent": sum(rows)})["sent"] / (2 if recompute else 1) / world.world_size
        padded = sum(_padded(parameter, world.world_size) for parameter in model.parameters())
        engine.close()
        sends = 6 if recompute else 4  # Rows and outputs. Weights have half as many: no output, one gradient.
        return {
            "counted": {name: value / world.world_size for name, value in sent.items()},
            "expected": {
                "allgather": 2 * WEIGHT_BYTES * padded,
                "reduce_scatter": GRADIENT_BYTES * padded,
                "alltoall": away * WEIGHT_BYTES * (sends * model.config.decoder.hidden_dim + sends / 2),
            },
        }


def _padded(parameter: torch.nn.Parameter, ranks: int) -> float:
    """Return the values that a rank sends to gather a parameter once, with the padding of shards."""
    holders = ranks // num_parts(parameter)
    numel = math.prod(full_shape(parameter)) // num_parts(parameter)
    return math.ceil(numel / holders) * (holders - 1)


def _count_rows_elsewhere(model: torch.nn.Module, part: int, size: int) -> list[int]:
    """Return a list that gets the number of rows of each call whose experts another rank of the group holds."""
    found: list[int] = []
    for module in model.modules():
        if isinstance(module, Experts):

            def note(module: Any, inputs: tuple[Any, ...]) -> None:
                by_rank = inputs[2].view(size, -1).sum(1)
                found.append(int(by_rank.sum() - by_rank[part]))

            module.register_forward_pre_hook(note)
    return found


def measure(args: argparse.Namespace) -> Iterator[TrafficTable | CountedRow]:
    """Yield the table, then the counted rows."""
    yield TrafficTable(args.tokens, args.recompute, tuple(args.worlds), tuple(args.sizes))
    if args.count:
        for ranks in args.ranks:
            with closing(Side("traffic", ranks, 1, CountingRank)) as processes:
                for size in [n for n in (1, 2, 4) if ranks % n == 0]:
                    yield CountedRow(ranks, size, **processes.order("count", size=size, recompute=args.recompute))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expert_traffic", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a microbatch on each rank")
    parser.add_argument("--recompute", action="store_true", help="with activation checkpointing")
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512], help="numbers of GPUs, multiples of 8")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 64], help="values of engine.expert_parallel")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="gloo ranks that count")
    parser.add_argument("--no-count", dest="count", action="store_false", help="print the formula alone")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    settings = {"tokens": options.tokens, "recompute": options.recompute}
    show("expert_traffic", lambda: measure(options), options.json, settings)
