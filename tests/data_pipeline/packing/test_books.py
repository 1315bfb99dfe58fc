"""Long texts: splitting takes linear time and gives the same parts as a plain search; the size of a text is limited."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import FaultKind
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.packer import Budget
from data_pipeline.packing.truncation import split
from data_pipeline.shards.index import Member
from data_pipeline.shards.sample_reader import LocalShard
from data_pipeline.text.tokenizer import HuggingFaceTokenizer
from tests.data_pipeline.conftest import Members, WriteSet
from tests.data_pipeline.packing.made_documents import made_document

SPECS = (MediaSpec(Placement.EMBEDDING, patch_size=1), MediaSpec(Placement.CROSS_ATTENTION, patch_size=1))


def document_of(pieces: list[tuple[str, int]], spec: MediaSpec, branches: tuple[int, ...] = ()) -> Document:
    """Return a document whose tokens have weight 1, and whose images have their features in reverse order."""
    document = made_document(pieces, spec)
    slots = [slot for image in document.images for slot in reversed(range(image.start, image.stop))]
    return replace(
        document,
        loss_weights=np.ones_like(document.loss_weights),
        scatter_index=np.array(slots if len(document.scatter_index) else [], np.int32),
        branches=branches,
    )


def plain_part(document: Document, start: int, stop: int) -> dict[str, Any]:
    """Return a part by its definition, with a scan of all lists of the document."""
    ends = [*(span.start for span in document.spans[1:]), document.num_tokens]
    spans = [
        (max(span.start - start, 0), span.items)
        for span, end in zip(document.spans, ends, strict=True)
        if end > start and span.start < stop
    ]
    inside = [number for number, image in enumerate(document.images) if start <= image.start < stop]
    kept = sorted({*inside, *(item for _, items in spans for item in items)})
    images = [document.images[number] for number in inside]
    return {
        "ids": document.token_ids[start:stop].tolist(),
        "positions": list(range(stop - start)),
        "items": [int(document.items[item].values[0, 0]) for item in kept],
        "dest": [slot - start for slot in document.scatter_index.tolist() if start <= slot < stop],
        "spans": [(at, tuple(kept.index(item) for item in items)) for at, items in spans],
        "images": [(image.start - start, kept.index(image.first_item), image.stop - start) for image in images],
    }


def plain_split(document: Document, most: int) -> Iterator[dict[str, Any]]:
    """Yield parts of at most ``most`` tokens, each the longest, by trying every end."""
    inside = {token for image in document.images for token in range(image.start + 1, image.stop)}
    start = 0
    while start < document.num_tokens:
        stops = [n for n in range(start + 1, document.num_tokens + 1) if n not in inside and n - start <= most]
        if not stops:
            start = next((image.stop for image in document.images if image.start == start), start + 1)
            continue
        yield plain_part(document, start, stops[-1])
        start = stops[-1]


def described(part: Document) -> dict[str, Any]:
    assert part.is_cut
    assert part.labels.tolist() == (part.token_ids + 1).tolist()
    return {
        "ids": part.token_ids.tolist(),
        "positions": part.position_ids.tolist(),
        "items": [int(item.values[0, 0]) for item in part.items],
        "dest": part.scatter_index.tolist(),
        "spans": [(span.start, span.items) for span in part.spans],
        "images": [(image.start, image.first_item, image.stop) for image in part.images],
    }


piece = st.one_of(st.tuples(st.just("text"), st.integers(1, 40)), st.tuples(st.just("image"), st.integers(1, 6)))


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(piece, min_size=1, max_size=12), most=st.integers(1, 50), spec=st.sampled_from(SPECS))
def test_the_parts_are_those_of_a_search_over_every_end(
    pieces: list[tuple[str, int]], most: int, spec: MediaSpec
) -> None:
    document = document_of(pieces, spec)
    parts = [described(part) for part in split(document, lambda part: part.num_tokens <= most)]
    assert parts == list(plain_split(document, most))


class CountingFits:
    """Returns whether a part has at most ``most`` tokens; counts the calls and the tokens of all tried parts."""

    def __init__(self, most: int) -> None:
        self.most, self.tokens, self.calls = most, 0, 0

    def __call__(self, part: Document) -> bool:
        self.tokens += part.num_tokens
        self.calls += 1
        return part.num_tokens <= self.most


@pytest.mark.parametrize("branched", [False, True])
def test_a_split_looks_at_each_token_a_bounded_number_of_times(branched: bool) -> None:
    for length in (1 << 12, 1 << 15):
        branches = tuple(range(1, length, 8)) if branched else ()
        fits = CountingFits(64)
        parts = list(split(document_of([("text", length)], SPECS[0], branches), fits))
        assert sum(part.num_tokens - branched for part in parts) == length - branched
        assert fits.tokens <= 14 * length
        assert fits.calls <= 18 * len(parts)


@pytest.fixture
def book_config(mixture_config: DataConfig) -> Callable[..., DataConfig]:
    """Return the configuration of a run over texts that are split."""

    def make(**dataset: object) -> DataConfig:
        packing = {"max_tokens": 64, "too_long": "split", "look_ahead": 1}
        block = {"name": "only", "max_epochs": 1, "template": {"kind": "text"}, **dataset}
        return DataConfig.model_validate(
            mixture_config.model_dump() | {"datasets": [block], "lanes": 1, "packing": packing}
        )

    return make


def test_the_loader_tokenises_a_book_once_and_cuts_it_in_linear_work(
    write_set: WriteSet, book_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"characters": 0, "tokens": 0}
    encode, alone = HuggingFaceTokenizer.encode, Budget._fits

    def counting_encode(tokenizer: HuggingFaceTokenizer, text: str) -> list[int]:
        counts["characters"] += len(text)
        return encode(tokenizer, text)

    def counting_alone(budget: Budget, document: Document) -> bool:
        counts["tokens"] += document.num_tokens
        return alone(budget, document)

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", counting_encode)
    monkeypatch.setattr(Budget, "_fits", counting_alone)
    text = "".join(chr(97 + number * number % 26) for number in range(1 << 14))
    config = book_config(manifest=write_set("only", [{"txt": text.encode()}]))
    tokens = 0
    with Loader(config, MediaSpec(), seed=1) as loader:
        for step in loader:
            tokens += step.num_tokens
            if step.exhausted:
                break
    assert tokens >= len(text)
    assert counts["characters"] == len(text)
    assert counts["tokens"] <= 16 * len(text)


@pytest.mark.fault
def test_a_text_beyond_the_bound_is_a_bad_sample_and_is_not_read(
    tmp_path: Path, write_set: WriteSet, book_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[Members] = [{"txt": b"fits"}, {"txt": b"x" * 1001}, {"json": b'{"caption": "%s"}' % (b"y" * 1001)}]
    read = LocalShard.read

    def small_reads(shard: LocalShard, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        assert all(member.size <= 1000 for member in members)
        return read(shard, members, fresh=fresh)

    monkeypatch.setattr(LocalShard, "read", small_reads)
    manifest = write_set("only", samples)
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for path in sorted((tmp_path / "only").glob("*.tar")):
            with tarfile.open(path) as source:
                for member in source:
                    tar.addfile(member, source.extractfile(member))
    for where in ({"manifest": manifest}, {"shards": (str(tmp_path / "plain.tar"),)}):
        config = book_config(max_text_bytes=1000, **where)
        config = config.model_copy(update={"faults": config.faults.model_copy(update={"max_share": 1.0})})
        with Loader(config, MediaSpec(), seed=1) as loader:
            skipped = [skip for step in _until_exhausted(loader) for skip in step.skipped]
        assert {(skip.key, skip.kind) for skip in skipped} == {
            ("000001", FaultKind.TEXT),
            ("000002", FaultKind.TEXT),
        }
        assert all("the limit is 1000 (max_text_bytes of the data set)" in skip.reason for skip in skipped)


def _until_exhausted(loader: Loader) -> Iterator[Any]:
    for step in loader:
        yield step
        if step.exhausted:
            return
