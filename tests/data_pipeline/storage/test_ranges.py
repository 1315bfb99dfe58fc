from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.storage.ranges import Range, coalesce, extract, split

_RANGES = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 60)).map(lambda t: Range(t[0], t[0] + t[1])), max_size=12
)


@given(_RANGES, st.integers(0, 40), st.integers(1, 120))
def test_coalescing_covers_every_byte_and_joins_exactly_the_neighbours(
    ranges: list[Range], gap: int, most: int
) -> None:
    data = bytes(i % 251 for i in range(400))
    wholes = coalesce(ranges, gap, most)
    assert wholes == sorted(wholes)
    blocks = [(whole, data[whole.start : whole.end]) for whole in wholes]
    assert [extract(blocks, wanted) for wanted in ranges] == [data[a:b] for a, b in ranges]

    needed = {i for a, b in ranges for i in range(a, b)}
    covered = [i for a, b in wholes for i in range(a, b)]
    assert len(covered) == len(set(covered))  # The ranges are disjoint.
    for whole in wholes:
        run = 0
        for i in range(whole.start, whole.end):  # No range includes a gap above the limit.
            run = 0 if i in needed else run + 1
            assert run <= gap
        overlapping = max((b - a for a, b in ranges), default=0)
        assert whole.size <= max(most, overlapping) or _is_chain(whole, ranges)
    for a, b in pairwise(wholes):  # Neighbours that fit into one request are merged.
        following = min((r for r in ranges if r.size and r.start >= b.start), key=lambda r: (r.start, r.end))
        assert b.start - a.end > gap or following.end - a.start > most


def _is_chain(whole: Range, ranges: list[Range]) -> bool:
    """Return whether the ranges overlap in a chain. Such ranges are merged for any limit."""
    inside = sorted(r for r in ranges if r.size and whole.start <= r.start < whole.end)
    reach = inside[0].end
    for r in inside[1:]:
        if r.start < reach:
            return True
        reach = max(reach, r.end)
    return False


@given(st.integers(0, 50), st.integers(1, 500), st.integers(1, 90))
def test_pieces_are_a_partition_of_nearly_equal_parts(start: int, size: int, most: int) -> None:
    parts = split(Range(start, start + size), most)
    assert [i for a, b in parts for i in range(a, b)] == list(range(start, start + size))
    sizes = [part.size for part in parts]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
