"""In the benchmarks of attention, loss and dropout every peer computes the same function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import attention, dropout, loss_memory
from data_pipeline.batch import Segments
from mmscale.nn.attention_backends import varlen_attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [4, 4, 4]])
@pytest.mark.parametrize("peer", attention.PEERS)
def test_attention_of_every_peer_is_ours(peer: str, lengths: list[int], causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = Segments.from_lengths(lengths)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    upstream = torch.randn(q.shape, generator=generator)
    theirs = attention.PEERS[peer](q, k, v, segments, causal)
    ours = varlen_attention(q, k, v, segments, segments, causal, "sdpa")
    torch.testing.assert_close(theirs, ours)
    for mine, other in zip(
        torch.autograd.grad(ours, [q, k, v], upstream), torch.autograd.grad(theirs, [q, k, v], upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_losses_of_every_peer_are_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (200,), generator=generator)
    found = {}
    for name, loss in loss_memory.LOSSES.items():
        value = loss(hidden, weight, labels)
        found[name] = [value, *torch.autograd.grad(value, [hidden, weight])]
    assert set(found) == {"ours", *loss_memory.PEERS}
    for name, tensors in found.items():
        torch.testing.assert_close(tensors, found["ours"], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("peer", [dropout.ours, *dropout.PEERS.values()])
def test_dropout_of_every_peer_drops_as_many_and_keeps_the_mean(peer: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    out = peer(torch.ones(400, 100))
    spread = (dropout.RATE * (1 - dropout.RATE) / out.numel()) ** 0.5
    assert abs((out == 0).float().mean().item() - dropout.RATE) < 5 * spread
    assert out.max().item() == pytest.approx(1 / (1 - dropout.RATE), rel=1e-4)
    assert out.unique().numel() == 2
