"""Dropout of attention probabilities: the formula written out, masks that depend on the lane alone, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Segments
from mmscale.errors import UnsupportedError
from mmscale.models.build import media_spec
from mmscale.nn.attention_backends import check_dropout, varlen_attention
from mmscale.nn.dropout import Dropout
from tests.models.packs import in_lane, pack, text_document
from tests.models.tiny import VOCAB, model

RATE = 0.25


def masks(rows: int, block: int = 3) -> Dropout:
    whole = Dropout.for_microbatch(0.0, (1, 7), (2,), (rows,), torch.device("cpu"))
    return replace(whole.for_block(block), attention_rate=RATE)


def test_attention_is_that_of_the_kept_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(9, heads, 4, generator=generator) for heads in (4, 2, 2))
    q.requires_grad_()
    segments, dropout = Segments.from_lengths([3, 1, 5]), masks(9)
    found = varlen_attention(q, k, v, segments, segments, True, "sdpa", dropout)
    for first, stop in ((0, 3), (3, 4), (4, 9)):
        length = stop - first
        kept = dropout.on_probabilities(torch.ones(4, length, length), first)
        assert {round(each, 5) for each in kept.flatten().tolist()} <= {0.0, round(1 / (1 - RATE), 5)}
        for head in range(4):
            scores = q[first:stop, head] @ k[first:stop, head // 2].T / 2
            causal = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
            expected = (causal.softmax(1) * kept[head]) @ v[first:stop, head // 2]
            torch.testing.assert_close(found[first:stop, head], expected)
    without = varlen_attention(q, k, v, segments, segments, True, "sdpa", replace(dropout, attention_rate=0.0))
    torch.testing.assert_close(without, varlen_attention(q, k, v, segments, segments, True, "sdpa"))


def test_masks_have_the_rate_and_are_independent() -> None:
    ones = torch.ones(4, 64, 200)
    first, second = (masks(64, block).on_probabilities(ones, 0) == 0 for block in (0, 1))
    assert abs(float(first.float().mean()) - RATE) < 0.01  # Five standard deviations.
    pairs = {"heads": (first[0], first[1]), "rows": (first[:, 0], first[:, 1]), "keys": (first[..., 0], first[..., 1])}
    for one, other in (*pairs.values(), (first, second)):
        assert abs(float((one & other).float().mean()) - RATE**2) < 0.06
    assert (masks(64, 0).on_probabilities(ones[:, :8], 5) == 0).equal(first[:, 5:13])


def outputs(net: torch.nn.Module, documents: list, lane: int = 2) -> list[Tensor]:
    batch = in_lane(pack(documents, media_spec(net.config)), lane, (1, 7))  # type: ignore[arg-type]
    return list(net(batch).hidden.split([len(document.tokens) for document in documents]))


def test_a_row_has_the_same_mask_wherever_it_is_computed() -> None:
    net = model(None, attention_dropout=RATE).train()
    documents = [text_document(seed, 6 + seed, VOCAB) for seed in range(3)]
    whole = outputs(net, documents)
    torch.testing.assert_close(outputs(net, documents[:1])[0], whole[0])
    assert not torch.allclose(outputs(net, documents, lane=3)[0], whole[0])
    torch.testing.assert_close(outputs(net.eval(), documents)[1], outputs(model(None).eval(), documents)[1])


def test_a_kernel_that_cannot_is_refused() -> None:
    check_dropout("flash", 0.0)
    with pytest.raises(
        UnsupportedError, match=r"attention_dropout=0\.25: flash draws masks .* set engine.attention=sdpa"
    ):
        check_dropout("flash", RATE)
