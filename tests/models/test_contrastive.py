"""The contrastive model: dependencies of its vectors, and rejected configurations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.media_spec import Placement
from mmscale.models.build import build_model, count_parameters, media_spec
from mmscale.models.config import ModelConfig
from tests.models.packs import image_document, pack
from tests.models.tiny import DECODER, LEARNED, MOE, PATCHES, TILED, VISION, VOCAB
from tests.objectives.pairs import SIGMOID, SOFTMAX, batch_of, model_config


@pytest.mark.parametrize("connector", [SOFTMAX, SIGMOID])
def test_vectors_are_of_the_image_and_of_the_last_token(connector: dict[str, Any]) -> None:
    model = build_model(model_config(connector), attention="sdpa", seed=3)
    spec = media_spec(model.config)
    assert (spec.placement, spec.class_features) == (Placement.PAIR, int(connector is SOFTMAX))
    alone = [model(batch_of(spec, [number])) for number in range(4)]
    together = model(batch_of(spec, [0, 1, 2, 3]))
    for name in ("images", "texts"):  # Independent of the rest of the batch.
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
        torch.testing.assert_close(getattr(together, name).norm(dim=1), torch.ones(4))
    batch = batch_of(spec, [0])
    features, hidden = model.vision(batch.media["image"]), model.decoder.embed_tokens(batch.token_ids)
    hidden, _ = model.decoder(hidden, batch.position_ids, batch.segments, None, None)
    patches = batch.media["image"].items.bounds[1]
    row = features[0] if connector is SOFTMAX else features[:patches].mean(0)
    last = hidden[batch.segments.bounds[1] - 1]
    for vector, source, matrix in (
        (together.images[0], row, model.connector.visual_projection.weight),
        (together.texts[0], last, model.connector.text_projection.weight),
    ):
        torch.testing.assert_close(vector, torch.nn.functional.normalize(matrix @ source, dim=0))
    changed = replace(batch, token_ids=batch.token_ids.roll(1))
    assert torch.equal(model(changed).images, model(batch).images)
    assert not torch.allclose(model(changed).texts, model(batch).texts)


@pytest.mark.parametrize("connector", [SOFTMAX, SIGMOID])
def test_operations_are_those_that_torch_counts(connector: dict[str, Any]) -> None:
    model = build_model(model_config(connector), attention="sdpa", seed=3)
    spec = media_spec(model.config)
    # Use documents of one length, for which the kernel adds no padding. The counter does not count the fused kernel.
    batch = pack([image_document(spec, n, 40, [(2, 4)], VOCAB, dummy=n == 2) for n in range(3)], spec)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            vectors = model(batch)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            (vectors.images.sum() + vectors.texts.sum()).backward()
    told = model.training_flops(batch, {"vision", "connector", "decoder"})
    assert told.forward == model.flops(batch) == pytest.approx(forward, rel=0.001)
    assert told.backward == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": LEARNED}, "pool=class: needs the class token; set vision.class_feature=true"),
        ({"connector": {**SOFTMAX, "pool": "mean"}}, "takes only patches; set vision.class_feature=false"),
        ({"vision": PATCHES}, "has no parameters to train on pairs"),
        ({"vision": TILED}, "a pair has one crop of its image"),
        ({"decoder": {**DECODER, "tie_embeddings": True}}, "tie_embeddings: a contrastive model predicts no token"),
        ({"decoder": {**DECODER, "extra_tokens": {"rows": 2}}}, "extra_tokens.predicted: a contrastive model"),
        ({"decoder": {**DECODER, "dropout": 0.1}}, "dropout=0.1: a contrastive step may compute"),
        ({"decoder": {**DECODER, "mlp": MOE}}, "does not include router losses"),
        ({"connector": {**SOFTMAX, "bias_init": 1.0}}, "has no effect on a softmax"),
        ({"connector": {**SOFTMAX, "max_scale": 3.0}}, "max_scale=3: must be finite and at least scale_init=14.2857"),
    ],
)
def test_unsupported_configurations_are_rejected(changes: dict[str, Any], message: str) -> None:
    block = {"decoder": DECODER, "vision": {**LEARNED, "class_feature": True}, "connector": SOFTMAX}
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(block | changes)
    ModelConfig.model_validate({**block, "vision": VISION, "connector": SIGMOID})
