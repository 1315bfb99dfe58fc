"""Peak memory of a rank: predicted from the configuration, and measured by the allocator's counters.

    python -m benchmarks.plan_memory --json

Each rank trains two steps while torch's profiler records every allocation and release of torch's CPU allocator, from
the construction of the model on. The measured peak is the largest number of allocated bytes in the second step, whose
state is complete. Memory outside of that allocator is not counted: Python, gloo and the loader.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType

from benchmarks.report import Case, show
from benchmarks.steps.batches import data_config
from benchmarks.steps.ranks import Side
from mmscale.dist import World, gather_numbers
from mmscale.plan.memory import RankMemory, memory_of_rank
from mmscale.run.config import RunConfig

MIB = 2**20
MODELS = ("dense", "moe", "vlm")
_NORM = {"kind": "layernorm"}


def run_config(
    model: str,
    zero_stage: int,
    precision: str,
    *,
    max_tokens: int = 1024,
    checkpointing: bool = False,
    width: int = 256,
    layers: int = 6,
    **engine: Any,
) -> RunConfig:
    """Return a run of a small model.

    Args:
        model: One of ``MODELS``.
        zero_stage: ``engine.zero_stage``.
        precision: ``engine.precision``.
        max_tokens: ``data.packing.max_tokens``.
        checkpointing: ``engine.activation_checkpointing``.
        width: Channels of the decoder.
        layers: Blocks of the decoder; an even number for ``vlm``.
        engine: Other keys of the engine block.
    """
    experts = {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert_dim": width}
    decoder: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_dim": width,
        "num_layers": layers,
        "attention": {"num_heads": 8, "num_kv_heads": 4},
        "mlp": experts if model == "moe" else {"kind": "dense", "hidden_dim": 3 * width},
    }
    whole: dict[str, Any] = {"decoder": decoder}
    if model == "vlm":
        whole |= {
            "vision": {
                "patch_size": 8,
                "hidden_dim": 192,
                "num_layers": 4,
                "attention": {"num_heads": 6},
                "mlp": {"kind": "dense", "hidden_dim": 768, "gated": False, "activation": "gelu"},
                "norm": _NORM,
                "positions": {"kind": "learned", "grid": [4, 4]},
            },
            "connector": {"kind": "cross_attention", "every": 2, "projector": {"kind": "linear"}},
        }
    return RunConfig.model_validate(
        {
            "run_dir": "runs/plan-memory",
            "data": data_config("mllama" if model == "vlm" else "dense", 4, max_tokens),
            "model": whole,
            "stages": [{"name": "measured", "steps": 10, "optimizer": {"kind": "adamw"}}],
            "engine": {
                "device": "cpu",
                "zero_stage": zero_stage,
                "precision": precision,
                "activation_checkpointing": checkpointing,
                "reduce_bucket_elements": 1_000_000,
                "gather_bucket_elements": 1_000_000,
                "live_parameter_elements": 0,
                **engine,
            },
        }
    )


@dataclass(frozen=True)
class Measured:
    """Allocated bytes of one rank in its second step.

    Attributes:
        before: At the beginning of the step.
        phases: Largest number in each phase.
    """

    before: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Largest number in all phases."""
        return max(self.phases.values())

    @property
    def moment(self) -> str:
        """Phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


class PlanRank:
    """One process that trains runs and counts what they allocate."""

    def __init__(self, side: str, world: World) -> None:
        del side
        self.world = world

    def measure(self, config: RunConfig) -> list[Measured]:
        """Return what each rank allocates in the second step of ``config``. All ranks must call."""
        found = measure_rank(config, self.world)
        names = sorted(found.phases)
        columns = [
            gather_numbers(self.world, float(value))
            for value in (found.before, *(found.phases[name] for name in names))
        ]
        return [
            Measured(int(row[0]), dict(zip(names, map(int, row[1:]), strict=True)))
            for row in zip(*columns, strict=True)
        ]


def measure_rank(config: RunConfig, world: World) -> Measured:
    """Train two steps of ``config`` and return what this rank allocates in the second one. All ranks must call."""
    from mmscale.engine.engine import Engine
    from mmscale.objectives.choice import choose_objective
    from mmscale.run.session import open_loader
    from mmscale.run.train import build

    marks: list[tuple[int, str]] = []
    with closing(open_loader(config, world)) as loader:
        batches = [next(iter(loader)).microbatches for _ in range(2)]
    count_all_threads()
    gc.collect()  # The engine of an earlier measurement must not be freed during this one.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objective = choose_objective(config.model, config.stages[0], world, ())
        engine = Engine(build(config, world, 0), objective, config.stages[0], config.engine, world)
        engine.train_step(batches[0])
        engine.clock.on_phase = lambda name: marks.append((time.time_ns(), name))
        marks.append((time.time_ns(), "agreement"))
        engine.train_step(batches[1])
        marks.append((time.time_ns(), "end"))
    engine.close()
    return peaks(profile, marks)


def count_all_threads() -> None:
    """Let torch's counter of CPU memory see every thread.

    By default it sees the threads that are profiled. A thread of gloo may hold the last reference to a message. The
    counter then misses the release, and the message seems to stay in memory.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def peaks(profile: Any, marks: list[tuple[int, str]]) -> Measured:
    """Return the largest number of allocated bytes in each phase of ``marks``, without those before the profile."""
    records = sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree()))
    first = records[0][1] - records[0][2]
    live, before, phases, waiting, phase = 0, 0, dict[str, int](), list(marks), ""
    for moment, total, _ in records:
        while waiting and moment >= waiting[0][0]:
            if not phase:
                before = live
            phase = waiting.pop(0)[1]
            phases[phase] = max(phases.get(phase, 0), live)
        live = total - first
        if phase:
            phases[phase] = max(phases[phase], live)
    phases.pop("end", None)
    return Measured(before, phases)


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield moment, allocated bytes afterwards, and size (negative: released) of each record."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size


