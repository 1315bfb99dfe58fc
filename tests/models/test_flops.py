"""The operation formulas against torch's counter, which counts the matrix products that run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MultimodalBatch
from data_pipeline.io.strict import StrictConfig
from mmscale.engine.graph import recompute
from mmscale.models.build import build_model, media_spec
from mmscale.models.connectors.connector import ConnectorBase
from mmscale.models.connectors.projector import ProjectorBase
from mmscale.models.flops import cost_per_patch
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.vision_kind import TowerBase
from mmscale.objectives.next_token import NextToken
from mmscale.optim.schedule import freeze
from mmscale.optim.stages import StageConfig
from tests.models.packs import image_document, pack
from tests.models.test_branches import QUESTIONS, batch_of, build
from tests.models.tiny import CONNECTORS, DENSE, LEARNED, MOE, PATCHES, POOLED, RESAMPLED, TILED, VISION, VOCAB, config

WIDE = {"attention": {"num_heads": 8, "num_kv_heads": 4}, "hidden_dim": 64}
EVERY_SECOND = {**MOE, "every": 2, "dense": DENSE}
AFTER_FIRST = {**MOE, "shared_dim": 0, "shared_gate": False, "dense_first": 3, "dense": DENSE, "router": "sigmoid"}


@pytest.mark.parametrize(
    "variant",
    [{}, {"mlp": MOE}, {"mlp": EVERY_SECOND}, {"mlp": AFTER_FIRST}, {"vision": LEARNED}],
    ids=["dense", "moe", "second", "first", "learned"],
)
@pytest.mark.parametrize("kind", [None, *CONNECTORS])
def test_formula_equals_the_counter(kind: str | None, variant: dict[str, Any]) -> None:
    settings = config(kind, **{**WIDE, **variant})
    net, spec = build_model(settings), media_spec(settings)
    grid = (2, 4)
    # Use documents of one length: the kernel then adds no padding and computes exactly the products of the formula.
    crops = [] if kind is None else [grid, grid]
    batch = pack([image_document(spec, n, 40, crops, VOCAB) for n in range(3)], spec)
    # The counter does not count the fused CPU kernel; the math kernel is two matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net.head(net(batch).hidden)
    assert net.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_cost_of_a_patch_is_its_share_of_the_products() -> None:
    """Compare with counted operations that one more patch and one more token add, without attention."""
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


TRAINED = [["vision"], ["connector"], ["decoder"], ["vision", "connector"], ["vision", "decoder"]]
TRAINED += [["connector", "decoder"], ["vision", "connector", "decoder"]]
POST = {"norm_placement": "post"}
SHARED = {**MOE, "shared_gate": False}
MIDDLE = {**VISION, "num_layers": 3, "feature_layers": [0, 2], "last_output": False, "post_norm": False}
TILED_AHEAD: dict[str, Any] = {"vision": TILED, "unseen_text": "looks_ahead"}
TILED_ALONE = {**TILED, "tiles": {**TILED["tiles"], "attend_absent": False}}
SCALED = {**LEARNED, "layer_scale": 0.1}
NEW_ROWS = {"vocab_size": VOCAB - 20, "extra_tokens": {"rows": 20}}
DRAWN = {"vocab_size": VOCAB - 20, "image_tokens": {"kind": "separate", "codes": 20, "code_dim": 8}}
MODELS: list[tuple[str | None, dict[str, Any]]] = [
    *((kind, {}) for kind in (None, *CONNECTORS)),
    ("embedding", {"mlp": MOE, "vision": SCALED}),
    ("hybrid", {"mlp": EVERY_SECOND, **POST}),
    ("cross_attention", {"mlp": SHARED, "vision": MIDDLE}),
    ("embedding", {"vision": PATCHES}),
    ("embedding", {"projector": POOLED}),
    ("embedding", {"projector": RESAMPLED}),
    ("embedding", {"projector": {"kind": "conv_pool", "conv_dim": 40}}),
    ("embedding", {"projector": {"kind": "mean_pool"}}),
    ("cross_attention", {"projector": {**POOLED, "positions": LEARNED["positions"]}, "vision": LEARNED}),
    ("cross_attention", {"vision": TILED}),
    ("cross_attention", {"vision": TILED_ALONE}),
    ("cross_attention", TILED_AHEAD),
    ("embedding", {"vision": {**TILED, "class_feature": False}}),
    ("embedding", {"vision": {**VISION, "temporal_patch": 2}}),
    *((kind, {**NEW_ROWS}) for kind in (None, "cross_attention")),
    ("embedding", {**DRAWN}),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "variant"), MODELS)
@pytest.mark.long
def test_a_training_step_equals_the_counter(kind: str | None, variant: dict[str, Any], checkpointing: bool) -> None:
    """Check each choice of trained components."""
    settings = config(kind, **{**WIDE, **variant})
    spec = media_spec(settings)
    crops = [] if kind is None else [(2, 4), (2, 4)]
    batch = pack([image_document(spec, n, 40, crops, VOCAB, dummy=n == 2) for n in range(3)], spec)
    choices = TRAINED if kind is not None and not variant else TRAINED[-1:]
    if settings.decoder.extra_tokens:
        choices = [["extra_tokens"], ["extra_tokens", *(["connector"] if kind else [])], [*settings.components]]
    elif settings.decoder.image_tokens:
        choices = [["image_tokens"], ["connector", "image_tokens"], ["decoder"], [*settings.components]]
    elif settings.components == ("connector", "decoder"):
        choices = [["connector"], ["decoder"], ["connector", "decoder"]]
    elif "projector" in variant:
        choices = [["vision"], ["connector"], TRAINED[-1]]
    net = build_model(settings)
    for trained in choices:
        trained = trained if kind is not None or settings.decoder.extra_tokens else ["decoder"]
        net.zero_grad()
        counted = counted_step(net, batch, trained, checkpointing)
        if variant.get("projector", {}).get("kind") == "c_abstractor" and "connector" in trained:
            counted -= _overcounted(batch)
        flops = net.training_flops(batch, trained, recompute=checkpointing)
        assert flops.hardware == pytest.approx(counted, rel=0.01), trained
        assert flops.model == net.training_flops(batch, trained).hardware
        assert (flops.recomputed > 0) == checkpointing


def test_a_training_step_over_branches_equals_the_counter() -> None:
    net = build_model(config("hybrid", **WIDE))
    # Use branches of one length, for which the kernel adds no padding.
    batch = batch_of([build(media_spec(net.config), QUESTIONS[:1] * 3)] * 2, media_spec(net.config))
    assert batch.branched is not None
    counted = counted_step(net, batch, ["vision", "connector", "decoder"], False)
    assert net.training_flops(batch, ["vision", "connector", "decoder"]).model == pytest.approx(counted, rel=0.01)


def _overcounted(batch: MultimodalBatch) -> int:
    """Return the operations that the counter adds by counting a depthwise kernel's gradient as a full one's."""
    rows = batch.media["image"].items.total + batch.media["image"].items.num * POOLED["side"] ** 2
    return POOLED["depth"] * rows * 18 * POOLED["hidden_dim"] * (POOLED["hidden_dim"] - 1)


def counted_step(net: MultimodalModel, batch: MultimodalBatch, trained: list[str], checkpointing: bool) -> int:
    freeze(net, net.components(), StageConfig(name="s", steps=1, train=tuple(trained)))
    undo = recompute(net.checkpoint_units()) if checkpointing else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        NextToken()(net, batch).loss_sum.backward()
    if undo:
        undo()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [ProjectorBase, ConnectorBase, TowerBase])
def test_a_kind_without_operation_counts_is_rejected(kind: type[StrictConfig]) -> None:
    """A new kind must not be counted silently by the formula of another kind."""
    count = "work" if kind is ProjectorBase else "products"
    others = sorted(kind.__abstractmethods__ - {count})  # type: ignore[attr-defined]
    unfinished = type("Unfinished", (kind,), {name: lambda *_: None for name in others})
    with pytest.raises(TypeError, match=f"abstract.*{count}"):
        unfinished()
