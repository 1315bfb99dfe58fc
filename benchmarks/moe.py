"""Compare mixtures of experts with Hugging Face's and with a dense model: ``python -m benchmarks.moe [--json]``.

    block    one layer, forward and backward, against the two implementations of Hugging Face's OLMoE
    step     a training step of an OLMoE-shaped model under ZeRO-3 on two ranks, against Hugging Face's in the DeepSpeed
             engine that its Trainer builds (``benchmarks.train_step``)
    active   the same step against that of a dense model with as many active parameters, both in our engine

The sides have the same weights and take turns. Values are medians; a ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import BenchmarkRow, Case, show
from benchmarks.steps.ranks import Rank, Side
from benchmarks.train_step import arguments as step_arguments
from benchmarks.train_step import both
from benchmarks.train_step import measure as measure_steps
from mmscale.dist import World
from mmscale.nn.moe import MoeConfig, MoeMlp
from mmscale.nn.router import RoutedRows

DIM, EXPERT_DIM, CHOSEN = 512, 512, 8
EAGER_TURNS = 1
"""Measured turns of Hugging Face's eager loop, which with 64 experts is 15 times as slow as the others."""
PARTS = ("block", "step", "active")
STEP = ["--models", "olmoe", "--ranks", "2", "--stages", "3"]


def their_block(experts: int, implementation: str) -> nn.Module:
    """Return the block of Hugging Face's OLMoE with equal initial values for each implementation of its experts."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    shape: dict[str, Any] = {"hidden_size": DIM, "intermediate_size": EXPERT_DIM}
    config: Any = OlmoeConfig(**shape, num_experts=experts, num_experts_per_tok=CHOSEN)
    config._experts_implementation = implementation
    block: nn.Module = OlmoeSparseMoeBlock(config)
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def our_block(experts: int, theirs: nn.Module) -> MoeMlp:
    """Return our layer with their weights."""
    block = MoeMlp(DIM, MoeConfig(num_experts=experts, experts_per_token=CHOSEN, expert_dim=EXPERT_DIM))
    block.load_state_dict(theirs.state_dict())
    return block


def measure_block(experts: int, dtype: torch.dtype, tokens: int, turns: int) -> Case:
    """Return milliseconds of forward and backward of one layer: of CPU time on a CPU, else of wall time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = {name: their_block(experts, name) for name in ("grouped_mm", "eager")}
    rows = RoutedRows.text(torch.ones(tokens, dtype=torch.bool, device=device), tokens)
    ours = our_block(experts, blocks["eager"])
    for block in (ours, *blocks.values()):
        block.to(device, dtype)
    sides: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {"ours": (ours, lambda x: ours(x, rows)[0])}
    sides |= {f"hugging face {name}": (block, _their_call(block)) for name, block in blocks.items()}
    torch.manual_seed(1)
    hidden, direction = (torch.randn(tokens, DIM).to(device, dtype) for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, (block, call) in sides.items():
            if name.endswith("eager") and turn > EAGER_TURNS:
                continue
            spent = _train(call, hidden.clone().requires_grad_(), direction)
            block.zero_grad(set_to_none=True)
            if turn:  # The first turn warms up.
                seconds[name].append(spent)
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in sides if name != "ours"), key=medians.__getitem__)
    paired = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[best], strict=False))
    name = f"block, {experts} experts, {str(dtype).removeprefix('torch.')}, {tokens} tokens"
    return Case.from_sides(name, medians, "ms", paired=paired)


def _their_call(block: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(hidden: Tensor) -> Tensor:
        output: Tensor = block(hidden[None])[0]
        return output

    return call


def _train(call: Callable[[Tensor], Tensor], hidden: Tensor, direction: Tensor) -> float:
    # On the host, CPU time: other work on the machine changes it less than the wall time.
    clock = time.perf_counter if hidden.is_cuda else time.process_time
    start = clock()
    call(hidden).backward(direction)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def our_rank(model: str, world: World) -> Rank:
    """Return a rank of our engine; both sides of ``active`` are ours."""
    del model
    return Rank("ours", world)


def measure_active(steps: int, tokens: int, threads: int) -> list[Case]:
    """Return milliseconds and CPU time of a step with experts, and of the dense model of equal active parameters."""
    names = {"ours": "olmoe", "dense of equal active parameters": "active"}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(closing(Side(name, 2, threads, our_rank))) for name in names}
        for name, model in names.items():
            sides[name].order("build", model=model, zero_stage=3, precision="fp32")
        both(sides, "data", model="olmoe", data="equal", steps=steps + 1, max_tokens=tokens)
        done: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for index in range(steps + 1):
            for name, side in sides.items():
                done[name].append(side.order("step", index=index))
    cases = []
    for key, kind in (("seconds", "step"), ("cpu_seconds", "CPU time of a rank")):
        seconds = {name: [step[key] for step in each[1:]] for name, each in done.items()}
        medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
        paired = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
        case = f"experts, 2 ranks, ZeRO 3, {2 * tokens} tokens: {kind}"
        cases.append(Case.from_sides(case, medians, "ms", paired=paired))
    return cases


def measure(options: argparse.Namespace) -> Iterator[BenchmarkRow]:
    """Yield the rows of the requested parts."""
    torch.set_num_threads(options.threads)
    if "block" in options.parts:
        for experts in options.experts:
            for dtype in (torch.float32, torch.bfloat16):
                yield measure_block(experts, dtype, options.tokens, options.turns)
    tokens, threads = options.step_tokens, options.threads
    shape = ["--steps", str(options.steps), "--tokens", str(tokens), "--threads", str(threads)]
    if "step" in options.parts:
        yield from measure_steps(step_arguments([*STEP, *shape]))
    if "active" in options.parts:
        yield from measure_active(options.steps, tokens, threads)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64], help="experts of the block")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the block")
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens of each rank in a step")
    parser.add_argument("--turns", type=int, default=5, help="measured turns of the block")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    settings = {"threads": options.threads, "turns": options.turns, "steps": options.steps}
    show("moe", lambda: measure(options), options.json, settings)
