"""Attention between tiles in the tower: the mask, dependencies of results, and rejected configurations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.batch import BranchedSegments, CropLocation, MultimodalBatch, Segments
from mmscale.evaluate.continuations import Continuation, continue_prompts
from mmscale.models.build import media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.lookahead import lookahead_keys
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.tiles import TileRows
from mmscale.nn.tile_embed import num_grids, tile_grids, tile_row
from mmscale.objectives.next_token import NextToken
from tests.models.packs import Doc, image_document, pack, text_document
from tests.models.tiny import CONNECTORS, DECODER, LEARNED, TILED, VISION, VOCAB, config, model

ALONE = {**TILED, "tiles": {**TILED["tiles"], "attend_absent": False}}  # type: ignore[dict-item]
grids = st.lists(st.sampled_from(tile_grids(4)), min_size=1, max_size=4)


def test_grids_of_four_tiles_are_the_published_ones() -> None:
    assert tile_grids(4) == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    assert [tile_row(grid, 0, 4) // 4 for grid in tile_grids(4)] == list(range(1, 9))
    assert num_grids(4) == 9


def locations_of(images: list[tuple[int, int]]) -> list[CropLocation]:
    return [
        CropLocation(0, image, (rows, columns), (row, column))
        for image, (rows, columns) in enumerate(images)
        for row in range(rows)
        for column in range(columns)
    ]


@given(images=grids, rows=st.integers(1, 17))
def test_the_attention_mask_equals_the_published_one(images: list[tuple[int, int]], rows: int) -> None:
    """Compare with the published mask: within an image, only pairs of two absent or filler rows are masked."""
    found = TileRows.from_locations(locations_of(images), rows, 4, attend_absent=True)
    assert isinstance(found.attended, BranchedSegments)
    assert found.order is not None
    total = len(found.order)
    filled = -(-rows // 8) * 8
    assert total == found.attended.queries.total == len(images) * 4 * filled
    sees = np.zeros((total, total), dtype=bool)
    queries, keys = found.attended.queries.bounds, found.attended.keys.bounds
    for piece in range(found.attended.queries.num):
        there = found.attended.key_tokens[keys[piece] : keys[piece + 1]].numpy()
        sees[queries[piece] : queries[piece + 1], there] = True
    # Image of each row, and whether it is real, from the order of rows only.
    counts = [r * c for r, c in images]
    slot_image = [i for i, count in enumerate(counts) for _ in range(count)]
    slot_image += [i for i, count in enumerate(counts) for _ in range(4 - count)]
    real = np.arange(total) < sum(counts) * rows
    image = np.empty(total, dtype=int)
    known = found.order < len(found.tiles) * rows
    image[known] = np.array(slot_image)[found.order[known] // rows]
    fillers = [i for i in range(len(images)) for _ in range(4 * (filled - rows))]
    image[~known] = fillers
    expected = (image[:, None] == image[None, :]) & (real[:, None] | real[None, :])
    np.testing.assert_array_equal(sees, expected)
    assert sorted(found.order[known].tolist()) == list(range(len(found.tiles) * rows))
    np.testing.assert_array_equal(found.row_tiles[known], found.tiles[found.order[known] // rows])
    assert found.row_tiles[~known].tolist() == [
        tile_row(grid, tile, 4) for grid in images for tile in range(4) for _ in range(filled - rows)
    ]
    np.testing.assert_array_equal(found.absent, np.flatnonzero(known & ~real))


@given(images=grids, rows=st.integers(1, 17))
def test_without_absent_tiles_an_image_is_one_piece(images: list[tuple[int, int]], rows: int) -> None:
    found = TileRows.from_locations(locations_of(images), rows, 4, attend_absent=False)
    assert isinstance(found.attended, Segments)
    assert np.diff(found.attended.bounds).tolist() == [r * c * rows for r, c in images]
    assert (found.order, found.num_absent, found.num_real) == (None, 0, found.attended.total)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (locations_of([(2, 2)]), "an image of 2x2 tiles; the tower takes at most 3"),
        ([*locations_of([(1, 2)]), CropLocation(0, 0, (1, 2), None)], "3 crops of an image of 1x2 tiles"),
    ],
)
def test_unsupported_tilings_are_rejected(places: list[CropLocation], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TileRows.from_locations(places, 5, 3, attend_absent=True)


def tiled(net: MultimodalModel, seed: int, text: int, grid: tuple[int, int], dummy: bool = False) -> Doc:
    doc = image_document(media_spec(net.config), seed, text, [(2, 4)] * (grid[0] * grid[1]), VOCAB, dummy=dummy)
    doc.tiles = grid
    return doc


def loss_and_grads(net: MultimodalModel, batch: MultimodalBatch) -> dict[str, torch.Tensor]:
    net.zero_grad()
    loss = NextToken()(net, batch).loss_sum
    loss.backward()
    grads: dict[str, torch.Tensor] = {"loss": loss.detach()}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{name} is out of the graph"
        grads[name] = parameter.grad.clone()
    return grads


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("cross_attention", {"vision": TILED}),
    ("cross_attention", {"vision": ALONE}),
    ("cross_attention", {"vision": TILED, "unseen_text": "looks_ahead"}),
    ("cross_attention", {"vision": LEARNED, "unseen_text": "looks_ahead"}),
    ("embedding", {"vision": {**TILED, "class_feature": False}}),
]


@pytest.mark.parametrize(("kind", "variant"), KINDS)
def test_packs_and_dummy_documents_change_nothing(kind: str, variant: dict[str, Any]) -> None:
    net = model(kind, **variant)
    spec, several = media_spec(net.config), "tiles" in variant["vision"]
    docs = [tiled(net, 1, 5, (1, 1)), text_document(2, 7, VOCAB)]
    docs += [tiled(net, 3, 4, (3, 1)), tiled(net, 4, 6, (1, 2))] if several else [tiled(net, 3, 4, (1, 1))]
    dummy = tiled(net, 9, 1, (1, 1), dummy=True)
    expected = loss_and_grads(net, pack(docs, spec))
    largest = max(float(grad.abs().max()) for name, grad in expected.items() if name != "loss")
    apart = [loss_and_grads(net, pack([doc, dummy], spec)) for doc in docs]
    for other in (loss_and_grads(net, pack([dummy, *docs[:2], dummy, *docs[2:]], spec)), _sums(apart)):
        for name, values in expected.items():
            # Sums in another order; measured worst 3e-7 of the largest gradient.
            torch.testing.assert_close(other[name], values, rtol=1e-4, atol=2e-6 * largest, msg=name)


def _sums(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


@pytest.mark.parametrize("vision", [TILED, ALONE, LEARNED], ids=["absent", "alone", "no tiles"])
def test_text_that_looks_ahead_has_all_rows_of_its_document(vision: dict[str, Any]) -> None:
    """Two answers to one prompt share its image, as in evaluation."""
    settings = config("cross_attention", vision=vision, unseen_text="looks_ahead")
    net, rows = model("cross_attention", vision=vision), 9 if "tiles" in vision else 8
    grids = [(1, 2), (3, 1)] if "tiles" in vision else [(1, 1), (1, 1)]
    docs = [tiled(net, 1, 4, grids[0]), text_document(2, 3, VOCAB), tiled(net, 3, 2, grids[1])]
    prompts = pack(docs, media_spec(settings))
    batch = continue_prompts(
        prompts, [Continuation(2, (5, 6)), Continuation(0, (7,)), Continuation(0, (8, 9, 4)), Continuation(1, (6,))]
    )
    media = batch.media["image"]
    assert settings.vision is not None
    keys, spans = lookahead_keys(media, batch.segments, settings.vision, merge=1)
    found = [set(keys[a:b].tolist()) for a, b in itertools.pairwise(spans.bounds)]
    assert sum(map(len, found)) == len(keys)
    counts = [r * c for r, c in grids]
    own = [set(range(counts[0] * rows)), set(range(counts[0] * rows, sum(counts) * rows))]
    # The first image has two of three tiles; the rows of its absent tile come after all others.
    lacking = set(range(5 * rows, 6 * rows)) if vision is TILED else set()
    first, second = [own[0] | lacking, own[0]], [own[1], own[1]]
    assert found == [*second, *first, *first, set()]


@pytest.mark.parametrize("vision", [TILED, ALONE], ids=["absent", "alone"])
def test_a_tile_changes_its_image_and_no_other(vision: dict[str, Any]) -> None:
    net = model("cross_attention", vision=vision)
    spec, tower = media_spec(net.config), net.vision
    assert tower is not None
    docs = [tiled(net, 1, 2, (1, 2)), tiled(net, 2, 2, (3, 1))]
    before = tower(pack(docs, spec).media["image"]).view(5, 9, -1)
    assert before.shape[-1] == net.config.vision.feature_dim  # type: ignore[union-attr]
    grid, embedded, pixels = docs[0].crops[1]
    docs[0].crops[1] = (grid, embedded, 255 - pixels)
    after = tower(pack(docs, spec).media["image"]).view(5, 9, -1)
    differ = (before != after).flatten(1).any(1).tolist()
    assert differ == [True, True, False, False, False]


def test_the_grid_of_an_image_matters_only_through_its_gates() -> None:
    shut = {**TILED, "tiles": {**TILED["tiles"], "gate_init": 0.0}}  # type: ignore[dict-item]
    for vision, same in ((TILED, False), (shut, True)):
        net = model("cross_attention", vision=vision)
        assert net.vision is not None
        features = []
        for grid in ((1, 3), (3, 1)):
            features.append(net.vision(pack([tiled(net, 1, 2, grid)], media_spec(net.config)).media["image"]))
        assert torch.equal(*features) == same


def test_channels_lie_block_by_block_or_channel_by_channel() -> None:
    both = {**LEARNED, "feature_layers": [0, 1]}
    blocks = model("cross_attention", vision=both)
    channels = model("cross_attention", vision={**both, "feature_order": "channels"})
    batch = pack([image_document(media_spec(blocks.config), 1, 3, [(2, 4)], VOCAB)], media_spec(blocks.config))
    assert blocks.vision is not None
    assert channels.vision is not None
    ours, other = blocks.vision(batch.media["image"]), channels.vision(batch.media["image"])
    last, first, second = ours.split(24, dim=1)
    torch.testing.assert_close(other, torch.cat([last, torch.stack([first, second], 2).flatten(1)], 1))


@pytest.mark.parametrize(
    ("vision", "connector", "complaint"),
    [
        ({**LEARNED, "class_token": False, "class_feature": True}, {}, "set class_token=true"),
        ({**LEARNED, "class_feature": True}, CONNECTORS["embedding"], "needs connector.kind=cross_attention"),
        ({**LEARNED, "class_feature": True}, {"projector": {"kind": "linear", "merge": 2}}, "projector.merge=1"),
        (
            {**LEARNED, "class_feature": True},
            {
                "projector": {
                    "kind": "attention_pool",
                    "merge": 1,
                    "num_heads": 2,
                    "head_dim": 4,
                    "mlp": {"kind": "dense", "hidden_dim": 8},
                }
            },
            "linear or mlp",
        ),
        (
            {**LEARNED, "class_feature": True},
            {"projector": {"kind": "c_abstractor", "side": 2, "hidden_dim": 8}},
            "linear or mlp",
        ),
        ({**VISION, "tiles": {}}, {}, "use positions.kind=learned"),
        ({**TILED, "class_feature": False}, CONNECTORS["hybrid"], "needs an overview of the whole image"),
        ({**TILED, "patch_bias": True}, {}, "set patch_bias=false"),
        (
            {**TILED, "feature_layers": [1], "last_output": False, "post_norm": False},
            {},
            "the blocks of tiles.global_layers would be unused; set it to true",
        ),
    ],
)
def test_contradictions_are_refused(vision: dict[str, Any], connector: dict[str, Any], complaint: str) -> None:
    block = connector if "kind" in connector else {"kind": "cross_attention", "every": 2, **connector}
    with pytest.raises(ValidationError, match=complaint):
        ModelConfig.model_validate({"decoder": DECODER, "vision": vision, "connector": block})


def test_media_spec() -> None:
    spec = media_spec(config("cross_attention", vision=TILED))
    assert (spec.class_features, spec.max_tiles, spec.patches_per_image) == (1, 3, 24)
    assert spec.num_features((1, 2, 4)) == 9
    assert media_spec(config("cross_attention", vision=ALONE)).patches_per_image is None
