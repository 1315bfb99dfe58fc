"""Compare each family with transformers: ``python -m benchmarks.forward [--families F ...] [--json]``.

    forward   without gradients, to the logits of every token (for a tower: to the features of every patch)
    training  forward, cross-entropy of every output row, backward

Both sides have the same weights (by the importer) and the same pages, and take turns; values are medians. Ours packs
pages as the loader does. transformers pads them as its processors do and uses its ``sdpa`` attention. The outputs are
compared before the timing. Families without a class in transformers (Molmo, NVLM, MM1.5) are not included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.families import multimodal, texts, towers
from benchmarks.families.pair import ModelPair
from benchmarks.report import Case, show

TOLERANCE = 1e-4
"""Largest difference of the outputs relative to the largest value. Larger differences raise an error."""


@dataclass(frozen=True)
class ForwardRow:
    """One comparison.

    Attributes:
        case: Family and inputs.
        kind: ``forward`` or ``training``.
        ms: Milliseconds by side, median.
        ratio: Median over turns of transformers' time over ours; above 1 when ours is faster.
        padding: Share of rows that are padding, by side.
        difference: Largest difference of the outputs over the largest value.
    """

    case: str
    kind: str
    ms: dict[str, float]
    ratio: float
    padding: dict[str, float]
    difference: float

    def line(self) -> str:
        """Return the row for people."""
        times = ", ".join(f"{name} {ms:.0f}" for name, ms in self.ms.items())
        padding = ", ".join(f"{name} {share:.0%}" for name, share in self.padding.items())
        differ = f"outputs differ by {self.difference:.0e}"
        return f"{self.case}, {self.kind}: ms {times}; padding {padding}; {differ}; ratio {self.ratio:.2f}"

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        name = f"{self.case}, {self.kind}"
        return [
            Case.from_sides(f"{name}: time", self.ms, "ms", paired=self.ratio),
            Case.from_sides(f"{name}: padding", self.padding, "share of rows"),
            Case(f"{name}: difference of the outputs", self.difference, {"limit": TOLERANCE}, "of the largest value"),
        ]


def families() -> dict[str, list[Callable[[], ModelPair]]]:
    """Return the builders of all pairs by family."""
    found: dict[str, list[Callable[[], ModelPair]]] = {}
    for module in (texts, towers, multimodal):
        for family, build in module.pairs():
            found.setdefault(family, []).append(build)
    return found


def measure(pair: ModelPair, turns: int) -> Iterator[ForwardRow]:
    """Yield the rows of both kinds.

    Raises:
        RuntimeError: the outputs of the sides differ.
    """
    with torch.no_grad():
        ours, theirs = pair.run_ours()[: len(pair.run_theirs())], pair.run_theirs()
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if difference > TOLERANCE:
        raise RuntimeError(f"{pair.name}: outputs differ by {difference:.1e} of the largest value")
    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (torch.no_grad()(pair.run_ours), torch.no_grad()(pair.run_theirs)),
        "training": (lambda: _train(pair.ours, pair.run_ours), lambda: _train(pair.theirs, pair.run_theirs)),
    }
    for kind, sides in runs.items():
        seconds: list[list[float]] = [[], []]
        for turn in range(turns + 1):
            for run, times in zip(sides, seconds, strict=True):
                start = time.perf_counter()
                run()
                if turn:  # The first turn warms up.
                    times.append(time.perf_counter() - start)
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        ms = {
            name: 1000 * statistics.median(times) for name, times in zip(("ours", "transformers"), seconds, strict=True)
        }
        yield ForwardRow(pair.name, kind, ms, ratio, pair.padding, difference)


def _train(model: torch.nn.Module, run: Callable[[], Tensor]) -> None:
    """Forward and backward: the loss is the cross-entropy with class 5 of each output row, equal on both sides."""
    out = run()
    F.cross_entropy(out, torch.full((len(out),), 5)).backward()
    model.zero_grad(set_to_none=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--families", nargs="+", default=list(families()), choices=list(families()))
    parser.add_argument("--turns", type=int, default=7, help="measured turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return parser.parse_args(words)


def rows(options: argparse.Namespace) -> Iterator[ForwardRow]:
    """Yield the rows of the requested families."""
    torch.set_num_threads(options.threads)
    for family in options.families:
        for build in families()[family]:
            yield from measure(build(), options.turns)


if __name__ == "__main__":
    options = arguments()
    show("forward", lambda: rows(options), options.json)
