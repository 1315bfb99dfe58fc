"""Compare a training step with Hugging Face's: ``python -m benchmarks.train_step [--json]``.

    ours           mmscale.engine.Engine on packed batches of data_pipeline.loader.loader
    hugging face   transformers' model and the DeepSpeed engine that its Trainer builds, on batches padded as its
                   collator and image processor pad them
    flattened      the same on batches of its DataCollatorWithFlattening (text only; the mask is tokens x tokens)

Both sides have the same weights, documents per step, optimizer, precision, ZeRO stage and number of threads. Each side
has its own processes for the whole benchmark, and the sides take turns step by step. Values are medians over the steps
without the first one (warm-up). A token is useful if it belongs to a document.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Case, show
from benchmarks.steps.batches import DATA
from benchmarks.steps.ranks import SIDES, Side
from benchmarks.steps.reference_models import MODELS

FLATTENED = "flattened"


@dataclass(frozen=True)
class TrainStepRow:
    """One comparison.

    Attributes:
        model: ``mllama``, ``dense``, ``olmoe`` or ``active``.
        data: ``mixed`` or ``equal``.
        world_size: Ranks.
        zero_stage: ZeRO stage of both sides.
        tokens: Useful tokens per step over all ranks, median.
        tokens_per_second: Useful tokens per second by side, median over steps.
        step_ms: Milliseconds per step by side, median.
        cpu_ms: CPU time of a rank per step, median. Other load on the machine affects it least.
        padding: Share of padding in token rows and in crops for the tower, by side.
        ratio: Median over steps of their time divided by ours on the same documents, by peer.
        loss_difference: Largest relative difference of the two sides' losses in a step. The learning rate is too small
            to change a weight, so only rounding differs if both models compute the same function.
    """

    model: str
    data: str
    world_size: int
    zero_stage: int
    tokens: float
    tokens_per_second: dict[str, float]
    step_ms: dict[str, float]
    cpu_ms: dict[str, float]
    padding: dict[str, float]
    ratio: dict[str, float]
    loss_difference: float

    @property
    def name(self) -> str:
        """Name of the comparison."""
        return f"{self.model}, {self.data}, {self.world_size} ranks, ZeRO {self.zero_stage}"

    def line(self) -> str:
        """Return the row for people."""
        speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in self.tokens_per_second.items())
        times = ", ".join(f"{name} {ms:.0f}" for name, ms in self.step_ms.items())
        busy = ", ".join(f"{name} {ms:.0f}" for name, ms in self.cpu_ms.items())
        padding = ", ".join(f"{name} {share:.0%}" for name, share in self.padding.items())
        ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in self.ratio.items())
        return (
            f"{self.name}: useful tokens/s {speeds}; ms {times}; CPU ms {busy}; padding {padding}; "
            f"losses differ by {self.loss_difference:.1e}; ratio {ratios}"
        )

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        best = min(self.ratio.values())
        speed = f"{self.name}: speed at {self.tokens:.0f} useful tokens a step"
        return [
            Case.from_sides(speed, self.tokens_per_second, "useful tokens/s", lower_is_better=False, paired=best),
            Case.from_sides(f"{self.name}: step", self.step_ms, "ms", paired=best),
            Case.from_sides(f"{self.name}: CPU time of a rank", self.cpu_ms, "ms"),
            *(self._padding(of) for of in ("", ", images") if f"ours{of}" in self.padding),
            Case(f"{self.name}: difference of the losses", self.loss_difference, {}, "relative"),
        ]

    def _padding(self, of: str) -> Case:
        shares = {name: self.padding[f"{name}{of}"] for name in SIDES}
        return Case.from_sides(f"{self.name}: padding{of}", shares, "share of rows")


def measure(args: argparse.Namespace) -> Iterator[TrainStepRow]:
    """Yield all requested rows."""
    for world_size in args.ranks:
        with ExitStack() as stack:
            sides = {name: stack.enter_context(closing(Side(name, world_size, args.threads))) for name in SIDES}
            for model in args.models:
                for zero_stage in args.stages:
                    both(sides, "build", model=model, zero_stage=zero_stage, precision=args.precision)
                    for data in args.data:
                        found = both(
                            sides, "data", model=model, data=data, steps=args.steps + 1, max_tokens=args.tokens
                        )
                        compared = compare(sides, model, found["ours"], args.steps)
                        yield TrainStepRow(model, data, world_size, zero_stage, **compared)


def both(sides: dict[str, Side], name: str, **arguments: Any) -> dict[str, Any]:
    """Run a command on both sides at the same time; not for timed commands."""
    for side in sides.values():
        side.begin(name, **arguments)
    return {side: ranks.end() for side, ranks in sides.items()}


def compare(sides: dict[str, Side], model: str, data: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run the steps of all sides in turn and return the values of a row."""
    turns: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SIDES}
    if model != "mllama":
        turns[FLATTENED] = (SIDES[1], {"flat": True})
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in turns}
    losses: dict[str, list[float]] = {name: [] for name in turns}
    for index in range(steps + 1):
        for name, (side, options) in turns.items():
            done = sides[side].order("step", index=index, **options)
            losses[name].append(done["loss"])
            if index:
                seconds[name].append(done["seconds"])
                cpu_seconds[name].append(done["cpu_seconds"])
    tokens = data["tokens"][1:]
    return {
        "tokens": statistics.median(tokens),
        "tokens_per_second": {
            name: statistics.median(n / t for n, t in zip(tokens, times, strict=True))
            for name, times in seconds.items()
        },
        "step_ms": {name: 1000 * statistics.median(times) for name, times in seconds.items()},
        "cpu_ms": {name: 1000 * statistics.median(times) for name, times in cpu_seconds.items()},
        "padding": data["padding"],
        "ratio": {
            name: statistics.median(t / o for t, o in zip(times, seconds["ours"], strict=True))
            for name, times in seconds.items()
            if name != "ours"
        },
        "loss_difference": max(abs(a - b) / b for a, b in zip(*(losses[side] for side in SIDES), strict=True)),
    }


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="world sizes")
    parser.add_argument("--models", nargs="+", default=["mllama", "dense"], choices=MODELS)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 0], help="ZeRO stages")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each rank")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per pack; one pack per rank and step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    settings = {"precision": options.precision, "threads": options.threads, "steps": options.steps}
    show("train_step", lambda: measure(options), options.json, settings)
