"""Packing: budgets hold, nothing is lost or comes twice, and a state goes on exactly where it was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import PackingConfig
from data_pipeline.document import IGNORE, Document, ImageExtent, MediaItem, Span
from data_pipeline.documents import null_document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.lanes import Cursor
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing import Budget, Load, Made, Pack, Packer, truncate
from data_pipeline.sample import Provenance
from data_pipeline.state import Drawn, StreamPosition

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=2, merge=1, cost_per_patch=0.5)


def make_document(number: int, num_text: int, images: tuple[int, ...] = ()) -> Document:
    """A document of embedded images of 1 x n patches, one after the other behind bos, and then text."""
    items: list[MediaItem] = []
    extents: list[ImageExtent] = []
    dest: list[int] = []
    at = 1
    for patches in images:
        extents.append(ImageExtent(at, len(items), at + patches))
        items.append(MediaItem(np.full((patches, SPEC.patch_dim), number % 256, np.uint8), (1, 1, patches), True))
        dest.extend(range(at, at + patches))
        at += patches
    length = at + num_text
    labels = np.full(length, IGNORE, np.int32)
    labels[at - 1 : -1] = number
    return Document(
        token_ids=np.arange(length, dtype=np.int32),
        labels=labels,
        loss_weights=(labels != IGNORE).astype(np.float32),
        position_ids=np.arange(length, dtype=np.int32),
        items=tuple(items),
        dest=np.array(dest, np.int32),
        spans=(Span(0, ()),),
        provenance=Provenance("set", "shard", str(number), number),
        images=tuple(extents),
    )


@dataclass
class ListSource:
    """Documents of a list over and over, None where a sample is skipped; the cursor's offset is the place."""

    documents: list[Document | None]
    at: int = 0

    def position(self) -> StreamPosition:
        return StreamPosition((self.at,), (Cursor(0, 0, self.at),))

    def make(self) -> list[Made] | None:
        self.at += 1
        drawn = Drawn(0, 0, self.at - 1)
        document = self.remake(drawn)
        return [] if document is None else [Made(drawn, document)]

    def remake(self, drawn: Drawn) -> Document | None:
        return self.documents[drawn.sample % len(self.documents)]


def _budget(max_tokens: int = 40, **others: object) -> Budget:
    config = PackingConfig.model_validate({"max_tokens": max_tokens, **others})
    return Budget(config, SPEC, null_document(SPEC, 0))


def _numbers(pack: Pack) -> list[int]:
    return [document.provenance.index for document in pack.documents if document.provenance is not None]


shapes = st.tuples(st.integers(1, 12), st.lists(st.integers(1, 6), max_size=2).map(tuple))
documents = st.lists(st.one_of(shapes, st.none()), min_size=1, max_size=40).filter(any)
budgets = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(26, 60),
        "max_cost": st.one_of(st.none(), st.integers(40, 90)),
        "max_documents": st.one_of(st.none(), st.integers(1, 5)),
        "look_ahead": st.integers(1, 6),
    }
)


def _source(shapes: Sequence[tuple[int, tuple[int, ...]] | None], at: int = 0) -> ListSource:
    made = [None if shape is None else make_document(i, *shape) for i, shape in enumerate(shapes)]
    return ListSource(made, at)


@given(shapes=documents, budget=budgets)
def test_packs_keep_their_budgets_and_hold_an_image(shapes: list, budget: dict) -> None:
    packer = Packer(_source(shapes), _budget(**budget), lane=0)
    for _ in range(12):
        pack = packer.next_pack()
        assert sum(document.num_tokens for document in pack.documents) <= budget["max_tokens"]
        assert budget["max_cost"] is None or sum(d.cost(SPEC) for d in pack.documents) <= budget["max_cost"]
        assert budget["max_documents"] is None or len(_numbers(pack)) <= budget["max_documents"]
        assert any(document.items for document in pack.documents)
        nulls = [document for document in pack.documents if document.is_null]
        assert bool(nulls) == all(not d.items for d in pack.documents if not d.is_null)


