"""Compare ranges of parameters in hand-made checkpoints with a plain list of values."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.checkpoint import verify
from mmscale.checkpoint.reshard import CheckpointReader
from mmscale.checkpoint.share import TensorPiece
from mmscale.errors import CheckpointError
from tests.checkpoint.hand_made import write_checkpoint

pytestmark = pytest.mark.usefixtures("no_sync")

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def cut(draw: Any, size: int) -> list[tuple[int, int] | None]:
    """Draw a range for each of three ranks, which cover every value once; None for a rank without values."""
    ends = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
    ranges = [*zip([0, *ends], [*ends, size], strict=True)]
    return [(low, high) if low < high else None for low, high in draw(st.permutations(ranges))]


@st.composite
def kept(draw: Any) -> tuple[int, dict[str, list[tuple[int, int] | None]]]:
    """Draw a number of values, and the ranges of each kind by rank. In half of the cases, one range is wrong."""
    size = draw(st.integers(1, 9))
    ranges = {kind: cut(draw, size) for kind in KINDS}
    if draw(st.booleans()):
        kind, rank = draw(st.sampled_from(KINDS)), draw(st.integers(0, 2))
        low = draw(st.integers(0, size - 1))
        ranges[kind][rank] = (low, draw(st.integers(low + 1, size)))
    return size, ranges


def write(folder: Path, size: int, ranges: dict[str, list[tuple[int, int] | None]]) -> Path:
    values = {kind: torch.arange(float(size)) + 100 * number for number, kind in enumerate(KINDS)}
    pieces: list[list[TensorPiece]] = [[], [], []]
    for kind, by_rank in ranges.items():
        for rank, part in enumerate(by_rank):
            if part is not None:
                pieces[rank].append(TensorPiece(f"w|{kind}", part[0], values[kind][part[0] : part[1]]))
    return write_checkpoint(folder, pieces, {"w": (size,), "none": (0, 4)}, ema=True)


@given(kept())
@settings(max_examples=60)
def test_verify_finds_a_value_of_any_kind_that_is_not_there_once(
    case: tuple[int, dict[str, list[tuple[int, int] | None]]],
) -> None:
    size, ranges = case
    wrong = [
        kind
        for kind, by_rank in ranges.items()
        if any(sum(part is not None and part[0] <= i < part[1] for part in by_rank) != 1 for i in range(size))
    ]
    with tempfile.TemporaryDirectory() as name:
        problems = verify(write(Path(name), size, ranges))
    assert sorted(problem.partition(":")[0] for problem in problems) == sorted(f"w|{kind}" for kind in wrong)


@given(st.data())
@settings(max_examples=30)
def test_any_range_of_any_kind_is_read_from_any_cut(data: Any) -> None:
    size = data.draw(st.integers(1, 9))
    ranges = {kind: cut(data.draw, size) for kind in KINDS}
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start, size))
    with tempfile.TemporaryDirectory() as name, CheckpointReader(write(Path(name), size, ranges)) as reader:
        for number, kind in enumerate(KINDS):
            target = torch.full((stop - start,), -1.0)
            reader.fill(target, "w", kind, start)
            assert target.tolist() == [100.0 * number + i for i in range(start, stop)]
        past = torch.full((2,), -1.0)
        with pytest.raises(CheckpointError, match=r"w\|ema has only 1 of the values"):
            reader.fill(past, "w", "ema", size - 1)
