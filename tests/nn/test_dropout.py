"""Dropout masks: the hash in plain integers, the rate, independence, and a block written out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from data_pipeline.batch import Segments
from mmscale.nn.attention_backends import resolve_backend
from mmscale.nn.block import AttentionConfig, DenseMlpConfig, NormConfig, NormPlacement, TransformerBlock
from mmscale.nn.dropout import Dropout, SubLayer

CPU = torch.device("cpu")
WORD = 2**64 - 1


def splitmix(state: int) -> int:
    """Return the next number of a SplitMix64 generator at ``state``, as published."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def masks(seed: int = 1, step: int = 0, lane: int = 0, rate: float = 0.5, rows: int = 64) -> Dropout:
    return Dropout.for_microbatch(rate, (seed, step), [lane], [rows], CPU)


@pytest.mark.parametrize(
    ("block", "branch"), [(0, SubLayer.ATTENTION), (5, SubLayer.FEED_FORWARD), (-2, SubLayer.ATTENTION)]
)
def test_masks_are_the_published_hash(block: int, branch: SubLayer) -> None:
    rate, dim, lanes, counts = 0.3, 10, (3, -1, 7), (4, 1, 3)
    found = Dropout.for_microbatch(rate, (11, 2), lanes, counts, CPU).for_block(block).dropped(branch, dim)
    increment = 0x9E3779B97F4A7C15
    expected = []
    for lane, count in zip(lanes, counts, strict=True):
        start = splitmix(splitmix(splitmix(11) ^ 2) ^ splitmix(lane & WORD))
        for row in range(count):
            key = splitmix(start + row * increment)
            bits: list[int] = []
            for word in range(3):  # Four channels per word: ten channels need three words.
                value = splitmix(key + ((2 * block + branch) * 3 + word) * increment)
                bits += [
                    int.from_bytes(value.to_bytes(8, "little")[i : i + 2], "little", signed=True) for i in (0, 2, 4, 6)
                ]
            expected.append([(bit + 2**15) / 2**16 < round(rate * 2**16) / 2**16 for bit in bits[:dim]])
    assert found.tolist() == expected


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_share_scale_and_gradient(rate: float) -> None:
    values = torch.randn(512, 256, dtype=torch.float64, requires_grad=True)
    dropout = masks(rate=rate, rows=512)
    out = dropout(values, SubLayer.ATTENTION)
    dropped = dropout.dropped(SubLayer.ATTENTION, 256)
    count = dropped.numel()
    assert abs(dropped.double().mean().item() - rate) < 5 * (rate * (1 - rate) / count) ** 0.5 + 2**-17
    assert not out[dropped].any()
    torch.testing.assert_close(out[~dropped], values[~dropped] / (1 - rate), rtol=2**-16 / (1 - rate), atol=0)
    # Over many steps the mean equals the values without dropout: the scale uses the rounded rate.
    scale = (out[~dropped] / values[~dropped])[0].item()
    assert scale * (1 - round(rate * 2**16) / 2**16) == pytest.approx(1, rel=1e-12)
    out.sum().backward()
    torch.testing.assert_close(values.grad, (~dropped).double() * scale)


def test_the_mean_over_steps_is_the_value_itself() -> None:
    values = torch.randn(8, 32)
    steps = 4000
    total = sum(masks(step=step, rate=0.25, rows=8)(values, SubLayer.ATTENTION) for step in range(steps))
    error = (total / steps - values) / values  # Standard deviation of one step: sqrt(rate / (1 - rate)) = 0.58.
    assert error.abs().max() < 5 * 0.58 / steps**0.5
    assert error.std() == pytest.approx(0.577 / steps**0.5, rel=0.2)


def test_masks_are_independent_between_blocks_branches_rows_lanes_steps_and_seeds() -> None:
    plain = masks()
    found = {"plain": plain.dropped(SubLayer.ATTENTION, 256)}
    found["branch"] = plain.dropped(SubLayer.FEED_FORWARD, 256)
    found |= {f"block {b}": plain.for_block(b).dropped(SubLayer.ATTENTION, 256) for b in (1, 2, -1, -2)}
    found |= {f"step {s}": masks(step=s).dropped(SubLayer.ATTENTION, 256) for s in (1, 2, 1 << 40)}
    found |= {f"lane {lane}": masks(lane=lane).dropped(SubLayer.ATTENTION, 256) for lane in (1, 2, -1)}
    found |= {f"seed {s}": masks(seed=s).dropped(SubLayer.ATTENTION, 256) for s in (0, 2)}
    found |= {"other rows": plain.dropped(SubLayer.ATTENTION, 256).roll(1, 0)}
    found |= {"other channels": plain.dropped(SubLayer.ATTENTION, 256).roll(1, 1)}
    found |= {"other words": plain.dropped(SubLayer.ATTENTION, 256).roll(4, 1)}
    signs = {name: mask.double().flatten() * 2 - 1 for name, mask in found.items()}
    for (one, first), (other, second) in itertools.combinations(signs.items(), 2):
        assert abs((first @ second).item()) < 5 * len(first) ** 0.5, (one, other)
    # Sums over rows and columns also have the variance of independent bits.
    mask = masks(rows=1024).dropped(SubLayer.ATTENTION, 256).double()
    assert mask.mean(0).std().item() == pytest.approx(0.5 / 1024**0.5, rel=0.2)
    assert mask.mean(1).std().item() == pytest.approx(0.5 / 256**0.5, rel=0.2)


