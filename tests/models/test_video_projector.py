"""A separate projector for videos: its features, its gradients, and what every batch must hold for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import Document, MediaItem
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.draft import Draft
from data_pipeline.packing.packer import Budget, Pack, PackUsage
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Provenance
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.embedding import EmbeddingConnector
from mmscale.models.multimodal import MultimodalModel
from mmscale.optim.schedule import freeze
from mmscale.optim.stages import StageConfig
from mmscale.run.stage_teachers import _differences
from tests.models.packs import IMAGE_ID
from tests.models.test_flops import counted_step
from tests.models.test_multimodal import loss_and_grads
from tests.models.tiny import CONNECTORS, DECODER, LEARNED, TILED, VISION, VOCAB

CONV = {"kind": "conv_pool", "last_columns": "pad"}
MEDIA = [((1, 4, 6), False), ((3, 2, 5), True), ((1, 2, 2), False), ((1, 4, 4), True)]
"""Grid of each item, and whether it is a video."""


def config(vision: dict[str, Any] = VISION, decoder: dict[str, Any] = DECODER, **connector: Any) -> ModelConfig:
    block = {**CONNECTORS["embedding"], "video_projector": CONV, **connector}
    return ModelConfig.model_validate({"decoder": decoder, "vision": vision, "connector": block})


def build(settings: ModelConfig) -> MultimodalModel:
    net = build_model(settings, seed=5)
    assert isinstance(net, MultimodalModel)
    return net


def document(
    spec: MediaSpec, items: Sequence[MediaItem | tuple[tuple[int, int, int], bool]], text: int = 6
) -> Document:
    """Return a document of images and videos with text after each."""
    rng, draft = np.random.default_rng(len(items)), Draft(spec)
    draft.add_tokens(rng.integers(4, VOCAB, text).tolist(), 1.0)
    for item in items:
        if not isinstance(item, MediaItem):
            grid, is_video = item
            pixels = rng.integers(0, 256, (math.prod(grid), spec.patch_dim), np.uint8)
            item = MediaItem(pixels, grid, embedded=True, is_video=is_video)
        draft.add_image((item,), IMAGE_ID, None)
        draft.add_tokens(rng.integers(4, VOCAB, text).tolist(), 1.0)
    return draft.finish(Provenance("d", "s", "k", 0))


def in_pack(spec: MediaSpec, *documents: Document) -> MultimodalBatch:
    return collate([Pack(documents, 0)], spec)


def test_each_item_is_projected_as_if_it_were_alone() -> None:
    net = build(config())
    spec = media_spec(net.config)
    assert [spec.of_frames(is_video).num_features(grid) for grid, is_video in MEDIA] == [6, 9, 1, 4]
    documents = document(spec, MEDIA), document(spec, [MEDIA[1]])
    batch, found = in_pack(spec, *documents), list[Tensor]()
    net.decoder.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    net(batch)
    expected, slots = net.decoder.embed_tokens(batch.token_ids).clone(), iter(batch.media["image"].scatter_index)
    assert isinstance(net.connector, EmbeddingConnector)
    assert net.vision is not None
    for item in (item for each in documents for item in each.items):
        alone = net.vision(in_pack(spec, document(spec, [item])).media["image"])
        projector = net.connector.video_projector if item.is_video else net.connector.projector
        assert projector is not None
        for feature in projector(alone, [item.grid]):
            expected[next(slots)] = feature
    assert next(slots, None) is None
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-5)
    halves = [in_pack(spec, each) for each in documents]
    torch.testing.assert_close(net(concatenate(halves, spec)).hidden, net(batch).hidden, atol=0, rtol=0)


def test_a_batch_without_videos_gets_a_dummy_video_without_gradient() -> None:
    net = build(config())
    spec = media_spec(net.config)
    dummy = dummy_document(spec, 0)
    assert [(item.is_video, item.grid) for item in dummy.items] == [(False, (1, 2, 2)), (True, (1, 2, 2))]
    budget = Budget(PackingConfig(max_tokens=64), spec, dummy)
    needs = [budget.needs_dummy(PackUsage.of_document(document(spec, media), spec)) for media in ([], MEDIA[:1], MEDIA)]
    assert needs == [True, True, False]
    _, gradients = loss_and_grads(net, in_pack(spec, document(spec, MEDIA[:1]), dummy))
    video = {name: float(grad.abs().sum()) for name, grad in gradients.items() if "video_projector" in name}
    assert video == {f"connector.video_projector.{each}": 0 for each in ("conv.weight", "conv.bias")} | {
        f"connector.video_projector.fc{n}.{kind}": 0 for n in (1, 2) for kind in ("weight", "bias")
    }
    both = document(spec, MEDIA)
    loss, gradients = loss_and_grads(net, in_pack(spec, both))
    with_dummy, same = loss_and_grads(net, in_pack(spec, both, dummy))
    torch.testing.assert_close(with_dummy, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_video_projector_trains_alone() -> None:
    net = build(config())
    spec, parts = media_spec(net.config), net.components()
    assert net.config.components == tuple(parts) == ("vision", "connector", "video_connector", "decoder")
    assert sum(map(len, parts.values())) == len(list(net.parameters()))
    freeze(net, parts, StageConfig(name="s", steps=1, train=("video_connector",)))
    net.head(net(in_pack(spec, document(spec, MEDIA))).hidden).sum().backward()
    learned = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in net.named_parameters() if "video_projector" in name}
    assert "videos=MediaSpec(" in repr(spec)
    assert "videos" not in repr(media_spec(config(video_projector=None)))


def test_a_wider_teacher_takes_the_same_videos() -> None:
    """The cost of a patch differs, and no batch depends on it."""
    wider = config(decoder={**DECODER, "hidden_dim": 64})
    specs = media_spec(wider), media_spec(config())
    assert specs[0].videos != specs[1].videos
    assert list(_differences(*specs)) == []
    (difference,) = _differences(specs[0], media_spec(config(video_projector={**CONV, "last_rows": "pad"})))
    assert difference.startswith("videos is MediaSpec(")


@pytest.mark.parametrize("video", [CONV, {"kind": "resampler", "queries": [[3, 2], [8, 5]], "num_heads": 2}])
def test_operations_equal_the_counter(video: dict[str, Any]) -> None:
    settings = config(video_projector=video)
    spec = media_spec(settings)
    batch = in_pack(spec, *(document(spec, [((1, 4, 4), False), ((2, 4, 4), True)], 20) for _ in range(2)))
    for trained in (["video_connector"], ["connector"], [*settings.components]):
        net = build(settings)
        counted = counted_step(net, batch, trained, False)
        assert net.training_flops(batch, trained).model == pytest.approx(counted, rel=0.01), trained


def test_operations_with_adapters_equal_the_counter() -> None:
    adapters = {"rank": 256, "targets": {"connector": "all", "decoder": []}}
    settings = ModelConfig.model_validate({**config().model_dump(), "adapters": adapters})
    spec = media_spec(settings)
    batch = in_pack(spec, *(document(spec, [((1, 4, 4), False), ((4, 4, 8), True)], 20) for _ in range(2)))
    counted = counted_step(build(settings), batch, ["adapters"], False)
    # The gradient of the first layers' inputs counts, although the backward pass ends there.
    assert 1 <= build(settings).training_flops(batch, ["adapters"]).model / counted < 1.06


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"padding": True}, "frames of videos have no padding"),
        ({"vision": {**TILED, "class_feature": False}}, "a tower with vision.tiles reads no videos"),
        (
            {"vision": LEARNED, "video_projector": {"kind": "mlp", "merge": 3}},
            "connector.video_projector.merge=3: must",
        ),
        ({"kind": "hybrid", "every": 2}, "video_projector"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config(**settings)
