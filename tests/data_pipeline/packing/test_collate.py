"""Batches: every index array is compared with a search over the documents."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import BranchedSegments, LearnedRows, MediaBlock, MultimodalBatch, Segments
from data_pipeline.config import DataConfig
from data_pipeline.document import ContentArea, Document, ImageExtent, MediaItem, Region, Span
from data_pipeline.loader.lane_packs import LaneStream
from data_pipeline.loader.loader import Loader
from data_pipeline.loader.sample_source import OpenDataset
from data_pipeline.loader.shared_buffers import BatchReceiver, BatchSender
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.lanes import Schedule
from data_pipeline.order.state import LaneState, StreamPosition
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.packer import Budget, Pack, Packer
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.packing.truncation import Cutter
from data_pipeline.sample import Provenance
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer


def assert_same(a: object, b: object) -> None:
    """Assert that all fields and tensors are equal."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, MultimodalBatch | MediaBlock | LearnedRows | Segments | BranchedSegments):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.fixture(params=[Placement.EMBEDDING, Placement.CROSS_ATTENTION, Placement.HYBRID])
def spec(request: pytest.FixtureRequest) -> MediaSpec:
    return MediaSpec(request.param, patch_size=8, fixed_grid=(2, 2))


@pytest.fixture
def packs(mixture_config: DataConfig, spec: MediaSpec) -> list[Pack]:
    tokenizer = load_tokenizer(mixture_config.tokenizer)
    budget = Budget(mixture_config.packing, spec, dummy_document(spec, tokenizer.pad_id))
    faults = RunFaults.load(mixture_config.faults, ())
    datasets = [
        OpenDataset.open(mixture_config, each, 1, tokenizer, spec, faults, Storage())
        for each in mixture_config.datasets
    ]
    schedule = Schedule((0,), ((2.0, 1.0, 0.7),))
    made = []
    for lane in range(4):
        stream = LaneStream(mixture_config, datasets, schedule, lane, budget, LaneState(StreamPosition.start(3)))
        made.append(Packer(stream, budget, lane).next_pack())
    return made


def test_a_batch_finds_every_feature_where_its_document_put_it(packs: list[Pack], spec: MediaSpec) -> None:
    batch = collate(packs, spec)
    block = batch.media["image"]
    documents = [document for pack in packs for document in pack.documents]
    features = block.items.bounds  # One feature per patch: merge is 1.
    token, item, dest, source, keys_of_token = 0, 0, [], [], []
    for document in documents:
        for crop in document.items:
            np.testing.assert_array_equal(block.values[features[item] : features[item + 1]].numpy(), crop.values)
            if crop.embedded:
                source.extend(range(features[item], features[item + 1]))
            item += 1
        dest.extend(token + slot for slot in document.scatter_index.tolist())
        first = item - len(document.items)
        for position in range(document.num_tokens):
            span = [span for span in document.spans if span.start <= position][-1]
            keys_of_token.append([k for i in span.items for k in range(features[first + i], features[first + i + 1])])
        token += document.num_tokens
    assert block.gather_index.tolist() == source
    assert block.scatter_index.tolist() == dest
    assert block.span_tokens.total == batch.segments.total == token
    assert block.span_keys.total == len(block.attended_index)
    for span in range(block.span_tokens.num):
        rows = block.attended_index[block.span_keys.bounds[span] : block.span_keys.bounds[span + 1]].tolist()
        for position in range(block.span_tokens.bounds[span], block.span_tokens.bounds[span + 1]):
            assert keys_of_token[position] == rows


def test_counts_and_pairs(packs: list[Pack], spec: MediaSpec) -> None:
    batch = collate([*packs, Pack((dummy_document(spec, 0),), -1)], spec)
    documents = [document for pack in packs for document in pack.documents]
    real = [document for document in documents if not document.is_dummy]
    assert batch.num_samples == len(real)
    assert batch.num_tokens == int(batch.valid.sum()) == sum(document.num_tokens for document in real)
    assert batch.weight == float((batch.labels != -100).sum()) > 0
    assert batch.learned is not None
    assert torch.equal(batch.learned.index(), batch.loss_weights.nonzero().flatten())
    assert batch.lanes == (0, 1, 2, 3, -1)
    assert batch.lane_tokens[:-1] == tuple(sum(document.num_tokens for document in pack.documents) for pack in packs)
    assert sum(batch.lane_tokens) == batch.segments.total
    single = [i for i, document in enumerate(documents) if document.num_images == 1 and not document.is_dummy]
    assert batch.pairs[:, 1].tolist() == single
    assert len(set(batch.pairs[:, 0].tolist())) == len(single) > 0


