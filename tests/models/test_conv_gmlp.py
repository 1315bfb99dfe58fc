"""Conv-GMLP equals its definition with convolutions, one item at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmscale.models.connectors.conv_gmlp import ConvGmlp, ConvGmlpProjectorConfig
from tests.models.reference_models import randomise

WIDTH, DIM = 6, 10


@pytest.mark.parametrize("rate", [2, 4, 8])
def test_it_equals_its_definition(rate: int) -> None:
    ours = ConvGmlp(WIDTH, DIM, ConvGmlpProjectorConfig(rate=rate))
    randomise(ours)
    lengths = [rate, 3 * rate + 1, rate - 1, 2 * rate, 8]
    features = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(0))
    gate, up = (
        layer.weight.view(-1, rate, WIDTH).transpose(1, 2) for layer in (ours.gmlp.gate_proj, ours.gmlp.up_proj)
    )
    expected = []
    for item in features.split(lengths):
        frames = item.t()[None]
        if len(item) < rate:
            continue
        mixed = F.silu(F.conv1d(frames, gate, stride=rate)) * F.conv1d(frames, up, stride=rate)
        for number in range(len(item) // rate):
            joined = torch.cat([*item[number * rate : (number + 1) * rate]])
            row = ours.gmlp.down_proj.weight @ mixed[0, :, number] + joined
            scaled = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt() * ours.norm.weight + ours.norm.bias
            expected.append(ours.linear.weight @ scaled + ours.linear.bias)
    found = ours(features, [(length, 1, 1) for length in lengths])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_parameters_are_those_of_baichuan_omni() -> None:
    with torch.device("meta"):
        ours = ConvGmlp(1280, 3584, ConvGmlpProjectorConfig(rate=4))
    linear = 5120 * 3584 + 3584
    assert sum(parameter.numel() for parameter in ours.parameters()) - linear == 78_653_440


def test_operations_equal_the_counter() -> None:
    config = ConvGmlpProjectorConfig(rate=4)
    ours = ConvGmlp(WIDTH, DIM, config)
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(14, WIDTH), [(9, 1, 1), (5, 1, 1)])
    features = 9 // 4 + 5 // 4
    assert features * sum(each.flops for each in config.work(WIDTH, DIM)) == counter.get_total_flops()
