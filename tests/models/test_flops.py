"""The operation formula against torch's counter, which sees every matrix product that really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmscale.models.build import build_model, media_spec
from mmscale.models.flops import cost_per_patch
from tests.models.packs import image_document, pack
from tests.models.tiny import CONNECTORS, DENSE, LEARNED, MOE, VOCAB, config

WIDE = {"attention": {"num_heads": 8, "num_kv_heads": 4}, "hidden_dim": 64}
EVERY_SECOND = {**MOE, "every": 2, "dense": DENSE}


@pytest.mark.parametrize(
    "variant", [{}, {"mlp": MOE}, {"mlp": EVERY_SECOND}, {"vision": LEARNED}], ids=["dense", "moe", "second", "learned"]
)
@pytest.mark.parametrize("kind", [None, *CONNECTORS])
def test_formula_equals_the_counter(kind: str | None, variant: dict[str, Any]) -> None:
    settings = config(kind, **{**WIDE, **variant})
    net, spec = build_model(settings), media_spec(settings)
    grid = (2, 4)
    # Documents of one length: the kernel then pads nothing, and what it computes is what the formula counts.
    views = [] if kind is None else [grid, grid]
    batch = pack([image_document(spec, n, 40, views, VOCAB) for n in range(3)], spec)
    # The fused CPU kernel is unknown to the counter; the plain one is two matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net.head(net(batch).hidden)
    assert net.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_cost_of_a_patch_is_its_share_of_the_products() -> None:
    """From counters alone: the operations that one more patch and one more token add, attention left out."""
    settings = config("embedding", **WIDE)
    net, spec = build_model(settings), media_spec(settings)

    def counted(text: int, size: tuple[int, int]) -> float:
        batch = pack([image_document(spec, 1, text, [size], VOCAB)], spec)
        tokens, patches = batch.segments.total, size[0] * size[1]
        attention = 4 * (4 * tokens**2 * 64 + 2 * patches**2 * 24)  # (layers, area, width) of both towers
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            net.head(net(batch).hidden)
        return counter.get_total_flops() - attention

    token = (counted(50, (2, 2)) - counted(30, (2, 2))) / 20
    features = (24 - 4) // 4
    patch = (counted(50, (4, 6)) - counted(50, (2, 2)) - features * token) / 20
    assert cost_per_patch(settings) == pytest.approx(patch / token, rel=0.01)
    assert media_spec(settings).cost_per_patch == cost_per_patch(settings)
    assert cost_per_patch(config(None)) == 0