def test_every_view_says_where_it_belongs(packs: list[Pack], spec: MediaSpec) -> None:
    """Compare with the images' extents, in whole and in cut documents."""
    documents = [document for pack in packs for document in pack.documents]
    places = collate(packs, spec).media["image"].locations
    image = item = 0
    for segment, document in enumerate(documents):
        after = [*(extent.first_item for extent in document.images[1:]), len(document.items)]
        for extent, end in zip(document.images, after, strict=False):
            crops = document.items[extent.first_item : end]
            tiles = [crop.cell for crop in crops if crop.cell is not None]
            grid = (max(row for row, _ in tiles) + 1, max(column for _, column in tiles) + 1) if tiles else (1, 1)
            assert len(set(tiles)) == len(tiles) == (grid[0] * grid[1] if tiles else 0)
            for crop in crops:
                assert places[item] == (segment, image, grid, crop.cell, False)
                item += 1
            image += 1
    assert item == len(places)
    assert {place.image for place in places} == set(range(image))


def test_a_part_of_a_page_keeps_its_images_apart(packs: list[Pack], spec: MediaSpec) -> None:
    """The text after two consecutive images attends both, so a part with only that text has both images."""
    page = next(document for pack in packs for document in pack.documents if document.num_images == 3)
    part = Cutter(page).cut(page.images[1].stop, page.images[2].start)
    places = collate([Pack((part,), 0)], spec).media["image"].locations
    if spec.placement is Placement.EMBEDDING:
        assert not places
    else:
        assert [place.image for place in places] == sorted(place.image for place in places)
        assert {place.image for place in places} == {0, 1}


def test_concatenating_batches_is_collating_their_packs_together(packs: list[Pack], spec: MediaSpec) -> None:
    together = concatenate([collate([pack], spec) for pack in packs], spec)
    assert_same(together, collate(packs, spec))


def test_a_batch_survives_the_transport(packs: list[Pack], spec: MediaSpec) -> None:
    sender, receiver = BatchSender(), BatchReceiver()
    everything = [packs, [Pack((dummy_document(spec, 0),), -1)]]
    for _ in range(3):
        sent = receiver.decode(sender.encode(tuple(collate(some, spec, sender.join) for some in everything)))
        for some, opened in zip(everything, sent, strict=True):
            assert_same(opened, collate(some, spec))


def test_a_text_model_has_no_media() -> None:
    spec = MediaSpec()
    batch = collate([Pack((dummy_document(spec, 0),), -1)], spec)
    assert batch.media == {}
    assert batch.pairs.shape == (0, 2)
    dummy_pack = Pack((dummy_document(spec, 0),), -1)
    assert_same(concatenate([batch, batch], spec), collate([dummy_pack, dummy_pack], spec))
    with pytest.raises(ValueError, match="a batch needs at least one document"):
        collate([Pack((), -1)], spec)


