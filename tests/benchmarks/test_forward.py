"""The benchmark of forward passes builds every family, and both sides have equal outputs before the timing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import forward
from benchmarks.families import multimodal, texts, towers

SEEING = [name for name, _ in multimodal.pairs() if name != "mllama"]
SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in (texts.SIZES, towers.SIZES):
        for key, value in SMALL.items():
            monkeypatch.setitem(sizes, key, value)
    monkeypatch.setitem(texts.SIZES, "vocab_size", 300)
    monkeypatch.setitem(texts.LENGTHS, "mixed", (5, 19, 2))
    monkeypatch.setattr(towers, "IMAGES", 2)


@pytest.mark.parametrize(
    "family", ["qwen2", "mllama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clip", *SEEING))]
)
def test_both_sides_compute_the_same(family: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    build = forward.families()[family][0]
    first, second = forward.measure(build(), turns=1)
    assert (first.kind, second.kind) == ("forward", "training")
    assert 0 < first.difference < forward.TOLERANCE
    pair = build()
    with torch.no_grad():
        list(pair.ours.parameters())[-1].mul_(1.5)  # A norm may undo a change of the first parameters.
    with pytest.raises(RuntimeError, match="outputs differ"):
        next(forward.measure(pair, turns=1))
