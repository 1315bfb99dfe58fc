"""The resampler against ``AriaProjector`` of transformers, which pads crops to squares and masks the padding.

Distances are the largest difference over the largest value. Measured worst cases: features 2.4e-7, gradients 5.2e-7.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.tilings import MolmoTiling
from data_pipeline.media_spec import MediaSpec, Placement
from mmscale.models.build import build_model, media_spec
from mmscale.models.connector_config import ResamplerConfig
from mmscale.models.flops import cost_per_patch
from mmscale.shrink.model import shrink
from tests.models.packs import image_document, pack
from tests.models.reference_models import distance, randomise
from tests.models.tiny import RESAMPLED, VISION, VOCAB, config
from tests.parity_table import Recorder

BOUND, GRADIENT_BOUND = 2e-6, 8e-6
WIDTH, DIM = 24, 40
SIZES = [[3, 2], [8, 5]]
GRIDS = [(1, 3, 3), (1, 4, 7), (1, 2, 3), (1, 8, 8), (1, 1, 1), (1, 8, 1)]
NAMES = {
    "query_embedding": "query",
    "query_norm": "cross_attn.layer_norm",
    "key_norm": "cross_attn.layer_norm_kv",
    "q_proj": "cross_attn.q_proj",
    "k_proj": "cross_attn.k_proj",
    "v_proj": "cross_attn.v_proj",
    "attention.o_proj": "cross_attn.multihead_attn.out_proj",
    "linear": "cross_attn.linear",
    "norm": "layer_norm",
    "fc1": "feed_forward.linear_in",
    "fc2": "feed_forward.linear_out",
}


def reference_model() -> Any:
    from transformers import AriaConfig, AriaTextConfig
    from transformers.models.aria.modeling_aria import AriaProjector
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    model = AriaProjector(
        AriaConfig(
            vision_config=Idefics3VisionConfig(hidden_size=WIDTH, num_attention_heads=3),
            text_config=AriaTextConfig(hidden_size=DIM, num_attention_heads=4),
            projector_patch_to_query_dict={side**2: number for side, number in SIZES},
        )
    )
    randomise(model)
    return model


def in_our_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of their parameters by our names."""
    found = {}
    for ours, theirs in NAMES.items():
        for name, each in values.items():
            if name == theirs or name.rpartition(".")[0] == theirs:
                found[ours + name.removeprefix(theirs)] = each
    for kind in ("weight", "bias"):
        parts = values[f"cross_attn.multihead_attn.in_proj_{kind}"].chunk(3)
        found |= {f"attention.{letter}_proj.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
    return found


def padded(theirs: Any, features: Tensor) -> Tensor:
    """Return their features: each crop padded to its size class with noise, which the mask hides."""
    outputs = []
    for part, (_, height, width) in zip(features.split([h * w for _, h, w in GRIDS]), GRIDS, strict=True):
        side = next(side for side, _ in SIZES if max(height, width) <= side)
        square, mask = torch.randn(side, side, WIDTH), torch.ones(side, side, dtype=torch.bool)
        mask[:height, :width] = False
        square[:height, :width] = part.view(height, width, WIDTH)
        outputs.append(theirs(square.flatten(0, 1)[None], attn_mask=mask.flatten()[None])[0])
    return torch.cat(outputs)


@pytest.mark.parity
def test_packed_crops_equal_masked_squares(parity: Recorder) -> None:
    theirs = reference_model()
    ours = ResamplerConfig.model_validate({"queries": SIZES, "num_heads": 3}).build(WIDTH, DIM)
    source = in_our_names(dict(theirs.named_parameters()))
    ours.load_state_dict({name: values.detach() for name, values in source.items()})
    rows = sum(height * width for _, height, width in GRIDS)
    features = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    mine, other = features.clone().requires_grad_(), features.clone().requires_grad_()
    found, expected = ours(mine, GRIDS), padded(theirs, other)
    assert len(found) == 2 + 5 + 2 + 5 + 2 + 5
    parity("aria", "features of the projector", distance(found, expected), BOUND)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(upstream)
    expected.backward(upstream)
    parity("aria", "gradients of the projector", distance(mine.grad, other.grad), GRADIENT_BOUND)
    gradients = in_our_names({name: parameter.grad for name, parameter in theirs.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        scale = max(float(gradients[name].abs().max()), 1e-3 * largest)  # The key's bias: rounding only.
        error = float((parameter.grad - gradients[name]).abs().max()) / scale
        parity("aria", "gradients of the projector", error, GRADIENT_BOUND)


def test_a_packed_crop_has_the_features_of_the_crop_alone() -> None:
    net = build_model(config("embedding", projector=RESAMPLED))
    spec = media_spec(net.config)
    assert [spec.num_features((1, *grid)) for grid in [(1, 1), (3, 3), (2, 4), (8, 8)]] == [2, 2, 5, 5]
    assert spec.num_features((2, 3, 1)) == 4  # Two frames.
    docs = [image_document(spec, 1, 5, [(2, 3), (4, 4)], VOCAB), image_document(spec, 2, 4, [(2, 3)], VOCAB)]
    together = net(pack(docs, spec)).hidden
    alone = torch.cat([net(pack([doc], spec)).hidden for doc in docs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_data_side_refuses_crops_that_do_not_fit() -> None:
    spec = media_spec(config("embedding", projector=RESAMPLED))
    with pytest.raises(SampleError, match="a crop of 2x9 patches; the model takes at most 8 patches a side"):
        spec.num_features((1, 2, 9))
    with pytest.raises(DataConfigError, match="pools each crop as a whole"):
        MolmoTiling().check(28, MediaSpec(Placement.EMBEDDING, 2, query_sizes=((3, 2),)))


def test_wrong_settings_are_refused() -> None:
    for queries in ([[8, 5], [3, 2]], [[3, 5], [8, 2]], [[3, 2], [3, 5]]):
        with pytest.raises(ValidationError, match="sides and numbers must ascend"):
            config("embedding", projector={**RESAMPLED, "queries": queries})
    with pytest.raises(ValidationError, match="num_heads=5: must divide the 24 channels"):
        config("embedding", projector={**RESAMPLED, "num_heads": 5})
    with pytest.raises(ValidationError, match=r"has 8 patches a side, the tower's crops have \[9, 2\]"):
        config("embedding", projector=RESAMPLED, vision={**VISION, "positions": {"kind": "learned", "grid": [9, 2]}})


def test_a_smoke_test_model_has_few_queries_and_each_size_class() -> None:
    settings = config("embedding", projector={**RESAMPLED, "queries": [[35, 128], [70, 256]]})
    assert shrink(settings).connector.projector.queries == ((9, 4), (18, 8))
    assert cost_per_patch(settings) > 0
