"""Projectors that pool squares of patches, against torch's pooling and convolution of one frame at a time.

Measured worst cases in float32, relative to the largest value: 2.4e-7 in features, 2.7e-7 in gradients.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.tilings import MolmoTiling
from data_pipeline.media_spec import MediaSpec, Placement, SquarePooling
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import ConvPoolConfig, MeanPoolConfig, ProjectorConfig
from mmscale.nn.init import initialise_
from tests.models.packs import image_document, pack
from tests.models.reference_models import distance
from tests.models.tiny import DECODER, TILED, VISION, VOCAB, config
from tests.parity_table import Recorder

WIDTH, DIM = 6, 5
GRIDS = [(1, 4, 6), (2, 5, 7), (1, 4, 5), (3, 3, 2)]
RULES = list(itertools.product(["drop", "pad"], repeat=2))
parse = TypeAdapter[ConvPoolConfig | MeanPoolConfig](ProjectorConfig).validate_python


def expected(net: Any, settings: ConvPoolConfig | MeanPoolConfig, frame: Tensor) -> Tensor:
    """Return the features of one frame ``(1, C, height, width)``."""
    side, (height, width) = settings.side, frame.shape[2:]
    if settings.last_rows == "drop":
        frame = frame[:, :, : height // side * side]
    if settings.last_columns == "drop":
        frame = frame[..., : width // side * side]
    if isinstance(settings, MeanPoolConfig):
        pooled = F.avg_pool2d(frame, side, ceil_mode=True, count_include_pad=False)
    else:
        frame = F.pad(frame, (0, -frame.shape[3] % side, 0, -frame.shape[2] % side))
        kernel = net.conv.weight.view(-1, side, side, frame.shape[1]).permute(0, 3, 1, 2)
        pooled = F.conv2d(frame, kernel, net.conv.bias, stride=side)
    return net.fc2(F.gelu(net.fc1(pooled[0].flatten(1).t())))


@pytest.mark.parity
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("rows_columns", RULES, ids="-".join)
@pytest.mark.parametrize("kind", ["mean_pool", "conv_pool"])
def test_packed_crops_equal_one_frame_at_a_time(
    kind: str, rows_columns: tuple[str, str], side: int, parity: Recorder
) -> None:
    rows, columns = rows_columns
    settings = parse({"kind": kind, "side": side, "last_rows": rows, "last_columns": columns, "hidden_dim": 9})
    grids = [grid for grid in GRIDS if min(settings.pooling.features(*grid[1:]))]
    net = settings.build(WIDTH, DIM)
    initialise_(net, 3)
    features = torch.randn(sum(t * h * w for t, h, w in grids), WIDTH, generator=torch.Generator().manual_seed(1))
    mine, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    found = net(mine, grids)
    frames = [(height, width) for time, height, width in grids for _ in range(time)]
    parts = theirs.split([height * width for height, width in frames])
    images = [part.t().reshape(1, WIDTH, *frame) for part, frame in zip(parts, frames, strict=True)]
    reference = torch.cat([expected(net, settings, image) for image in images])
    spec = MediaSpec(Placement.EMBEDDING, pooling=settings.pooling)
    assert len(found) == sum(map(spec.num_features, grids))
    parity(kind, "features", distance(found, reference), 1e-6)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(found, [mine, *net.parameters()], weights)
    gradients = torch.autograd.grad(reference, [theirs, *net.parameters()], weights)
    for one, other in zip(ours, gradients, strict=True):
        parity(kind, "gradients", distance(one, other), 2e-6)


@pytest.mark.parametrize(
    ("pads", "count"), [((False, False), 169), ((False, True), 182), ((True, False), 182), ((True, True), 196)]
)
def test_a_crop_of_384_pixels_has_182_features_only_if_one_side_is_padded(pads: tuple[bool, bool], count: int) -> None:
    spec = MediaSpec(Placement.EMBEDDING, 14, fixed_grid=(27, 27), pooling=SquarePooling(2, *pads))
    assert spec.num_features((1, 27, 27)) == count


@pytest.mark.parametrize("kind", ["mean_pool", "conv_pool"])
def test_each_document_of_a_pack_has_the_hidden_rows_that_it_has_alone(kind: str) -> None:
    net = build_model(config("embedding", projector={"kind": kind, "last_columns": "pad"}))
    spec = media_spec(net.config)
    assert (spec.merge, spec.minimal_grid, spec.feature_grid((2, 5, 7))) == (1, (1, 2, 2), (2, 2, 4))
    docs = [image_document(spec, 1, 5, [(2, 3), (5, 4)], VOCAB), image_document(spec, 2, 4, [(3, 3)], VOCAB)]
    together = net(pack(docs, spec)).hidden
    alone = torch.cat([net(pack([doc], spec)).hidden for doc in docs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_what_has_no_square_is_refused() -> None:
    spec = MediaSpec(Placement.EMBEDDING, pooling=SquarePooling(2, pads_columns=True))
    with pytest.raises(SampleError, match="a crop of 1x9 patches has no whole square of 2 patches a side"):
        spec.num_features((1, 1, 9))
    learned = {**VISION, "positions": {"kind": "learned", "grid": [2, 4]}}
    with pytest.raises(ValidationError, match=r"side=3: the tower's crops of \[2, 4\] patches have no whole square"):
        config("embedding", vision=learned, projector={"kind": "mean_pool", "side": 3})
    with pytest.raises(DataConfigError, match="pools each crop as a whole"):
        MolmoTiling().check(28, spec)
    ahead = {"kind": "cross_attention", "every": 2, "unseen_text": "looks_ahead", "projector": {"kind": "conv_pool"}}
    tower = {**TILED, "class_feature": False}
    with pytest.raises(ValidationError, match="needs a projector of kind linear, mlp or attention_pool, not conv_pool"):
        ModelConfig.model_validate({"decoder": DECODER, "vision": tower, "connector": ahead})
