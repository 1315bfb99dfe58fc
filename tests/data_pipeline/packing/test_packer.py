"""Packing: budgets are kept, no document is lost or repeated, and a packer continues exactly from its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.packing import CLIPS, CLIPS_SPEC, Workload, clips, emoji, long_tail, pack
from benchmarks.packing import SPEC as LONG_TAIL_SPEC
from data_pipeline.document import IGNORE, Document, ImageExtent, MediaItem, Span
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.state import Cursor, Drawn, StreamPosition
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.packer import Budget, DrawnDocument, Pack, Packer, PackUsage
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Provenance

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=2, merge=1, cost_per_patch=0.5)


def make_document(number: int, num_text: int, images: tuple[int, ...] = ()) -> Document:
    """Return a document of bos, embedded images of 1 x n patches, and text."""
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
        scatter_index=np.array(dest, np.int32),
        spans=(Span(0, ()),),
        provenance=Provenance("set", "shard", str(number), number),
        images=tuple(extents),
    )


@dataclass
class ListSource:
    """An endless repetition of a list of documents; None is a skipped sample. The cursor's offset is the position."""

    documents: list[Document | None]
    at: int = 0
    split_by: Budget | None = None

    @property
    def position(self) -> StreamPosition:
        return StreamPosition((self.at,), (Cursor(0, 0, self.at),))

    def make(self) -> list[DrawnDocument] | None:
        self.at += 1
        drawn = Drawn(0, 0, self.at - 1)
        return [DrawnDocument(drawn._replace(part=part), document) for part, document in enumerate(self._parts(drawn))]

    def remake(self, drawn: Drawn) -> Document | None:
        return self._parts(drawn)[drawn.part]

    def _parts(self, drawn: Drawn) -> list[Document]:
        document = self.documents[drawn.sample % len(self.documents)]
        if document is None:
            return []
        try:
            return [document] if self.split_by is None else self.split_by.admit(document)
        except SampleError:
            return []


def _budget(max_tokens: int = 40, **others: object) -> Budget:
    config = PackingConfig.model_validate({"max_tokens": max_tokens, **others})
    return Budget(config, SPEC, dummy_document(SPEC, 0))


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


def _source(
    shapes: Sequence[tuple[int, tuple[int, ...]] | None], at: int = 0, split_by: Budget | None = None
) -> ListSource:
    made = [None if shape is None else make_document(i, *shape) for i, shape in enumerate(shapes)]
    return ListSource(made, at, split_by)


@given(shapes=documents, budget=budgets)
def test_packs_keep_their_budgets_and_hold_an_image(shapes: list, budget: dict) -> None:
    packer = Packer(_source(shapes), _budget(**budget), lane=0)
    for _ in range(12):
        pack = packer.next_pack()
        assert sum(document.num_tokens for document in pack.documents) <= budget["max_tokens"]
        assert budget["max_cost"] is None or sum(d.cost(SPEC) for d in pack.documents) <= budget["max_cost"]
        assert budget["max_documents"] is None or len(_numbers(pack)) <= budget["max_documents"]
        assert any(document.items for document in pack.documents)
        dummies = [document for document in pack.documents if document.is_dummy]
        assert bool(dummies) == all(not d.items for d in pack.documents if not d.is_dummy)


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


def test_room_for_the_dummy_document_is_kept() -> None:
    text = make_document(0, 39)  # 40 tokens, and the dummy document has one more.
    with pytest.raises(SampleError):
        _budget().admit(text)
    assert _budget(max_tokens=41).admit(text) == [text]
    (shorter,) = _budget(too_long="truncate").admit(text)
    assert shorter.num_tokens == 39
    parts = _budget(too_long="split").admit(text)
    assert [part.num_tokens for part in parts] == [39]  # The last token predicts nothing.


def test_truncation_that_leaves_nothing_to_learn_is_refused() -> None:
    with pytest.raises(SampleError, match="no learned token is left"):
        _budget(max_tokens=8, too_long="truncate").admit(make_document(0, 6, (4, 9)))


@given(shapes=documents, budget=budgets, strategy=st.sampled_from(["first_fit", "best_fit"]), steps=st.integers(0, 8))
def test_every_strategy_with_split_documents_goes_on_where_it_was(
    shapes: list, budget: dict, strategy: str, steps: int
) -> None:
    budget = {**budget, "max_tokens": 12, "max_cost": 14, "strategy": strategy, "too_long": "split"}
    packer = Packer(_source(shapes, split_by=_budget(**budget)), _budget(**budget), lane=0)
    for _ in range(steps):
        packer.next_pack()
    position, waiting = packer.state()
    source = _source(shapes, position.draws[0], split_by=_budget(**budget))
    again = Packer(source, _budget(**budget), lane=0, waiting=waiting)
    for _ in range(6):
        ours, theirs = again.next_pack(), packer.next_pack()
        assert [d.token_ids.tolist() for d in ours.documents] == [d.token_ids.tolist() for d in theirs.documents]
        assert again.state() == packer.state()


