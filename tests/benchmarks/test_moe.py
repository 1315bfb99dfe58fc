"""The benchmark of experts: both blocks compute the same function, and a tiny run gives every value."""

from __future__ import annotations

import torch

from benchmarks import moe
from benchmarks.steps.reference_models import CHOSEN, EXPERT_MLP, EXPERTS, our_config
from mmscale.models.build import count_parameters
from mmscale.nn.router import RoutedRows


def test_all_blocks_compute_the_same() -> None:
    blocks = [moe.their_block(12, name) for name in ("eager", "grouped_mm")]
    ours = moe.our_block(12, blocks[0])
    hidden = torch.randn(20, moe.DIM)
    with torch.no_grad():
        outputs = [block(hidden[None])[0] for block in blocks]
        mine = ours(hidden, RoutedRows.text(torch.ones(20, dtype=torch.bool)))[0]
    for output in outputs:
        assert output.abs().max() > 1e-3
        torch.testing.assert_close(mine, output, rtol=1e-4, atol=1e-6)


def test_a_tiny_run_gives_every_side() -> None:
    case = moe.measure_block(12, torch.float32, tokens=20, turns=2)
    assert case.case == "block, 12 experts, float32, 20 tokens"
    assert set(case.peers) == {"hugging face eager", "hugging face grouped_mm"}
    assert case.ours > 0
    assert case.ratio == case.paired


def test_the_dense_model_has_the_active_parameters_of_the_one_with_experts() -> None:
    experts, dense = (count_parameters(our_config(model)) for model in ("olmoe", "active"))
    decoder = our_config("olmoe").decoder
    assert experts.active - dense.total == decoder.num_layers * EXPERTS * decoder.hidden_dim  # The routers.
    unused = (EXPERTS - CHOSEN) * 3 * EXPERT_MLP * decoder.hidden_dim
    assert experts.total - experts.active == decoder.num_layers * unused
