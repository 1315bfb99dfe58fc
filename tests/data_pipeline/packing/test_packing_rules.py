"""Packs are compared with those of a slow and simple packer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.document import IGNORE, Document, ImageExtent, MediaItem, Span
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.state import Cursor, Drawn, StreamPosition
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.packer import Budget, DrawnDocument, Pack, Packer
from data_pipeline.packing.synthetic_documents import dummy_document

SPECS = [
    MediaSpec(placement, patch_size=2, cost_per_patch=0.5)
    for placement in (Placement.NONE, Placement.EMBEDDING, Placement.CROSS_ATTENTION, Placement.HYBRID)
]


def document(number: int, tokens: int, embedded: int, attended: int) -> Document:
    """Return a document with an embedded and an attended image of the given numbers of patches; 0 for no image."""
    inside = MediaItem(np.zeros((embedded, 12), np.uint8), (1, 1, embedded), True)
    apart = MediaItem(np.zeros((attended, 12), np.uint8), (1, 1, attended), False)
    # Every second document has its items in reverse order, because the order must not matter.
    items = [item for item in (inside, apart)[:: 1 if number % 2 else -1] if len(item.values)]
    extents = [ImageExtent(0 if item.embedded else embedded, i, embedded) for i, item in enumerate(items)]
    length = embedded + tokens
    labels = np.full(length, number, np.int32)
    labels[:embedded] = labels[-1] = IGNORE
    return Document(
        token_ids=np.full(length, number, np.int32),
        labels=labels,
        loss_weights=(labels != IGNORE).astype(np.float32),
        position_ids=np.arange(length, dtype=np.int32),
        items=tuple(items),
        scatter_index=np.arange(embedded, dtype=np.int32),
        spans=(Span(0, tuple(i for i, item in enumerate(items) if not item.embedded)),),
        provenance=None,
        images=tuple(extents),
    )


@dataclass
class FiniteSource:
    """The documents of a list; None is a skipped sample."""

    documents: list[Document | None]
    at: int = 0

    @property
    def position(self) -> StreamPosition:
        return StreamPosition((self.at,), (Cursor(0, 0, self.at),))

    def make(self) -> list[DrawnDocument] | None:
        if self.at == len(self.documents):
            return None
        made, drawn = self.documents[self.at], Drawn(0, 0, self.at)
        self.at += 1
        return [] if made is None else [DrawnDocument(drawn, made)]

    def remake(self, drawn: Drawn) -> Document | None:
        return self.documents[drawn.sample]


def lacking(documents: list[Document], spec: MediaSpec) -> bool:
    items = [item for each in documents for item in each.items]
    apart = spec.placement in (Placement.CROSS_ATTENTION, Placement.HYBRID)
    inside = spec.placement in (Placement.EMBEDDING, Placement.HYBRID)
    return (inside and not any(i.embedded for i in items)) or (apart and all(i.embedded for i in items))


def fits(documents: list[Document], config: PackingConfig, spec: MediaSpec) -> bool:
    held = [*documents, *([dummy_document(spec, 0)] if lacking(documents, spec) else [])]
    tokens = sum(each.num_tokens for each in held)
    cost = tokens + 0.5 * sum(len(item.values) for each in held for item in each.items)
    return (
        tokens <= config.max_tokens
        and (config.max_cost is None or cost <= config.max_cost)
        and (config.max_documents is None or len(documents) <= config.max_documents)
    )


def plain_packs(documents: list[Document | None], config: PackingConfig, spec: MediaSpec) -> list[list[Document]]:
    """Return all packs, without dummy documents."""
    coming, waiting, packs = [*documents], list[Document](), list[list[Document]]()
    while True:
        chosen: list[Document] = []
        while True:
            while coming and len(waiting) < config.look_ahead:
                each = coming.pop(0)
                waiting += [] if each is None else [each]
            able = waiting[:1] if not chosen else [d for d in waiting if fits([*chosen, d], config, spec)]
            if config.strategy == "best_fit" and chosen:
                able.sort(key=lambda d: -(d.num_tokens if config.max_cost is None else d.cost(spec)))
            if not able or len(chosen) == config.max_documents:
                break
            chosen.append(able[0])
            waiting = [d for d in waiting if d is not able[0]]
        if not chosen:
            return packs
        packs.append(chosen)


@st.composite
def cases(draw: Any) -> tuple[list[Document | None], PackingConfig, MediaSpec]:
    spec = draw(st.sampled_from(SPECS))
    strategy = draw(st.sampled_from(["greedy", "first_fit", "best_fit"]))
    config = PackingConfig.model_validate(
        {
            "max_tokens": draw(st.integers(12, 20)),
            "max_cost": draw(st.one_of(st.none(), st.sampled_from([12, 14.5, 17]))),
            "max_documents": draw(st.one_of(st.none(), st.integers(1, 3))),
            "look_ahead": 1 if strategy == "greedy" else draw(st.integers(1, 5)),
            "strategy": strategy,
        }
    )
    patches = st.sampled_from([0, 0, 1, 3])
    rows = draw(st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 9), patches, patches)), max_size=14))
    made = [
        None if row is None else document(i, row[0], row[1] * spec.needs_embedded, row[2] * spec.needs_attended)
        for i, row in enumerate(rows)
    ]
    return [each for each in made if each is None or fits([each], config, spec)], config, spec


@given(cases())
def test_packs_are_those_of_the_plain_packer(case: tuple[list[Document | None], PackingConfig, MediaSpec]) -> None:
    documents, config, spec = case
    dummy = dummy_document(spec, 0)
    places = {id(each): place for place, each in enumerate(documents)}
    packer = Packer(FiniteSource(documents), Budget(config, spec, dummy), lane=3)
    for expected in plain_packs(documents, config, spec):
        assert not packer.exhausted
        pack = packer.next_pack()
        held = [*expected, *([dummy] if lacking(expected, spec) else [])]
        assert [id(each) for each in pack.documents] == [id(each) for each in held]
        assert (pack.lane, pack.drawn) == (3, tuple(Drawn(0, 0, places[id(each)]) for each in expected))
    assert packer.state()[1] == ()
    assert packer.next_pack() == Pack((dummy,), -1)
    assert packer.exhausted


@given(cases(), st.integers(1, 9), st.integers(0, 4), st.integers(0, 4))
def test_a_document_is_admitted_if_it_fits_alone(
    case: tuple[list[Document | None], PackingConfig, MediaSpec], tokens: int, embedded: int, attended: int
) -> None:
    _, config, spec = case
    one = document(1, 2 * tokens, embedded * spec.needs_embedded, attended * spec.needs_attended)
    budget = Budget(config, spec, dummy_document(spec, 0))
    if fits([one], config, spec):
        assert budget.admit(one) == [one]
    else:
        with pytest.raises(SampleError, match=r"raise packing\.max_tokens or max_cost"):
            budget.admit(one)


def test_a_document_has_no_more_positions_than_the_model() -> None:
    spec = MediaSpec(max_document_tokens=6)
    config = PackingConfig(max_tokens=40)
    budget = Budget(config, spec, dummy_document(spec, 0))
    assert budget.admit(document(1, 6, 0, 0))
    with pytest.raises(SampleError, match="the model has positions for 6 tokens"):
        budget.admit(document(1, 7, 0, 0))
    # Branches start at the same position, so there are more tokens than positions.
    long = document(1, 9, 0, 0)
    assert budget.admit(replace(long, position_ids=np.minimum(long.position_ids, 5)))
    cut = Budget(config.model_copy(update={"too_long": "split"}), spec, dummy_document(spec, 0)).admit(
        document(1, 15, 0, 0)
    )
    assert [part.num_tokens for part in cut] == [6, 6, 3]
    small = MediaSpec(Placement.EMBEDDING, patch_size=2)
    budget = Budget(PackingConfig(max_tokens=4, too_long="truncate"), small, dummy_document(small, 0))
    with pytest.raises(SampleError, match="no learned token is left"):
        budget.admit(document(1, 3, 9, 0))


def test_the_end_token_of_a_text_that_is_cut_takes_its_last_place() -> None:
    spec = MediaSpec(Placement.PAIR, patch_size=2, max_document_tokens=5)
    whole = document(1, 8, 0, 2)
    whole = replace(
        whole,
        token_ids=np.arange(10, 18, dtype=np.int32),
        labels=np.arange(20, 28, dtype=np.int32),
        loss_weights=np.arange(1.0, 9.0, dtype=np.float32),
    )
    config = PackingConfig(max_tokens=40, too_long="truncate")
    (part,) = Budget(config, spec, dummy_document(spec, 0)).admit(whole)
    assert part.token_ids.tolist() == [10, 11, 12, 13, 17]
    assert part.labels.tolist() == [20, 21, 22, 26, 27]
    assert part.loss_weights.tolist() == [1, 2, 3, 7, 8]
    assert whole.token_ids.tolist() == [*range(10, 18)]
    with pytest.raises(SampleError, match="no learned token"):  # Without its image a pair has nothing to compare.
        Budget(config, spec, dummy_document(spec, 0)).admit(replace(whole, images=(), items=(), spans=(Span(0, ()),)))
    with pytest.raises(DataConfigError, match="no image to compare with"):
        Budget(config.model_copy(update={"too_long": "split"}), spec, dummy_document(spec, 0))
    # Two tokens are a token of the text and the end token; one token is too short.
    for positions, found in ((2, [10, 17]), (1, None)):
        short = replace(spec, max_document_tokens=positions)
        budget = Budget(config, short, dummy_document(short, 0))
        if found is None:
            with pytest.raises(SampleError, match="no learned token"):
                budget.admit(whole)
        else:
            assert [part.token_ids.tolist() for part in budget.admit(whole)] == [found]


@pytest.mark.parametrize(("max_tokens", "max_cost"), [(2, None), (1, None), (2, 2.5), (2, 2.4)])
def test_the_least_budget_holds_a_text_and_a_dummy_document(max_tokens: int, max_cost: float | None) -> None:
    spec = SPECS[1]
    dummy = dummy_document(spec, 0)
    assert (dummy.num_tokens, dummy.cost(spec)) == (1, 1.5)
    config = PackingConfig(max_tokens=max_tokens, max_cost=max_cost)
    if (max_tokens, max_cost) in ((2, None), (2, 2.5)):
        assert Budget(config, spec, dummy).admit(document(1, 1, 0, 0))
        return
    with pytest.raises(DataConfigError, match=r"takes at least 2|costs at least 2\.5"):
        Budget(config, spec, dummy)
