"""Modalities besides images: any mixture in a pack, absent modalities, operations, counts, and a toy modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MediaBlock, MultimodalBatch
from data_pipeline.document import Document, MediaItem
from data_pipeline.media_spec import AudioSpec, Grid, MediaSpec, ModalitySpec, reduced
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.draft import Draft
from data_pipeline.packing.packer import Budget, Pack, PackUsage
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Provenance
from mmscale.check.batches import BatchMaker
from mmscale.models import build as build_module
from mmscale.models.build import build_model, count_parameters, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.projector import LinearProjectorConfig
from mmscale.models.flops import modality_cost
from mmscale.models.modality import ModalityBase, ModalityTower, ModalityTowerBase
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product, linear_product
from mmscale.objectives.next_token import NextToken
from mmscale.optim.schedule import freeze
from mmscale.optim.stages import StageConfig
from tests.models.tiny import CONNECTORS, DECODER, DENSE, MOE, VISION, VOCAB

AUDIO = {"tower": {"kind": "frames", "num_bins": 6, "stack": 3, "max_frames": 30}, "projector": {"kind": "mlp"}}
PLACEHOLDER = 3
KINDS = [None, *CONNECTORS]


def settings(kind: str | None, *, mlp: dict[str, Any] = DENSE, **blocks: Any) -> ModelConfig:
    """Return a model that hears, and sees with the connector ``kind``."""
    values: dict[str, Any] = {"decoder": {**DECODER, "mlp": mlp}, "audio": AUDIO, **blocks}
    if kind is not None:
        connector = CONNECTORS[kind] if mlp is DENSE or kind == "embedding" else {**CONNECTORS[kind], "mlp": DENSE}
        values |= {"vision": VISION, "connector": connector}
    return ModelConfig.model_validate(values)


def document(spec: MediaSpec, seed: int, pieces: str) -> Document:
    """Return a document of ``t`` (three learned tokens), ``i`` (an image) and ``a`` (a clip of two chunks)."""
    rng, draft = np.random.default_rng(seed), Draft(spec)
    for piece in pieces:
        if piece == "t":
            draft.add_tokens(rng.integers(4, VOCAB, 3).tolist(), 1.0)
        elif piece == "a":
            rows = [spec.modalities["audio"].minimal_grid[0] + int(rng.integers(0, 9)) for _ in range(2)]
            values = [rng.standard_normal((each, 6), np.float32) for each in rows]
            items = [MediaItem(each, (len(each), 1, 1), embedded=True, modality="audio") for each in values]
            draft.add_clip(items, PLACEHOLDER, [4], [5])
        else:
            roles = [True] * spec.needs_embedded + [False] * spec.needs_unembedded
            pixels = rng.integers(0, 256, (len(roles), 8, spec.patch_dim), np.uint8)
            draft.add_image(
                tuple(MediaItem(each, (1, 2, 4), role) for each, role in zip(pixels, roles, strict=True)),
                PLACEHOLDER,
                None,
            )
    return draft.finish(Provenance("set", "shard", str(seed), seed))


def packed(spec: MediaSpec, *documents: Document) -> MultimodalBatch:
    """Return a batch of one pack, with the dummy document if the pack lacks a modality."""
    dummy = dummy_document(spec, 0)
    usage = PackUsage(kinds=frozenset().union(*(PackUsage.of_document(each, spec).kinds for each in documents)))
    needed = Budget(PackingConfig(max_tokens=1 << 20), spec, dummy).needs_dummy(usage)
    return collate([Pack((*documents, *([dummy] if needed else [])), 0)], spec)


@pytest.mark.parametrize("kind", KINDS)
def test_any_mixture_in_one_pack_equals_its_documents_one_by_one(kind: str | None) -> None:
    net = build_model(settings(kind, mlp=MOE), seed=5)
    spec = media_spec(net.config)
    mixtures = ["t", "at", "tata", "taat"] + ([] if kind is None else ["it", "iat", "tatiati", "aiit"])
    documents = [document(spec, seed, pieces) for seed, pieces in enumerate(mixtures)]
    batch = packed(spec, *documents)
    together, first = net(batch).hidden, 0
    for each in documents:
        alone = net(packed(spec, each)).hidden[: each.num_tokens]
        torch.testing.assert_close(together[first : first + each.num_tokens], alone, rtol=1e-4, atol=1e-5)
        first += each.num_tokens
    # Microbatches of several packs are joined in the same way, whichever of them need a dummy document.
    joined = concatenate([packed(spec, *documents[:3]), packed(spec, *documents[3:])], spec)
    for block in joined.media.values():
        slots = block.scatter_index
        owner = torch.bucketize(slots, joined.segments.cu[1:], right=True)
        is_real = torch.tensor([origin is not None for origin in joined.provenance])[owner]
        assert (joined.token_ids[slots] == is_real * PLACEHOLDER).all()
    torch.testing.assert_close(net(joined).hidden[: documents[0].num_tokens], together[: documents[0].num_tokens])


def test_sound_changes_what_follows_it_and_nothing_else() -> None:
    net = build_model(settings("embedding"), seed=5)
    spec = media_spec(net.config)
    batch = packed(spec, document(spec, 1, "tait"), document(spec, 2, "t"))
    before = net(batch).hidden
    values = batch.media["audio"].values
    values += 1
    changed = (net(batch).hidden - before).abs().amax(1) > 1e-6
    first, end = int(batch.media["audio"].scatter_index[0]), batch.segments.bounds[1]
    assert changed[first:end].all()
    assert not changed[:first].any()
    # The dummy document is absent, because the first document has both modalities.
    assert not changed[end:].any()


@pytest.mark.parametrize("pieces", ["t", "it", "at", "iat"])
@pytest.mark.parametrize("kind", KINDS)
def test_absent_modalities_run_and_get_exactly_no_gradient(kind: str | None, pieces: str) -> None:
    pieces = pieces if kind is not None else pieces.replace("i", "")
    net = build_model(settings(kind), seed=5)
    spec = media_spec(net.config)
    batch = packed(spec, document(spec, 1, pieces), document(spec, 2, "t"))
    loss = NextToken()(net, batch).loss_sum
    loss.backward()
    present = {"decoder"} | ({"vision", "connector"} if "i" in pieces else set())
    present |= {"audio_connector"} if "a" in pieces else set()
    for name, parameters in net.components().items():
        gradients = [parameter.grad for parameter in parameters]
        assert all(gradient is not None for gradient in gradients), f"{name} is out of the graph"
        assert any(bool(gradient.any()) for gradient in gradients if gradient is not None) == (name in present), name
    # The loss is that of the model without the dummy document.
    assert loss.item() == pytest.approx(sum(_losses(net, spec, pieces)), rel=1e-5)


def _losses(net: MultimodalModel, spec: MediaSpec, pieces: str) -> Iterator[float]:
    for seed, each in ((1, pieces), (2, "t")):
        yield NextToken()(net, packed(spec, document(spec, seed, each))).loss_sum.item()


def test_routers_count_the_tokens_of_each_modality() -> None:
    net = build_model(settings("embedding", mlp=MOE), seed=5)
    spec = media_spec(net.config)
    batch = packed(spec, document(spec, 1, "tiat"), document(spec, 2, "t"))
    load = net(batch).router.load
    slots = [len(batch.media[name].scatter_index) for name in ("image", "audio")]
    assert load.shape == (4, 3, MOE["num_experts"])
    tokens = [batch.num_tokens - sum(slots), *slots]
    assert load.sum(2).tolist() == [[count * MOE["experts_per_token"] for count in tokens]] * 4


@pytest.mark.parametrize("kind", [None, "embedding", "cross_attention"])
def test_every_adversarial_batch_runs_every_module(kind: str | None) -> None:
    net = build_model(settings(kind), seed=5)
    batches = BatchMaker(media_spec(net.config), VOCAB, seed=0)
    assert {"audio only", "all modalities"} < set(batches.kinds)
    for name in batches.kinds:
        net.zero_grad()
        batch = batches.make(name, 0, 0)
        NextToken()(net, batch).loss_sum.backward()
        assert all(parameter.grad is not None for parameter in net.parameters()), name
        assert batch.num_inputs("audio") == {"audio only": 5, "all modalities": 3}.get(name, 0)
    dummy = batches.make("dummy packs only", 0, 0)
    assert [block.items.num for block in dummy.media.values()] == ([] if kind is None else [1]) + [1]


@pytest.mark.parametrize("kind", KINDS)
def test_components_and_counts(kind: str | None) -> None:
    config = settings(kind)
    net, count = build_model(config), count_parameters(config)
    assert tuple(net.components()) == config.components == tuple(count.components)
    assert "audio" not in config.components, "the tower frames has no parameters"
    # Source: the sizes of the two layers, 3 frames of 6 bins -> 32 -> 32.
    assert count.components["audio_connector"] == (18 * 32 + 32) + (32 * 32 + 32)
    assert {name.partition(".")[0] for name, _ in net.named_parameters()} - {"head"} == {*config.components}
    assert count.total == sum(count.components.values()) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("trained", [["audio_connector"], ["decoder"], ["audio_connector", "decoder", "vision"]])
def test_a_training_step_equals_the_counter(trained: list[str]) -> None:
    net = build_model(settings("embedding"))
    spec = media_spec(net.config)
    batch = packed(spec, *(document(spec, 7, "iatatt") for _ in range(3)))
    freeze(net, net.components(), StageConfig(name="s", steps=1, train=tuple(trained)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        NextToken()(net, batch).loss_sum.backward()
    assert net.training_flops(batch, trained).model == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_cost_of_a_frame_is_its_share_of_the_products() -> None:
    config = settings(None)
    token = 2 * (count_parameters(config).total - count_parameters(config).components["audio_connector"])
    token -= 2 * (VOCAB * 32 + 9 * 32)  # The embedding table and the norms are no products.
    clip = 2 * (18 * 32 + 32 * 32)  # One feature, three frames.
    assert modality_cost(config, "audio") == pytest.approx(clip / 3 / token, rel=1e-6)
    assert media_spec(config).modalities["audio"].cost_per_patch == modality_cost(config, "audio")
    spec = media_spec(config)
    each = document(spec, 1, "tat")
    assert each.cost(spec) == pytest.approx(
        each.num_tokens + spec.modalities["audio"].cost_per_patch * sum(len(item.values) for item in each.items)
    )


def test_features_of_a_chunk_are_those_of_the_convolutions() -> None:
    spec = AudioSpec(
        num_bins=4, max_frames=200, padded=False, extra_frames=2, reductions=((3, 1, 1), (3, 2, 1), (2, 2, 0))
    )
    layers = [nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, 2, padding=1), nn.AvgPool1d(2, 2)]
    for frames in range(spec.minimal_grid[0] - spec.extra_frames, 201):
        length = nn.Sequential(*layers)(torch.zeros(1, 1, frames)).shape[2]
        assert spec.num_features((frames + 2, 1, 1)) == reduced(frames, spec.reductions) == length
    assert reduced(spec.minimal_grid[0] - spec.extra_frames - 1, spec.reductions) == 0


def test_what_does_not_fit_is_refused() -> None:
    tower = {**AUDIO["tower"], "stack": 31}  # type: ignore[dict-item]
    for audio, message in (
        ({**AUDIO, "tower": tower}, "stack=31"),
        ({**AUDIO, "projector": {"kind": "mlp", "merge": 2}}, "merge=2"),
        ({**AUDIO, "projector": {"kind": "resampler"}}, "resampler"),
    ):
        with pytest.raises(ValidationError, match=message):
            settings("embedding", audio=audio)
    with pytest.raises(ValidationError, match="contrastive model compares images"):
        settings(None, vision=VISION, connector={"kind": "contrastive", "pool": "mean", "dim": 8})


@dataclasses.dataclass(frozen=True)
class DepthSpec(ModalitySpec):
    """Depth maps of three values."""

    dtype: ClassVar[Any] = np.int16
    noun: ClassVar[str] = "depth map"
    cost: float = 1.0

    cost_per_patch = property(lambda self: self.cost)
    patch_dim = property(lambda self: 3)
    minimal_grid = property(lambda self: (1, 1, 2))
    typical_grid = property(lambda self: (1, 4, 2))

    def num_features(self, grid: Grid) -> int:
        return grid[1]


class DepthTower(ModalityTower):
    """Adds the two rows of a feature, after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, block: MediaBlock) -> Tensor:
        return self.layer(block.values.float()).view(-1, 2, 5).sum(1)