def test_no_generator_is_drawn_from() -> None:
    before = torch.get_rng_state()
    masks().dropped(SubLayer.ATTENTION, 16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_masks_are_the_same_on_cuda(gpu: torch.device) -> None:
    """Dropout masks are bitwise those of the CPU."""
    arguments = (0.3, (1, 2), (4, 0), (100, 37))
    here, there = (Dropout.for_microbatch(*arguments, where).for_block(3) for where in (torch.device("cpu"), gpu))
    for branch in SubLayer:
        assert torch.equal(here.dropped(branch, 70), there.dropped(branch, 70).cpu())


@pytest.mark.parametrize("placement", NormPlacement)
def test_a_block_with_given_masks_is_the_block_written_by_hand(placement: NormPlacement) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(
        16,
        AttentionConfig(num_heads=2),
        DenseMlpConfig(hidden_dim=24),
        NormConfig(),
        resolve_backend("sdpa"),
        causal=True,
        placement=placement,
        layer_scale=0.5,
    )
    hidden, segments, dropout = torch.randn(9, 16), Segments.from_lengths([4, 5]), masks(rate=0.4, rows=9)
    found, _ = block(hidden, None, segments, None, None, dropout)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + NormConfig().eps).rsqrt()

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 2, 8).transpose(0, 1)

    def attend(x: torch.Tensor) -> torch.Tensor:
        weights = block.self_attn
        q, k, v = (heads(F.linear(x, getattr(weights, f"{name}_proj").weight)) for name in "qkv")
        scores = q @ k.transpose(1, 2) / 8**0.5
        owner = torch.tensor([0] * 4 + [1] * 5)
        seen = (owner[:, None] == owner) & torch.ones(9, 9).tril().bool()
        mixed = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        return F.linear(mixed.transpose(0, 1).reshape(9, 16), weights.o_proj.weight)  # type: ignore[arg-type]

    def feed(x: torch.Tensor) -> torch.Tensor:
        mlp = block.mlp
        gate, up = (F.linear(x, getattr(mlp, f"{name}_proj").weight) for name in ("gate", "up"))
        return F.linear(F.silu(gate) * up, mlp.down_proj.weight)  # type: ignore[arg-type, union-attr]

    keep = [~dropout.dropped(branch, 16) / (1 - round(0.4 * 2**16) / 2**16) for branch in SubLayer]
    x = hidden
    for sub_layer, mask in zip((attend, feed), keep, strict=True):
        branch = sub_layer(norm(x)) if placement is NormPlacement.PRE else norm(sub_layer(x))
        x = x + mask * 0.5 * branch
    torch.testing.assert_close(found, x)
    without, _ = block(hidden, None, segments)
    assert (found - without).abs().max() > 0.1


def test_masks_of_choices_depend_on_row_and_expert_alone() -> None:
    whole = masks(rows=40).for_block(3)
    rows, experts = torch.arange(40).repeat_interleave(2), torch.arange(80) % 7
    found = whole.for_choices(0.25, rows, experts).dropped(SubLayer.FEED_FORWARD, 64)
    order = torch.randperm(80)[:50]
    some = whole.for_choices(0.25, rows[order], experts[order])
    assert torch.equal(some.dropped(SubLayer.FEED_FORWARD, 64), found[order])
    halves = [part.dropped(SubLayer.FEED_FORWARD, 64) for part in some.split([20, 30])]
    assert torch.equal(torch.cat(halves), found[order])
    assert found.float().mean().item() == pytest.approx(0.25, abs=0.02)
    others = [
        whole.for_choices(0.25, rows, experts + 1),
        whole.for_block(4).for_choices(0.25, rows, experts),
        replace(whole, rate=0.25, rows=whole.rows[rows]),
    ]
    for other in others:  # Independent masks agree in 0.75^2 + 0.25^2 of the values.
        agree = (other.dropped(SubLayer.FEED_FORWARD, 64) == found).float().mean().item()
        assert agree == pytest.approx(0.625, abs=0.03)


def test_jitter_is_uniform_around_one() -> None:
    numbers = masks(rows=512).for_block(1)
    factors = numbers.jitter(0.1, 100)
    assert factors.dtype is torch.float32
    assert factors.min() > 0.9
    assert factors.max() < 1.1
    assert factors.mean().item() == pytest.approx(1, abs=1e-3)
    assert factors.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert not torch.equal(factors, numbers.for_block(2).jitter(0.1, 100))
    above = numbers.dropped(SubLayer.FEED_FORWARD, 100) == (factors < 1)  # Rate 0.5: equal bits would always agree.
    assert above.float().mean().item() == pytest.approx(0.5, abs=0.01)
