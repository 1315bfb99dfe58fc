"""Batches: every index against a search over the documents themselves."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import BranchedSegments, MediaBlock, MultimodalBatch, Segments
from data_pipeline.collate import collate, concatenate
from data_pipeline.config import DataConfig
from data_pipeline.cutting import Cutter
from data_pipeline.document import Document, MediaItem, Region, Span
from data_pipeline.documents import null_document
from data_pipeline.known_faults import RunFaults
from data_pipeline.loader import Loader
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.mixture import Schedule
from data_pipeline.packing import Budget, Pack, Packer
from data_pipeline.state import LaneState, StreamPosition
from data_pipeline.storage.storage import Storage
from data_pipeline.stream import LaneStream, OpenDataset
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.transport import Inbox, Outbox


def assert_same(a: object, b: object) -> None:
    """Equality through every field and tensor."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, MultimodalBatch | MediaBlock | Segments | BranchedSegments):
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
    budget = Budget(mixture_config.packing, spec, null_document(spec, tokenizer.pad_id))
    faults = RunFaults.load(mixture_config.faults, ())
    order = mixture_config.order
    datasets = [
        OpenDataset.open(each, order, 1, tokenizer, spec, faults, Storage()) for each in mixture_config.datasets
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
    features = block.items.bounds  # One feature a patch: merge is 1.
    token, item, dest, source, keys_of_token = 0, 0, [], [], []
    for document in documents:
        for view in document.items:
            np.testing.assert_array_equal(block.values[features[item] : features[item + 1]].numpy(), view.values)
            if view.embedded:
                source.extend(range(features[item], features[item + 1]))
            item += 1
        dest.extend(token + slot for slot in document.dest.tolist())
        first = item - len(document.items)
        for position in range(document.num_tokens):
            span = [span for span in document.spans if span.start <= position][-1]
            keys_of_token.append([k for i in span.items for k in range(features[first + i], features[first + i + 1])])
        token += document.num_tokens
    assert block.source.tolist() == source
    assert block.dest.tolist() == dest
    assert block.span_tokens.total == batch.segments.total == token
    assert block.span_keys.total == len(block.keys)
    for span in range(block.span_tokens.num):
        rows = block.keys[block.span_keys.bounds[span] : block.span_keys.bounds[span + 1]].tolist()
        for position in range(block.span_tokens.bounds[span], block.span_tokens.bounds[span + 1]):
            assert keys_of_token[position] == rows


def test_counts_and_pairs(packs: list[Pack], spec: MediaSpec) -> None:
    batch = collate([*packs, Pack((null_document(spec, 0),), -1)], spec)
    documents = [document for pack in packs for document in pack.documents]
    real = [document for document in documents if not document.is_null]
    assert batch.num_samples == len(real)
    assert batch.num_tokens == int(batch.valid.sum()) == sum(document.num_tokens for document in real)
    assert batch.weight == float((batch.labels != -100).sum()) > 0
    assert batch.lanes == (0, 1, 2, 3, -1)
    assert batch.lane_tokens[:-1] == tuple(sum(document.num_tokens for document in pack.documents) for pack in packs)
    assert sum(batch.lane_tokens) == batch.segments.total
    single = [i for i, document in enumerate(documents) if document.num_images == 1 and not document.is_null]
    assert batch.pairs[:, 1].tolist() == single
    assert len(set(batch.pairs[:, 0].tolist())) == len(single) > 0


def test_every_view_says_where_it_belongs(packs: list[Pack], spec: MediaSpec) -> None:
    """Against the extents of the images, in whole documents and in those that are cut."""
    documents = [document for pack in packs for document in pack.documents]
    places = collate(packs, spec).media["image"].places
    image = item = 0
    for segment, document in enumerate(documents):
        after = [*(extent.first_item for extent in document.images[1:]), len(document.items)]
        for extent, end in zip(document.images, after, strict=False):
            views = document.items[extent.first_item : end]
            tiles = [view.place for view in views if view.place is not None]
            grid = (max(row for row, _ in tiles) + 1, max(column for _, column in tiles) + 1) if tiles else (1, 1)
            assert len(set(tiles)) == len(tiles) == (grid[0] * grid[1] if tiles else 0)
            for view in views:
                assert places[item] == (segment, image, grid, view.place)
                item += 1
            image += 1
    assert item == len(places)
    assert {place.image for place in places} == set(range(image))


def test_a_part_of_a_page_keeps_its_images_apart(packs: list[Pack], spec: MediaSpec) -> None:
    """Two images in a row are attended by the text behind them, so a part with that text alone has both."""
    page = next(document for pack in packs for document in pack.documents if document.num_images == 3)
    part = Cutter(page).cut(page.images[1].stop, page.images[2].start)
    places = collate([Pack((part,), 0)], spec).media["image"].places
    if spec.placement is Placement.EMBEDDING:
        assert not places
    else:
        assert [place.image for place in places] == sorted(place.image for place in places)
        assert {place.image for place in places} == {0, 1}


def test_concatenating_batches_is_collating_their_packs_together(packs: list[Pack], spec: MediaSpec) -> None:
    together = concatenate([collate([pack], spec) for pack in packs], spec)
    assert_same(together, collate(packs, spec))


@pytest.mark.parametrize("shared", [True, False])
def test_a_parcel_gives_back_what_was_put_in(packs: list[Pack], spec: MediaSpec, shared: bool) -> None:
    outbox, inbox = Outbox(shared=shared), Inbox()
    everything = [packs, [Pack((null_document(spec, 0),), -1)]]
    for _ in range(3):
        sent = inbox.open(outbox.wrap(tuple(collate(some, spec, outbox.join) for some in everything)))
        for some, opened in zip(everything, sent, strict=True):
            assert_same(opened, collate(some, spec))


def test_a_text_model_has_no_media() -> None:
    spec = MediaSpec()
    batch = collate([Pack((null_document(spec, 0),), -1)], spec)
    assert batch.media == {}
    assert batch.pairs.shape == (0, 2)
    null_pack = Pack((null_document(spec, 0),), -1)
    assert_same(concatenate([batch, batch], spec), collate([null_pack, null_pack], spec))


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
    part = MediaItem(values, (1, 4, 8), embedded, kept=Region(top=1, left=2, height=1, width=2))
    assert [item.num_features(spec) for item in (whole, part)] == [2, 2]
    # Features of the second item: 2, 3, 4, 5 in its first row and 6, 7, 8, 9 in its second.
    empty, dest = np.zeros(6, np.int32), np.arange(4 * embedded, dtype=np.int32)
    document = Document(
        token_ids=empty,
        labels=empty,
        loss_weights=empty.astype(np.float32),
        position_ids=empty,
        items=(whole, part),
        dest=dest,
        spans=(Span(0, () if embedded else (0, 1)),),
    )
    block = collate([Pack((document,), 0)], spec).media["image"]
    rows = block.source if embedded else block.keys
    assert rows.tolist() == [0, 1, 8, 9]
    doubled = concatenate([collate([Pack((document,), 0)], spec)] * 2, spec).media["image"]
    assert (doubled.source if embedded else doubled.keys).tolist() == [0, 1, 8, 9, 10, 11, 18, 19]


@given(st.data())
def test_kept_features_are_those_of_the_rectangle(data: st.DataObject) -> None:
    merge, frames, rows, columns = (data.draw(st.integers(1, most)) for most in (2, 3, 5, 5))
    height, width = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    region = Region(data.draw(st.integers(0, rows - height)), data.draw(st.integers(0, columns - width)), height, width)
    first, spec = data.draw(st.integers(0, 50)), MediaSpec(Placement.EMBEDDING, merge=merge)
    grid = (frames, rows * merge, columns * merge)
    numbers = np.arange(first, first + frames * rows * columns).reshape(frames, rows, columns)
    for kept, expected in ((None, numbers), (region, numbers[:, region.top :, region.left :][:, :height, :width])):
        item = MediaItem(np.zeros((1, 1), np.uint8), grid, embedded=True, kept=kept)
        found = [number for start, count in item.kept_features(spec, first) for number in range(start, start + count)]
        assert found == expected.ravel().tolist()
        assert item.num_features(spec) == len(found)