class DepthTowerConfig(ModalityTowerBase):
    kind: Literal["depth"] = "depth"
    feature_dim = property(lambda self: 5)  # type: ignore[assignment]

    def build(self, backend: Backend) -> ModalityTower:
        return DepthTower()

    def feature_grid(self, grid: Grid) -> Grid:
        return (grid[0], grid[1], 1)

    def products(self, *, learns: bool) -> list[Product]:
        return [linear_product("rows", 2 * 3 * 5, weights=learns, inputs=False)]

    def counts(self, grid: Grid) -> dict[str, int]:
        return {"rows": 2 * grid[1]}


class DepthConfig(ModalityBase):
    tower: DepthTowerConfig = DepthTowerConfig()
    projector: LinearProjectorConfig = LinearProjectorConfig()

    def spec(self, cost_per_patch: float) -> DepthSpec:
        return DepthSpec(cost_per_patch)


def test_a_further_modality_needs_its_own_classes_and_two_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithDepth(ModelConfig):
        depth: DepthConfig | None = None

    @dataclasses.dataclass(frozen=True)
    class SpecWithDepth(MediaSpec):
        depth: DepthSpec | None = dataclasses.field(default=None, repr=False)

    monkeypatch.setattr(build_module, "MediaSpec", SpecWithDepth)
    values = settings("embedding").model_dump(exclude_none=True)
    config = WithDepth.model_validate({**values, "depth": {}})
    net, spec = build_model(config), media_spec(config)
    assert config.components == ("vision", "connector", "audio_connector", "depth", "depth_connector", "decoder")
    assert tuple(net.components()) == config.components
    maps = [MediaItem(np.ones((2 * n, 3), np.int16), (1, n, 2), embedded=True, modality="depth") for n in (3, 1)]
    draft = Draft(spec)
    draft.add_clip(maps, PLACEHOLDER)
    draft.add_tokens([7, 8, 9], 1.0)
    batch = packed(spec, draft.finish(Provenance("set", "shard", "0", 0)), document(spec, 1, "at"))
    assert batch.media["depth"].values.dtype == torch.int16
    assert [len(block.grids) for block in batch.media.values()] == [1, 3, 3]  # The dummy document adds one of each.
    freeze(net, net.components(), StageConfig(name="s", steps=1, train=("all",)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        NextToken()(net, batch).loss_sum.backward()
    flops = net.training_flops(batch, config.components)
    assert flops.model == pytest.approx(counter.get_total_flops(), rel=0.01)
    gradients = {name: any(bool(p.grad.any()) for p in part) for name, part in net.components().items()}  # type: ignore[union-attr]
    assert gradients == {name: name not in ("vision", "connector") for name in config.components}
    assert spec.needed_kinds == {("image", True), ("audio", True), ("depth", True)}