@given(shapes=documents, budget=budgets)
def test_nothing_is_lost_and_nothing_comes_twice(shapes: list, budget: dict) -> None:
    source = _source(shapes)
    packer = Packer(source, _budget(**budget), lane=0)
    given_out = [number for _ in range(12) for number in _numbers(packer.next_pack())]
    read = [shapes_index % len(shapes) for shapes_index in range(source.at)]
    read = [number for number in read if shapes[number] is not None]
    for number in given_out:
        read.remove(number)
    assert len(read) <= budget["look_ahead"]


@given(shapes=documents, budget=budgets, steps=st.integers(0, 8))
def test_a_state_goes_on_exactly_where_it_was_taken(shapes: list, budget: dict, steps: int) -> None:
    packer = Packer(_source(shapes), _budget(**budget), lane=0)
    for _ in range(steps):
        packer.next_pack()
    position, waiting = packer.state()
    again = Packer(_source(shapes, position.draws[0]), _budget(**budget), lane=0, waiting=waiting)
    for _ in range(6):
        assert _numbers(again.next_pack()) == _numbers(packer.next_pack())
        assert again.state() == packer.state()


def test_look_ahead_fills_the_room_that_plain_greedy_leaves() -> None:
    shapes = [(20, (1,)), (25, (1,)), (8, (1,)), (3, (1,))]
    greedy = Packer(_source(shapes), _budget(max_tokens=36), lane=0)
    assert _numbers(greedy.next_pack()) == [0]
    ahead = Packer(_source(shapes), _budget(max_tokens=36, look_ahead=3), lane=0)
    assert _numbers(ahead.next_pack()) == [0, 2]
    assert _numbers(ahead.next_pack()) == [1, 3]


def test_a_document_that_no_pack_can_hold_is_refused_with_the_numbers() -> None:
    with pytest.raises(SampleError, match=r"41 tokens and 5 patches .* holds 40 tokens"):
        _budget().admit(make_document(0, 35, (5,)))
    with pytest.raises(SampleError, match="a cost of 20"):
        _budget(max_cost=20).admit(make_document(0, 10, (5, 15)))


def test_room_for_the_null_document_is_kept() -> None:
    text = make_document(0, 39)  # 40 tokens, and the null document has one more.
    with pytest.raises(SampleError):
        _budget().admit(text)
    assert _budget(max_tokens=41).admit(text) is text
    shorter = _budget(too_long="truncate").admit(text)
    assert shorter.num_tokens == 39


def test_truncation_keeps_whole_images_and_consistent_columns() -> None:
    document = make_document(0, 6, (4, 4))
    cut = truncate(document, 7)  # Inside the second image, which goes.
    assert cut.num_tokens == 5
    assert len(cut.items) == cut.num_images == 1
    assert cut.dest.tolist() == [1, 2, 3, 4]
    assert truncate(document, 11).num_images == 2
    assert truncate(document, 100) is document


def test_truncation_that_leaves_nothing_to_learn_is_refused() -> None:
    with pytest.raises(SampleError):
        _budget(max_tokens=8, too_long="truncate").admit(make_document(0, 6, (4, 9)))


def test_budgets_that_hold_no_null_document_are_refused() -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=2, fixed_grid=(4, 4))
    null = null_document(spec, 0)
    with pytest.raises(DataConfigError, match="at least 17"):
        Budget(PackingConfig(max_tokens=16), spec, null)
    with pytest.raises(DataConfigError, match="max_cost"):
        Budget(PackingConfig(max_tokens=64, max_cost=5), spec, null)


def test_cost_counts_patches_at_the_price_of_the_model() -> None:
    assert Load().plus(make_document(0, 3, (4,)), SPEC).cost == 8 + 0.5 * 4