def test_greedy_closes_a_pack_where_first_fit_and_best_fit_fill_it() -> None:
    shapes = [(20, (1,)), (25, (1,)), (3, (1,)), (8, (1,))]
    packs = {}
    for strategy, look_ahead in {"greedy": 1, "first_fit": 4, "best_fit": 4}.items():
        budget = _budget(max_tokens=36, strategy=strategy, look_ahead=look_ahead)
        packs[strategy] = _numbers(Packer(_source(shapes), budget, lane=0).next_pack())
    assert packs == {"greedy": [0], "first_fit": [0, 2], "best_fit": [0, 3]}


def test_best_fit_fills_the_cost_budget_where_there_is_one() -> None:
    shapes = [(20, (1,)), (9, (1,)), (1, (8,))]  # The second has more tokens (11 and 10), the third costs more.
    tokens = _budget(max_tokens=34, look_ahead=3)
    assert _numbers(Packer(_source(shapes), tokens, lane=0).next_pack()) == [0, 1]
    cost = _budget(max_tokens=34, max_cost=40, look_ahead=3)
    assert [PackUsage.of_document(make_document(0, *shape), SPEC).cost for shape in shapes] == [22.5, 11.5, 14]
    assert _numbers(Packer(_source(shapes), cost, lane=0).next_pack()) == [0, 2]


def test_greedy_with_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="greedy looks at one document only"):
        PackingConfig(max_tokens=8, strategy="greedy", look_ahead=2)


def test_budgets_that_hold_no_dummy_document_are_refused() -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=2, fixed_grid=(4, 4))
    dummy = dummy_document(spec, 0)
    with pytest.raises(DataConfigError, match="at least 17"):
        Budget(PackingConfig(max_tokens=16), spec, dummy)
    with pytest.raises(DataConfigError, match="max_cost"):
        Budget(PackingConfig(max_tokens=64, max_cost=5), spec, dummy)


def test_cost_counts_patches_at_the_price_of_the_model() -> None:
    assert PackUsage.of_document(make_document(0, 3, (4,)), SPEC).cost == 8 + 0.5 * 4


@pytest.mark.long
def test_packs_of_a_long_tail_are_full_and_cost_alike() -> None:
    work = Workload("long tail", long_tail, LONG_TAIL_SPEC, max_tokens=8192, max_cost=9216)
    best = pack(work, 12, with_cost=True, strategy="best_fit", look_ahead=32)
    assert best.unused < 0.03
    assert best.imbalance < 1.05
    assert pack(work, 12, with_cost=False, strategy="best_fit", look_ahead=32).imbalance > best.imbalance + 0.05
    assert pack(work, 12, with_cost=True, strategy="greedy").unused > best.unused


def test_packs_of_videos_and_sounds_cost_alike_within_two_percent() -> None:
    """Their patches vary a thousandfold. Memory and time of a pack stay within the budget."""
    work = Workload("clips", clips, CLIPS_SPEC, **CLIPS)
    best = pack(work, 3, with_cost=True, strategy="best_fit", look_ahead=32)
    assert best.imbalance < 1.02
    assert best.unused < 0.02
    assert best.fullest <= 1
    patches = [clips(lane, 0).num_patches for lane in range(100)]
    assert max(patches) > 100 * min(filter(None, patches))


def test_packs_of_emoji_are_full_and_cost_alike() -> None:
    best = pack(emoji(), 4, with_cost=True, strategy="best_fit", look_ahead=32)
    assert best.unused < 0.03
    assert best.imbalance < 1.05


def test_an_image_costs_its_absent_tiles_where_the_tower_computes_them() -> None:
    values = np.zeros((4, 12), np.uint8)
    whole, part = (
        MediaItem(values, (1, 2, 2), False),
        MediaItem(values, (1, 2, 2), False, cell=(0, 0), tiles=(1, 2), image=1),
    )
    other = MediaItem(values, (1, 2, 2), False, cell=(0, 1), tiles=(1, 2), image=1)
    columns = np.arange(3, dtype=np.int32)
    document = Document(
        columns, columns, columns.astype(np.float32), columns, (whole, part, other), columns[:0], (Span(0, (0, 1, 2)),)
    )
    alone = {"patch_size": 2, "cost_per_patch": 0.5, "fixed_grid": (2, 2)}
    costs = [
        PackUsage.of_document(
            document, MediaSpec(Placement.CROSS_ATTENTION, **alone, max_tiles=4, computes_absent=computed)
        ).cost
        for computed in (False, True)
    ]
    assert costs == [3 + 0.5 * 12, 3 + 0.5 * 2 * 4 * 4]
    assert document.num_patches == 12
