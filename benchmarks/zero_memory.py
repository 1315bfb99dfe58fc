"""Memory of weights, gradients and optimizer state on each rank, compared with the formula.

    python -m benchmarks.zero_memory [--json] [--state-bits 8]

Source of the formula: Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054), section 3 and figure 1. With N trained
values, W ranks, and per value w bytes of weights, g bytes of gradients and K bytes of optimizer state, a rank holds

    stage 0    (w + g + K) N
    stage 1    (w + g) N + K N / W
    stage 2    w N + (g + K) N / W
    stage 3    (w + g + K) N / W

K is 8 for AdamW's two float32 moments (2 + 2 * 4 / 256 for 8-bit moments with a float32 scale per 256 values), plus 4
for float32 masters. In the paper only 16-bit weights have masters. DeepSpeed keeps masters for float32 weights too from
stage 1 on; in stage 0 the weights are the masters.

    formula    the lines above
    held       weights and optimizer state between two steps: the storages of their tensors, each counted once. Exact.
               The difference from ``w N`` and ``K N`` is the padding for equal shards and alignment.
    start      peak growth of the process's resident memory, from before the model to a ready engine
    steps      the same over three steps, from the same start. It includes gradients, activations, communication
               buffers and cached memory of the allocator. The error of both is a few MiB.

Gradients exist only between backward pass and step, so they are in the formula and in ``steps``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.report import Case, show
from benchmarks.steps.batches import make_batches
from benchmarks.steps.ranks import Side, stage
from mmscale.dist import World, all_reduce_sum_list
from mmscale.engine.config import EngineConfig
from mmscale.engine.engine import Engine
from mmscale.engine.optimizers.eight_bit import BLOCK
from mmscale.models.config import ModelConfig
from mmscale.optim.config import AdamWConfig
from mmscale.optim.schedule import ADAM_MOMENTS

PRECISIONS = ("fp32", "bf16")
MIB = 2**20
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank by purpose."""

    weights: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class MemoryRow:
    """Memory in bytes; each measured value is the largest of the ranks. The module docstring defines the terms.

    Attributes:
        values: N.
        formula: Weights, gradients and optimizer state by the formula.
        held: Measured weights and optimizer state.
        start_peak: Growth of resident memory until the engine is ready.
        steps_peak: Growth of resident memory over the steps.
    """

    world_size: int
    zero_stage: int
    precision: str
    values: int
    formula: Bytes
    held: dict[str, float]
    start_peak: float
    steps_peak: float

    @property
    def name(self) -> str:
        """Name of the measurement."""
        where = f"{self.world_size} ranks, ZeRO {self.zero_stage}, {self.precision}"
        return f"{where}, {self.values / 1e6:.1f} M values"

    def line(self) -> str:
        """Return the row for people."""
        by = self.formula
        return (
            f"{self.name}: weights {self.held['weights'] / MIB:.1f} MiB (formula {by.weights / MIB:.1f}), "
            f"optimizer {self.held['optimizer'] / MIB:.1f} ({by.optimizer / MIB:.1f}), "
            f"gradients ({by.gradients / MIB:.1f}); "
            f"peak at start {self.start_peak / MIB:.0f}, in steps {self.steps_peak / MIB:.0f}, "
            f"formula in all {(by.weights + by.gradients + by.optimizer) / MIB:.0f}"
        )

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        by = self.formula
        held = by.weights + by.optimizer
        pairs = [
            ("weights", self.held["weights"], by.weights),
            ("optimizer", self.held["optimizer"], by.optimizer),
            ("peak at start", self.start_peak, held),
            ("peak in steps", self.steps_peak, held + by.gradients),
        ]
        return [Case(f"{self.name}: {what}", ours, {"formula": theirs}, "bytes") for what, ours, theirs in pairs]


def formula(values: int, world_size: int, zero_stage: int, precision: str, state_bits: int = 32) -> Bytes:
    """Return the bytes on each rank by the formula, with the number formats of the engine.

    Args:
        values: N.
        world_size: W.
        zero_stage: 0-3.
        precision: Number format of the weights, ``fp32`` or ``bf16``. From stage 1 on gradients are summed in float32.
        state_bits: Bits of AdamW's moments, 8 or 32.
    """
    weight = 2 if precision == "bf16" else 4
    gradient = weight if zero_stage == 0 else 4
    masters = 0 if zero_stage == 0 and precision == "fp32" else 4
    optimizer = masters + (8 if state_bits == 32 else 2 + 2 * 4 / BLOCK)
    return Bytes(
        weight * values / (world_size if zero_stage == 3 else 1),
        gradient * values / (world_size if zero_stage >= 2 else 1),
        optimizer * values / (world_size if zero_stage >= 1 else 1),
    )


