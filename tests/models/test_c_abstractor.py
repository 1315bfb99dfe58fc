"""The C-Abstractor against a reference model: one image at a time, channels first, with torch's convolutions.

The reference follows Honeybee's projectors.py and timm's RegNet. If timm is installed, its blocks check the reference.
Measured worst cases in float32, relative to the largest value: 3.6e-7 in features, 9.4e-7 in gradients.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.media_spec import MediaSpec, Placement
from mmscale.models.build import build_model, media_spec
from mmscale.models.connector_config import CAbstractorConfig
from mmscale.models.connectors.c_abstractor import CAbstractor, by_grid
from mmscale.nn.init import initialise_
from tests.models.packs import image_document, pack
from tests.models.reference_models import distance, randomise, rounding_ratio
from tests.models.tiny import POOLED, VOCAB, config
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
WIDTH, INNER, DIM, SIDE = 24, 32, 40, 3
GRIDS = [(1, 4, 6), (1, 7, 5), (2, 4, 6), (1, 2, 9), (1, 7, 5)]  # The third is a video of two frames.


class ChannelNorm(nn.LayerNorm):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_norm(inputs: int, outputs: int, side: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups, bias=False), ChannelNorm(outputs)
    )


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, channels)
        self.conv2 = conv_norm(channels, channels, 3, groups=channels)
        self.fc1 = nn.Conv2d(channels, round(inputs * 0.25), 1)
        self.fc2 = nn.Conv2d(round(inputs * 0.25), channels, 1)
        self.conv3 = conv_norm(channels, channels)
        self.downsample = conv_norm(inputs, channels) if inputs != channels else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        branch = F.silu(self.conv2(F.silu(self.conv1(image))))
        branch = branch * self.fc2(F.silu(self.fc1(branch.mean((2, 3), keepdim=True)))).sigmoid()
        return F.silu(self.conv3(branch) + self.downsample(image))


class ReferenceCAbstractor(nn.Module):
    """``CAbstractor`` and ``build_mlp`` of Honeybee."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        inputs = [WIDTH] + [INNER] * (depth - 1)
        self.s1 = nn.Sequential(*(Bottleneck(channels, INNER) for channels in inputs))
        self.s2 = nn.Sequential(*(Bottleneck(INNER, INNER) for _ in range(depth)))
        self.readout = nn.Sequential(nn.Linear(INNER, DIM), nn.SiLU(), nn.Linear(DIM, DIM))

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.s2(nn.AdaptiveAvgPool2d((SIDE, SIDE))(self.s1(image)))
        return self.readout(pooled.flatten(2).transpose(1, 2))


TABLE = [
    ("before", "s1"),
    ("behind", "s2"),
    ("fc1", "readout.0"),
    ("fc2", "readout.2"),
]
INSIDE = {
    "conv1": "conv1.0",
    "norm1": "conv1.1",
    "conv2": "conv2.0",
    "norm2": "conv2.1",
    "se.fc1": "fc1",
    "se.fc2": "fc2",
    "conv3": "conv3.0",
    "norm3": "conv3.1",
    "shortcut": "downsample",
}


def their_name(name: str) -> str:
    head, *rest = name.split(".")
    outside = dict(TABLE)[head]
    if head in ("fc1", "fc2"):
        return f"{outside}.{rest[0]}"
    number, inside = rest[0], ".".join(rest[1:])
    mine = next(key for key in INSIDE if inside.startswith(key))
    return f"{outside}.{number}.{INSIDE[mine]}{inside.removeprefix(mine)}"


def pair(depth: int) -> tuple[CAbstractor, ReferenceCAbstractor]:
    ours = CAbstractor(WIDTH, DIM, CAbstractorConfig(side=SIDE, hidden_dim=INNER, depth=depth))
    theirs = ReferenceCAbstractor(depth)
    randomise(theirs)
    held = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(held[their_name(name)].view(parameter.shape))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    return ours, theirs


def rows(grids: list[tuple[int, int, int]]) -> Tensor:
    count = sum(time * height * width for time, height, width in grids)
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2))