@dataclass(frozen=True)
class PlanRow:
    """One run: what was measured, and what was predicted.

    Attributes:
        model: One of ``MODELS``.
        zero_stage: ``engine.zero_stage``.
        precision: ``engine.precision``.
        ranks: W.
        checkpointing: ``engine.activation_checkpointing``.
        measured: The rank with the largest peak.
        predicted: The prediction.
    """

    model: str
    zero_stage: int
    precision: str
    ranks: int
    checkpointing: bool
    measured: Measured
    predicted: RankMemory

    @property
    def error(self) -> float:
        """Relative error of the predicted peak."""
        return self.predicted.peak_bytes / self.measured.peak - 1

    @property
    def name(self) -> str:
        """Name of the measurement."""
        recomputes = ", recomputed" if self.checkpointing else ""
        return f"{self.model}, ZeRO {self.zero_stage}, {self.precision}, {self.ranks} ranks{recomputes}"

    def line(self) -> str:
        """Return the row for people."""
        parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in self.predicted.parts.items())
        return (
            f"{self.name}: measured {self.measured.peak / MIB:.1f} MiB ({self.measured.moment}), predicted "
            f"{self.predicted.peak_bytes / MIB:.1f} ({self.predicted.moment}), error {self.error:+.1%}; {parts}"
        )

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        return [Case(self.name, self.measured.peak, {"predicted": self.predicted.peak_bytes}, "bytes")]


def measure(args: argparse.Namespace) -> Iterator[PlanRow]:
    """Yield all requested rows, then print the largest error."""
    worst = 0.0
    for ranks in args.ranks:
        with closing(Side("plan", ranks, 1, PlanRank)) as side:
            for model, zero_stage in itertools.product(args.models, args.stages):
                config = run_config(
                    model, zero_stage, args.precision, max_tokens=args.tokens, checkpointing=args.checkpointing
                )
                measured = max(side.order("measure", config=config), key=lambda each: each.peak)
                predicted = memory_of_rank(config, 0, ranks)
                row = PlanRow(model, zero_stage, args.precision, ranks, args.checkpointing, measured, predicted)
                worst = max(worst, row.error, key=abs)
                yield row
    print(f"largest error {worst:+.1%}", file=sys.stderr)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a pack")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the activations of blocks")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    show("plan_memory", lambda: measure(options), options.json, {"tokens": options.tokens})