def storage_bytes(tensors: Iterable[Tensor], counted: set[int] | None = None) -> int:
    """Return the bytes of the storages of ``tensors`` that are not in ``counted``, and add these storages to it."""
    seen = set() if counted is None else counted
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def held_bytes(engine: Engine) -> dict[str, float]:
    """Measure weights and optimizer state of this rank."""
    counted: set[int] = set()
    weights = storage_bytes((getattr(p, "ds_tensor", p) for p in engine.model.parameters()), counted)
    masters = [master.values for master in engine.partition.masters]
    state = engine.partition.basic_optimizer.state
    kept = [state[master][key] for master in masters for key in ADAM_MOMENTS]
    moments = [part for moment in kept for part in _tensors_of(moment)]
    # At stage 0 in float32 the masters are the weights and count as weights.
    return {"weights": weights, "optimizer": storage_bytes([*masters, *moments], counted)}


def _tensors_of(moment: Any) -> list[Tensor]:
    if isinstance(moment, Tensor):
        return [moment]
    return [tensor for blocks in moment.values() for tensor in (blocks.codes, blocks.scales)]


def text_model(width: int, vocab: int) -> ModelConfig:
    """Return a dense decoder of eight blocks: 20 M values at 384 channels and 8192 tokens."""
    return ModelConfig.model_validate(
        {
            "decoder": {
                "vocab_size": vocab,
                "hidden_dim": width,
                "num_layers": 8,
                "attention": {"num_heads": 6},
                "mlp": {"kind": "dense", "hidden_dim": 8 * width // 3},
            }
        }
    )


class MemoryRank:
    """One process that builds, trains and discards engines."""

    def __init__(self, side: str, world: World) -> None:
        del side
        self.world = world
        self._libc = ctypes.CDLL(None)
        # With a dynamic threshold the allocator would keep freed tensors, which would count for the next engine.
        self._libc.mallopt(_M_MMAP_THRESHOLD, 65536)

    def measure(
        self, zero_stage: int, precision: str, state_bits: int, width: int, vocab: int, live: int
    ) -> dict[str, Any]:
        """Build an engine, train three steps and return the measured fields of ``MemoryRow``. All ranks must call."""
        import functools

        from mmscale.engine.construct import construct
        from mmscale.engine.precision import choose_precision
        from mmscale.models.build import build_model
        from mmscale.nn.init import initialise_
        from mmscale.objectives.next_token import NextToken

        rank, size = self.world.rank, self.world.world_size
        pairs = make_batches("dense", "equal", rank, size, steps=3, max_tokens=256)
        config = EngineConfig(
            zero_stage=zero_stage,
            precision=precision,
            device="cpu",
            reduce_bucket_elements=2_000_000,
            gather_bucket_elements=2_000_000,
            live_parameter_elements=live,
        )
        dtype = choose_precision(config, self.world.device).dtype
        build = functools.partial(build_model, text_model(width, vocab), seed=None, dtype=dtype)
        before = self._restart()
        model = construct(build, config, self.world, functools.partial(initialise_, seed=0))
        plan = stage().model_copy(update={"optimizer": AdamWConfig(state_bits=state_bits)})
        engine = Engine(model, NextToken(world=self.world), plan, config, self.world)
        start_peak = _status_bytes("VmHWM") - before
        self._restart()
        for pair in pairs:
            engine.train_step([pair.packed])
        steps_peak = _status_bytes("VmHWM") - before
        held = held_bytes(engine)
        values = engine.parameter_counts["decoder"].total
        engine.close()
        del engine, model
        self._restart()
        largest = {key: max(self._of_all(value)) for key, value in held.items()}
        peaks = {"start_peak": max(self._of_all(start_peak)), "steps_peak": max(self._of_all(steps_peak))}
        return {"values": values, "held": largest, **peaks}

    def _of_all(self, value: float) -> list[float]:
        size = self.world.world_size
        return all_reduce_sum_list(self.world, [value if i == self.world.rank else 0.0 for i in range(size)])

    def _restart(self) -> int:
        """Release free memory, reset the peak, and return the resident bytes."""
        gc.collect()
        self._libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(args: argparse.Namespace) -> Iterator[MemoryRow]:
    """Yield all requested rows."""
    for world_size in args.ranks:
        with closing(Side("memory", world_size, 1, MemoryRank)) as ranks:
            for precision in args.precisions:
                for zero_stage in args.stages:
                    options = {
                        "zero_stage": zero_stage,
                        "precision": precision,
                        "state_bits": args.state_bits,
                        "width": args.width,
                        "vocab": args.vocab,
                        "live": args.live,
                    }
                    found = ranks.order("measure", **options)
                    by_formula = formula(found["values"], world_size, zero_stage, precision, args.state_bits)
                    yield MemoryRow(world_size, zero_stage, precision, formula=by_formula, **found)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero_memory", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--state-bits", type=int, default=32, choices=(8, 32), help="bits of AdamW's moments")
    parser.add_argument("--width", type=int, default=384, help="channels, a multiple of 6")
    parser.add_argument("--vocab", type=int, default=8192, help="rows of the embedding and of the head, 2048 or more")
    parser.add_argument("--live", type=int, default=0, help="engine.live_parameter_elements, for stage 3")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    show("zero_memory", lambda: measure(options), options.json, {"state_bits": options.state_bits})
