"""Cutting documents: no token, label, feature or attended image is lost, and no image is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.truncation import Cutter, longest_part, some_branches, split
from tests.data_pipeline.packing.made_documents import made_document

EMBEDDING = MediaSpec(Placement.EMBEDDING, patch_size=1)
ATTENDING = MediaSpec(Placement.CROSS_ATTENTION, patch_size=1)

pieces = st.lists(
    st.one_of(st.tuples(st.just("text"), st.integers(1, 9)), st.tuples(st.just("image"), st.integers(1, 6))),
    min_size=1,
    max_size=8,
)


def _check_rows(part: Document) -> None:
    """Check that each token has its own label and weight."""
    assert part.labels.tolist() == [token + 1 for token in part.token_ids.tolist()]
    assert part.loss_weights.tolist() == [token + 0.5 for token in part.token_ids.tolist()]


def _attended(document: Document) -> list[tuple[int, ...]]:
    """Return, for each token, the values of the items that it attends."""
    ends = [*(span.start for span in document.spans[1:]), document.num_tokens]
    values = [int(item.values[0, 0]) for item in document.items]
    rows = []
    for span, end in zip(document.spans, ends, strict=True):
        rows += [tuple(values[item] for item in span.items)] * (end - span.start)
    return rows


def _features(document: Document) -> dict[int, int]:
    """Return the value of the feature that is written at each token id."""
    values = [int(item.values[0, 0]) for item in document.items if item.embedded for _ in item.values]
    return {int(document.token_ids[token]): value for token, value in zip(document.scatter_index, values, strict=True)}


@given(pieces=pieces, most=st.integers(6, 12), spec=st.sampled_from([EMBEDDING, ATTENDING]))
@example(pieces=[("image", 1)] * 10, most=3, spec=ATTENDING)
def test_the_parts_together_are_the_whole_document(pieces: list, most: int, spec: MediaSpec) -> None:
    document = made_document(pieces, spec)
    parts = list(split(document, lambda part: part.num_tokens <= most))
    assert np.concatenate([part.token_ids for part in parts]).tolist() == document.token_ids.tolist()
    assert [seen for part in parts for seen in _attended(part)] == _attended(document)
    assert {token: value for part in parts for token, value in _features(part).items()} == _features(document)
    start, image_stops = 0, {image.start: image.stop for image in document.images}
    for part in parts:
        stop = start + part.num_tokens
        _check_rows(part)
        assert part.num_tokens <= most
        assert stop == document.num_tokens or image_stops.get(stop, stop + 1) - start > most
        assert part.position_ids.tolist() == list(range(part.num_tokens))
        assert part.is_cut
        assert part.spans[0].start == 0
        values = [int(item.values[0, 0]) for item in part.items]
        images = [
            image._replace(start=image.start + start, first_item=values[image.first_item], stop=image.stop + start)
            for image in part.images
        ]
        assert images == [image for image in document.images if start <= image.start < stop]
        # A part has its own images and those that its tokens attend. Any other image would waste time in the tower.
        attended = {value for row in _attended(part) for value in row}
        assert values == sorted(attended | {image.first_item for image in images})
        start = stop
    assert start == document.num_tokens


@given(pieces=pieces, spec=st.sampled_from([EMBEDDING, ATTENDING]))
def test_no_image_is_divided(pieces: list, spec: MediaSpec) -> None:
    document = made_document(pieces, spec)
    parts = split(document, lambda part: part.num_tokens <= 7)
    edges = np.cumsum([part.num_tokens for part in parts]).tolist()
    for image in document.images:
        assert not any(image.start < edge < image.stop for edge in edges)


def test_a_part_is_as_long_as_the_cost_allows() -> None:
    document = made_document([("text", 3), ("image", 4), ("text", 5)], EMBEDDING)

    def cheap(part: Document) -> bool:
        return part.num_tokens + 2 * part.num_patches <= 18

    part = longest_part(document, cheap)
    assert part is not None
    assert (part.num_tokens, part.num_patches) == (10, 4)
    assert Cutter(document).longest_part(3, lambda part: part.num_tokens <= 3) is None


def test_an_image_that_fits_nowhere_goes_and_the_text_around_it_stays() -> None:
    document = made_document([("text", 3), ("image", 6), ("text", 4)], EMBEDDING)
    parts = list(split(document, lambda part: part.num_tokens <= 5))
    assert [part.token_ids.tolist() for part in parts] == [[0, 1, 2], [9, 10, 11, 12]]
    assert not any(part.items for part in parts)


def test_text_that_attends_an_image_that_fits_nowhere_goes_with_it() -> None:
    document = made_document([("text", 2), ("image", 9), ("text", 3), ("image", 4), ("text", 2)], ATTENDING)
    parts = list(split(document, lambda part: part.num_tokens <= 9 and part.num_patches <= 4))
    assert [part.token_ids.tolist() for part in parts] == [[0, 1], [6, 7, 8]]
    assert [_attended(part) for part in parts] == [[()] * 2, [(1,)] * 3]


@pytest.mark.parametrize("start", [0, 4])
def test_positions_on_three_axes_start_again_at_zero(start: int) -> None:
    document = made_document([("text", 8)], EMBEDDING)
    positions = np.stack([np.arange(8), np.arange(8) + 2, np.arange(8) + 5], axis=1).astype(np.int32)
    moved = replace(document, position_ids=positions)
    part = Cutter(moved).cut(start, 8)
    expected = positions[start:] - (positions[start] if start else 0)
    assert part.position_ids.tolist() == expected.tolist()
    assert Cutter(moved).cut(8, 8).position_ids.shape == (0, 3)


def _branched(shared: list[tuple[str, int]], branches: list[int], spec: MediaSpec) -> Document:
    """Return a document of a prefix and branches of the given numbers of tokens, whose positions follow the prefix."""
    whole = made_document([*shared, *(("text", length) for length in branches)], spec)
    fork = made_document(shared, spec).num_tokens
    starts = [fork + sum(branches[:i]) for i in range(len(branches))]
    positions = [np.arange(fork), *(np.arange(fork, fork + length) for length in branches)]
    return replace(
        whole,
        position_ids=np.concatenate(positions).astype(np.int32),
        branches=tuple(starts) if len(starts) > 1 else (),
    )


SHARED = [("text", 1), ("image", 3)]
branches = st.lists(st.integers(1, 6), min_size=2, max_size=6)


@given(lengths=branches, most=st.integers(10, 24), spec=st.sampled_from([EMBEDDING, ATTENDING]))
def test_every_part_has_what_branches_share_and_whole_branches(lengths: list[int], most: int, spec: MediaSpec) -> None:
    document = _branched(SHARED, lengths, spec)
    fork = document.branches[0]
    parts = list(split(document, lambda part: part.num_tokens <= most))
    rows = [part.token_ids[fork:].tolist() for part in parts]
    assert [token for row in rows for token in row] == document.token_ids[fork:].tolist()
    done = 0
    for part in parts:
        _check_rows(part)
        assert part.num_tokens <= most
        count = max(1, len(part.branches))
        assert part.is_cut
        expected = _branched(SHARED, lengths[done : done + count], spec)
        assert part.branches == expected.branches
        assert part.position_ids.tolist() == expected.position_ids.tolist()
        assert part.num_images == 1
        assert _attended(part) == _attended(expected)
        assert _features(part) == _features(made_document(SHARED, spec))
        done += count
        # As long as possible: the next branch does not fit.
        assert done == len(lengths) or part.num_tokens + lengths[done] > most
    assert done == len(lengths)


@given(lengths=branches, spec=st.sampled_from([EMBEDDING, ATTENDING]))
def test_the_last_branches_go_first_when_a_document_is_truncated(lengths: list[int], spec: MediaSpec) -> None:
    document = _branched(SHARED, lengths, spec)
    fork = document.branches[0]
    for most in range(fork + 1, document.num_tokens):
        part = longest_part(document, lambda part, most=most: part.num_tokens <= most)
        assert part is not None
        whole = [count for count in range(1, len(lengths) + 1) if fork + sum(lengths[:count]) <= most]
        if whole:
            assert part.num_tokens == fork + sum(lengths[: whole[-1]])
            assert len(part.branches) == (whole[-1] if whole[-1] > 1 else 0)
        else:  # Not even the first branch fits: it is cut like a document without branches.
            assert part.num_tokens == most
            assert part.branches == ()
        assert part.token_ids.tolist() == document.token_ids[: part.num_tokens].tolist()


def test_a_branch_that_does_not_fit_alone_is_split_and_the_others_stay_whole() -> None:
    document = _branched(SHARED, [2, 9, 3], EMBEDDING)
    parts = list(split(document, lambda part: part.num_tokens <= 8))
    assert [part.token_ids.tolist() for part in parts] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 6, 7, 8, 9],
        [10, 11, 12, 13, 14],
        [0, 1, 2, 3, 15, 16, 17],
    ]
    assert not some_branches(document, 1, 2).branches