def one_by_one(theirs: ReferenceCAbstractor, features: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    frames = [(height, width) for time, height, width in grids for _ in range(time)]
    parts = features.split([height * width for height, width in frames])
    return torch.cat([theirs(part.t().reshape(1, -1, *side))[0] for part, side in zip(parts, frames, strict=True)])


@pytest.mark.parametrize("grids", [GRIDS, [(1, 6, 6)] * 3, [(1, 1, 1)]], ids=["mixed", "alike", "smallest"])
def test_packed_crops_equal_one_image_at_a_time(grids: list[tuple[int, int, int]], parity: Recorder) -> None:
    ours, theirs = pair(depth=3)
    mine, reference = rows(grids).requires_grad_(), rows(grids).requires_grad_()
    found, expected = ours(mine, grids), one_by_one(theirs, reference, grids)
    assert found.shape == (sum(time for time, _, _ in grids) * SIDE**2, DIM)
    parity("c_abstractor", "features", distance(found, expected), 2e-6)
    output_gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    found.backward(output_gradient)
    expected.backward(output_gradient)
    held = dict(theirs.named_parameters())
    pairs = [(mine.grad, reference.grad)]
    pairs += [(p.grad, held[their_name(name)].grad) for name, p in ours.named_parameters()]
    largest = max(float(theirs.abs().max()) for _, theirs in pairs if theirs is not None)
    for gradient, their in pairs:
        assert gradient is not None
        assert their is not None
        difference = float((gradient - their.view(gradient.shape)).abs().max())
        parity("c_abstractor", "gradients", difference / max(float(their.abs().max()), 1e-3 * largest), 4e-6)


def test_bfloat16_error_is_no_larger_than_that_of_the_reference(parity: Recorder) -> None:
    """RMS error of bfloat16 against float32, relative to the reference's; only convolutions round differently."""
    ours, theirs = pair(depth=3)
    with torch.no_grad():
        expected = one_by_one(theirs.bfloat16().float(), rows(GRIDS).bfloat16().float(), GRIDS)
        found = ours.bfloat16()(rows(GRIDS).bfloat16(), GRIDS)
        their = one_by_one(theirs.bfloat16(), rows(GRIDS).bfloat16(), GRIDS)
    parity(
        "c_abstractor", "bfloat16, error over that of the reference", rounding_ratio([(found, their, expected)]), 1.05
    )


def test_the_reference_equals_the_blocks_of_timm() -> None:
    regnet = pytest.importorskip("timm.models.regnet")
    from timm.layers import LayerNorm2d

    theirs = regnet.RegStage(3, WIDTH, INNER, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
    reference = ReferenceCAbstractor(3)
    randomise(theirs)
    with torch.no_grad():
        for mine, other in zip(reference.s1.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other)
    image = torch.randn(2, WIDTH, 5, 7)
    torch.testing.assert_close(reference.s1(image), theirs(image), atol=1e-5, rtol=1e-5)


def test_frames_are_sorted_by_grid_and_put_back() -> None:
    planes, order = by_grid(GRIDS)
    assert planes == [(3, 4, 6), (2, 7, 5), (1, 2, 9)]
    assert order is not None
    assert order.tolist() == [0, 2, 3, 1, 5, 4]
    assert by_grid([(1, 4, 6), (2, 4, 6), (1, 3, 3)]) == ([(3, 4, 6), (1, 3, 3)], None)


def test_the_number_of_features_does_not_depend_on_the_grid() -> None:
    net = build_model(config("embedding", projector=POOLED))
    spec = media_spec(net.config)
    assert (spec.merge, spec.pooled_side) == (1, 3)
    assert {spec.num_features((1, *grid)) for grid in [(1, 1), (2, 5), (48, 48)]} == {9}
    assert spec.feature_grid((2, 5, 7)) == (2, 3, 3)
    docs = [image_document(spec, 1, 5, [(2, 3), (4, 4)], VOCAB), image_document(spec, 2, 4, [(2, 3)], VOCAB)]
    together = net(pack(docs, spec)).hidden
    alone = torch.cat([net(pack([doc], spec)).hidden for doc in docs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_first_values_have_the_scale_of_their_fan_in() -> None:
    module = CAbstractor(256, 64, CAbstractorConfig(side=2, hidden_dim=256, depth=1))
    initialise_(module, 1)
    conv = module.before[0].conv2.weight  # type: ignore[union-attr]
    assert conv.std().item() == pytest.approx(1 / 3, rel=0.05)
    assert torch.equal(module.before[0].norm1.weight, torch.ones(256))  # type: ignore[union-attr, arg-type]


def test_the_data_side_refuses_what_overlaps() -> None:
    from data_pipeline.errors import DataConfigError
    from data_pipeline.images.tilings import MolmoTiling

    with pytest.raises(DataConfigError, match="pools each crop as a whole"):
        MolmoTiling().check(28, MediaSpec(Placement.EMBEDDING, 2, pooled_side=3))