def test_micro_lanes_only_regroup(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    single = next(Loader(mixture_config, hybrid_spec, seed=3))
    pairs = next(Loader(mixture_config, hybrid_spec, seed=3, micro_lanes=2))
    assert [micro.lanes for micro in pairs.microbatches] == [(0, 1), (2, 3), (4,)]
    assert_same(pairs.microbatches[0], concatenate(single.microbatches[:2], hybrid_spec))
    assert pairs.state == single.state


@pytest.mark.parametrize("embedded", [True, False])
def test_an_item_hands_on_only_what_it_keeps(embedded: bool) -> None:
    placement = Placement.EMBEDDING if embedded else Placement.CROSS_ATTENTION
    spec = MediaSpec(placement, patch_size=1, merge=2)
    values = np.zeros((32, 3), np.uint8)
    whole = MediaItem(values[:8], (1, 2, 4), embedded)
    part = MediaItem(values, (1, 4, 8), embedded, kept_region=Region(top=1, left=2, height=1, width=2))
    assert [item.num_features(spec) for item in (whole, part)] == [2, 2]
    # Features of the second item: 2, 3, 4, 5 in its first row and 6, 7, 8, 9 in its second.
    empty, dest = np.zeros(6, np.int32), np.arange(4 * embedded, dtype=np.int32)
    document = Document(
        token_ids=empty,
        labels=empty,
        loss_weights=empty.astype(np.float32),
        position_ids=empty,
        items=(whole, part),
        scatter_index=dest,
        spans=(Span(0, () if embedded else (0, 1)),),
    )
    block = collate([Pack((document,), 0)], spec).media["image"]
    rows = block.gather_index if embedded else block.attended_index
    assert rows.tolist() == [0, 1, 8, 9]
    doubled = concatenate([collate([Pack((document,), 0)], spec)] * 2, spec).media["image"]
    assert (doubled.gather_index if embedded else doubled.attended_index).tolist() == [0, 1, 8, 9, 10, 11, 18, 19]


@given(st.data())
def test_kept_features_are_those_of_the_rectangle(data: st.DataObject) -> None:
    merge, frames, rows, columns = (data.draw(st.integers(1, most)) for most in (2, 3, 5, 5))
    height, width = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    region = Region(data.draw(st.integers(0, rows - height)), data.draw(st.integers(0, columns - width)), height, width)
    first, spec = data.draw(st.integers(0, 50)), MediaSpec(Placement.EMBEDDING, merge=merge)
    grid = (frames, rows * merge, columns * merge)
    numbers = np.arange(first, first + frames * rows * columns).reshape(frames, rows, columns)
    for kept, expected in ((None, numbers), (region, numbers[:, region.top :, region.left :][:, :height, :width])):
        item = MediaItem(np.zeros((1, 1), np.uint8), grid, embedded=True, kept_region=kept)
        found = [number for start, count in item.kept_features(spec, first) for number in range(start, start + count)]
        assert found == expected.ravel().tolist()
        assert item.num_features(spec) == len(found)


def _item(rng: np.random.Generator, spec: MediaSpec, image: int) -> MediaItem:
    rows, columns, frames = (int(number) for number in rng.integers(1, 4, 3))
    embedded = {Placement.EMBEDDING: True, Placement.HYBRID: rng.random() < 0.5}.get(spec.placement, False)
    top, left = int(rng.integers(rows)), int(rng.integers(columns))
    region = Region(top, left, int(rng.integers(rows - top)) + 1, int(rng.integers(columns - left)) + 1)
    filled = Region(*rng.integers(0, 4, 4).tolist())
    grid = (frames, rows * spec.merge, columns * spec.merge)
    return MediaItem(
        values=rng.integers(0, 256, (int(np.prod(grid)), spec.patch_dim), np.uint8),
        grid=grid,
        embedded=embedded,
        kept_region=region if rng.random() < 0.5 else None,
        cell=(1, int(rng.integers(3))) if rng.random() < 0.6 else None,
        content_area=ContentArea(region, filled) if spec.padding and rng.random() < 0.5 else None,
        tiles=(1, int(rng.integers(3)) + 1),
        image=image,
        tag=() if embedded else tuple(rng.integers(1, 90, rng.integers(3)).tolist()),
    )


def _document(rng: np.random.Generator, spec: MediaSpec) -> Document:
    images = int(rng.integers(4)) if spec.placement is not Placement.NONE else 0
    items = [_item(rng, spec, image) for image in range(images) for _ in range(rng.integers(1, 4))]
    slots = sum(item.num_features(spec) for item in items if item.embedded)
    length = slots + int(rng.integers(1, 7))
    attended = [number for number, item in enumerate(items) if not item.embedded]

    def some_tokens() -> list[int]:
        return np.flatnonzero(np.r_[False, rng.random(length - 1) < 1 / 3]).tolist()

    branches = some_tokens()
    return Document(
        token_ids=rng.integers(0, 99, length, np.int32),
        labels=rng.integers(0, 99, length, np.int32),
        # The sum is exact in float64 in any order, but not in float32.
        loss_weights=rng.choice([0.0, 0.5, 1.0, 2.0**24], length).astype(np.float32),
        position_ids=rng.integers(0, 99, (length, 3)[: spec.position_axes - 1 or 1], np.int32),
        items=tuple(items),
        scatter_index=rng.permutation(length)[:slots].astype(np.int32),
        spans=tuple(
            Span(start, tuple(rng.permutation(attended)[: rng.integers(3)].astype(int).tolist()))
            for start in [0, *some_tokens()]
        ),
        provenance=Provenance("set", "shard", str(length), images) if rng.random() < 0.8 else None,
        images=tuple(ImageExtent(number, 0, number + 1) for number in range(images)),
        branches=tuple(branches) if len(branches) > 1 and rng.random() < 0.5 else (),
    )


def _made_by_hand(placement: Placement, seed: int) -> tuple[list[Pack], MediaSpec]:
    """Packs of random documents: unlikely, but valid for a batch."""
    rng = np.random.default_rng(seed)
    spec = MediaSpec(
        placement,
        patch_size=1,
        merge=int(rng.integers(1, 3)),
        class_features=int(rng.integers(2)) * (placement in (Placement.CROSS_ATTENTION, Placement.PAIR)),
        padding=rng.random() < 0.5,
        position_axes=(1, 3)[seed % 2],
    )
    packs = [[_document(rng, spec) for _ in range(rng.integers(1, 4))] for _ in range(rng.integers(1, 5))]
    return [Pack(tuple(held), lane - 1) for lane, held in enumerate(packs)], spec


@dataclass
class _Rows:
    """Return the names of all feature rows, and those of each item."""

    names: list[tuple[int, ...]]
    kept: list[list[tuple[int, ...]]]
    tags: list[list[tuple[int, ...]]]

    @classmethod
    def of(cls, items: list[MediaItem], spec: MediaSpec) -> _Rows:
        found = cls([], [], [])
        for number, item in enumerate(items):
            frames, height, width = item.grid[0], item.grid[1] // spec.merge, item.grid[2] // spec.merge
            top, left, rows, columns = item.kept_region or (0, 0, height, width)
            found.kept.append([])
            for frame in range(frames):
                classes = [(number, frame, -1, -1)] * spec.class_features
                inside = [(number, frame, row, column) for row in range(height) for column in range(width)]
                found.names += classes + inside
                found.kept[-1] += classes if item.kept_region is None else []
                found.kept[-1] += [
                    name for name in inside if top <= name[2] < top + rows and left <= name[3] < left + columns
                ]
        for number, item in enumerate(items):
            found.tags.append([(-1, number, token, place) for place, token in enumerate(item.tag)])
            found.names += found.tags[-1]
        return found


def _check_media(batch: MultimodalBatch, documents: list[Document], spec: MediaSpec) -> None:
    block, items = batch.media["image"], [item for document in documents for item in document.items]
    rows = _Rows.of(items, spec)
    assert block.grids == tuple(item.grid for item in items)
    assert block.grid.tolist() == [[*item.grid] for item in items]
    assert (block.grid.dtype, block.grid.shape[1]) == (torch.int32, 3)
    assert block.values.tolist() == [row for item in items for row in item.values.tolist()]
    assert (block.values.dtype, block.values.shape[1]) == (torch.uint8, spec.patch_dim)
    assert block.items.bounds == tuple(accumulate((len(item.values) for item in items), initial=0))
    assert block.tag_ids.tolist() == [token for item in items for token in item.tag]
    sources = [name for item, kept in zip(items, rows.kept, strict=True) if item.embedded for name in kept]
    assert [rows.names[row] for row in block.gather_index.tolist()] == sources
    assert {
        tensor.dtype for tensor in (block.gather_index, block.scatter_index, block.attended_index, block.tag_ids)
    } == {torch.int64}
    first_token, first_item, image, dest, attended, places = 0, 0, -1, [], [], []
    for segment, document in enumerate(documents):
        dest += [first_token + int(slot) for slot in document.scatter_index]
        for token in range(document.num_tokens):
            span = [span for span in document.spans if span.start <= token][-1]
            numbers = [first_item + number for number in span.items]
            attended.append([name for number in numbers for name in rows.tags[number] + rows.kept[number]])
        for number, item in enumerate(document.items):
            image += number == 0 or item.image != document.items[number - 1].image
            places.append((segment, image, item.tiles, item.cell, item.is_video))
        first_token, first_item = first_token + document.num_tokens, first_item + len(document.items)
    assert block.scatter_index.tolist() == dest
    assert list(block.locations) == places
    spans = [
        [rows.names[row] for row in block.attended_index[start:stop].tolist()]
        for start, stop in zip(block.span_keys.bounds, block.span_keys.bounds[1:], strict=False)
    ]
    edges = block.span_tokens.bounds
    assert [span for span, a, b in zip(spans, edges, edges[1:], strict=False) for _ in range(a, b)] == attended
    if not spec.padding:
        assert block.content_area is None
        return
    covers = [item.content_area or ((0, 0, *item.grid[1:]), (0, 0, *item.grid[1:])) for item in items]
    assert block.content_area is not None
    assert block.content_area.tolist() == [[*touched, *filled] for touched, filled in covers]
    assert (block.content_area.dtype, block.content_area.shape[1]) == (torch.int32, 8)


def _check_text(batch: MultimodalBatch, packs: list[Pack]) -> None:
    documents = [document for pack in packs for document in pack.documents]
    for name in ("token_ids", "labels", "loss_weights", "position_ids"):
        found = getattr(batch, name)
        assert found.tolist() == [row for document in documents for row in getattr(document, name).tolist()]
        assert found.dtype == (torch.float32 if name == "loss_weights" else torch.int64)
    assert batch.valid.tolist() == [not document.is_dummy for document in documents for _ in document.token_ids]
    assert batch.segments.bounds == tuple(accumulate((document.num_tokens for document in documents), initial=0))
    assert batch.lanes == tuple(pack.lane for pack in packs)
    assert batch.lane_tokens == tuple(sum(len(document.labels) for document in pack.documents) for pack in packs)
    assert batch.provenance == tuple(document.provenance for document in documents)
    assert batch.weight == sum(weight for document in documents for weight in document.loss_weights.tolist())
    assert batch.num_tokens == sum(document.num_tokens for document in documents if not document.is_dummy)
    first_item, pairs = 0, []
    for segment, document in enumerate(documents):
        whole = [number for number, item in enumerate(document.items) if item.cell is None]
        if len(document.images) == 1 and not document.is_dummy:
            pairs.append([first_item + [*whole, 0][0], segment])
        first_item += len(document.items)
    assert (batch.pairs.tolist(), batch.pairs.shape[1], batch.pairs.dtype) == (pairs, 2, torch.int64)
    # Tokens that each token sees: those before the first branch and, up to itself, those of its own branch.
    first, seen = 0, []
    for document in documents:
        for token in range(document.num_tokens):
            start = max((branch for branch in document.branches if branch <= token), default=0)
            shared = range(document.branches[0]) if start else ()
            seen.append([first + each for each in (*shared, *range(start, token + 1))])
        first += document.num_tokens
    if batch.branched is None:
        assert not any(document.branches for document in documents)
        return
    assert any(document.branches for document in documents)
    queries, keys, found = batch.branched.queries.bounds, batch.branched.keys.bounds, []
    for begin, end, stop in zip(queries, queries[1:], keys[1:], strict=False):
        first_key = keys[len(keys) - 1 - keys[::-1].index(stop) - 1] if stop else 0
        visible = batch.branched.key_tokens[first_key:stop].tolist()
        found += [visible[: len(visible) - (end - 1 - token)] for token in range(begin, end)]
    assert found == seen


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("seed", range(12))
def test_a_batch_made_by_hand(placement: Placement, seed: int) -> None:
    """Compare with loops over documents, tokens and features that name each row."""
    packs, spec = _made_by_hand(placement, seed)
    documents = [document for pack in packs for document in pack.documents]
    batch = collate(packs, spec)
    _check_text(batch, packs)
    if placement is Placement.NONE:
        assert batch.media == {}
    else:
        _check_media(batch, documents, spec)
    for first in range(len(packs)):
        pieces = [collate(some, spec) for some in (packs[:first], packs[first : first + 1], packs[first + 1 :]) if some]
        assert_same(concatenate(pieces, spec), batch)
