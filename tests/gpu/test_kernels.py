"""Every kernel of a GPU against the same computation on the CPU in float32: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Segments
from mmscale.doctor.kernels import kernels
from mmscale.nn.attention_backends import Backend, varlen_attention
from mmscale.nn.block import ACTIVATIONS, Activation
from mmscale.nn.experts import _ExpertLoop, _Gate, _GroupedExperts

KERNELS = [pytest.param("flash", marks=pytest.mark.flash), "torch_varlen", "sdpa"]


def assert_near(found: Tensor, expected: Tensor, roundings: float = 4) -> None:
    """Equal within roundings of the largest value."""
    worst = (found.detach().float().cpu() - expected.detach().float()).abs().max()
    assert worst <= roundings * torch.finfo(found.dtype).eps * expected.abs().max()


def on(device: torch.device, segments: Segments) -> Segments:
    return Segments(segments.cu.to(device), segments.bounds)


@pytest.mark.gpu
def test_the_doctor_finds_no_wrong_kernel(gpu: torch.device) -> None:
    """Attention, experts, head and loss, norm, and fused AdamW against float64, in bf16 and fp16."""
    wrong = [line for line in kernels(gpu) if line.status != "ok"]
    assert wrong == []


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("causal", "lengths", "key_lengths", "heads", "key_heads", "size"),
    [
        (True, [5, 64, 200, 1], None, 4, 2, 64),
        (True, [33, 1, 140], None, 8, 8, 128),
        (False, [100, 7, 100], None, 4, 4, 80),  # ViT-H: 1,280 channels in 16 heads.
        (False, [9, 30, 4], [0, 128, 17], 4, 1, 64),  # Cross-attention; the first document has no image.
        (True, [1, 3, 20], [40, 3, 64], 4, 2, 128),  # Branches: fewer queries than keys.
        (False, [65], None, 2, 2, 256),
    ],
    ids=["grouped", "equal heads", "tower", "cross", "branches", "widest"],
)
def test_attention_equals_the_cpu(
    gpu: torch.device,
    backend: Backend,
    causal: bool,
    lengths: list[int],
    key_lengths: list[int] | None,
    heads: int,
    key_heads: int,
    size: int,
) -> None:
    """Each attention kernel for the head sizes, cross-attention, branches and documents without keys of our models."""
    queries, keys = Segments.from_lengths(lengths), Segments.from_lengths(key_lengths or lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries.total, heads), (keys.total, key_heads), (keys.total, key_heads))
    exact = [torch.randn(*shape, size, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    ours = [each.detach().bfloat16().to(gpu).requires_grad_() for each in exact]
    grad = torch.randn(exact[0].shape, generator=generator).bfloat16()
    expected = varlen_attention(*exact, queries, keys, causal, "sdpa")
    found = varlen_attention(*ours, on(gpu, queries), on(gpu, keys), causal, backend)
    assert_near(found, expected)
    right = torch.autograd.grad(expected, exact, grad.float())
    for one, other in zip(torch.autograd.grad(found, ours, grad.to(gpu)), right, strict=True):
        assert_near(one, other, roundings=6)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU])
def test_grouped_experts_equal_the_loop_on_the_cpu(gpu: torch.device, activation: Activation) -> None:
    """``grouped_mm`` with an expert without rows, forward and backward, against one product after the other."""
    counts, dim, width = torch.tensor([40, 0, 65, 23, 0]), 64, 96
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (int(counts.sum()), dim),
        "weights": (int(counts.sum()),),
        "gate_up": (len(counts), 2 * width, dim),
        "down": (len(counts), dim, width),
    }
    exact = [
        (torch.randn(shape, generator=generator) / (dim**0.5 if name in ("gate_up", "down") else 1))
        .bfloat16()
        .float()
        .requires_grad_()
        for name, shape in shapes.items()
    ]
    ours = [each.detach().bfloat16().to(gpu).requires_grad_() for each in exact]
    gate = _Gate(ACTIVATIONS[activation], None)
    expected = _ExpertLoop.apply(*exact, counts, gate)
    found = _GroupedExperts.apply(*ours, counts.to(gpu), gate)
    assert_near(found, expected, roundings=8)
    grad = torch.randn(expected.shape, generator=generator).bfloat16()
    right = torch.autograd.grad(expected, exact, grad.float())
    for one, other in zip(torch.autograd.grad(found, ours, grad.to(gpu)), right, strict=True):
        assert_near(one, other, roundings=8)
