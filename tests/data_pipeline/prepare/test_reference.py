"""Stored log-probabilities of a reference model: they reach the batch, and are refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.drawn_images import ImageTokensConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reference import ReferenceSource
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer
from tests.data_pipeline.conftest import Members, WriteSet

CONFIG = SentencePieceTokenizerConfig(path=Path("examples/text/tokenizer.model"))
TOKENIZER, SPEC = load_tokenizer(CONFIG), MediaSpec()
MODEL = "crc32:1a2b3c4d"


@dataclass
class Lengths:
    """The log-probability of an answer is minus its length, divided by 10, minus the number of documents before it."""

    checksum: str = MODEL

    def __call__(self, documents: Sequence[Document]) -> list[tuple[float, float]]:
        return [tuple(-each - n / 10 for each in lengths(document)) for n, document in enumerate(documents)]  # type: ignore[misc]


def lengths(document: Document) -> tuple[float, float]:
    first, second = document.branches
    return float(second - first), float(document.num_tokens - second)


def dataset(manifest: Path | str = "x", **template: Any) -> DatasetConfig:
    values = {"name": "d", "manifest": manifest, "template": {"kind": "preference", **template}}
    return DatasetConfig.model_validate(values)


def pair(number: int, **fields: Any) -> Members:
    given = {"prompt": f"Which number is {number}?", "chosen": "a few", "rejected": "many " * (1 + number % 3)}
    return {"json": json.dumps({**given, **fields}).encode()}


def stored(write_set: WriteSet, folder: Path, pairs: list[Members], **options: Any) -> list[Sample]:
    manifest = write_set("a", pairs)
    source = ReshardSource([NamedManifest("a", manifest)], Selection())
    report = ingest(ReferenceSource(source, Lengths(), dataset(), CONFIG, SPEC, 40), folder, "b", **options)
    return list(read_samples(report.manifest))


@pytest.fixture
def samples(write_set: WriteSet, tmp_path: Path) -> list[Sample]:
    """40 pairs, which are two chunks."""
    return stored(write_set, tmp_path / "out", [pair(number) for number in range(40)])


def test_stored_values_reach_the_segments_of_the_batch(samples: list[Sample]) -> None:
    build = DocumentBuilder(dataset(stored_reference=MODEL), TOKENIZER, SPEC)
    documents = [build(sample) for sample in samples]
    for number, document in enumerate(documents):
        assert document.reference == pytest.approx([-each - number % 32 / 10 for each in lengths(document)], rel=1e-6)
    batch = collate([Pack((documents[3], dummy_document(SPEC, 0), documents[33]), 0)], SPEC)
    assert batch.reference is not None
    expected = [0, *documents[3].reference, 0, 0, *documents[33].reference]
    assert batch.reference.tolist() == pytest.approx(expected)
    # A run that holds the model takes the same shards and ignores the values.
    assert DocumentBuilder(dataset(), TOKENIZER, SPEC)(samples[3]).reference == ()


def without(sample: Sample, **record: Any) -> Sample:
    return replace(sample, fields={**sample.fields, "reference_log_probs": record or None})


def test_values_that_do_not_belong_to_the_run_make_a_bad_sample(samples: list[Sample]) -> None:
    build = DocumentBuilder(dataset(stored_reference=MODEL), TOKENIZER, SPEC)
    record = samples[0].fields["reference_log_probs"]
    cases: list[tuple[DocumentBuilder, Sample, str]] = [
        (build, without(samples[0]), "no log-probabilities of a reference model"),
        (build, without(samples[0], **{**record, "chosen": "x"}), "no two numbers"),
        (build, without(samples[0], **{**record, "chosen": 1e999}), "no two numbers"),
        (
            DocumentBuilder(dataset(stored_reference="crc32:00000000"), TOKENIZER, SPEC),
            samples[0],
            "of the reference model 'crc32:1a2b3c4d', but template.stored_reference names 'crc32:00000000'",
        ),
        (
            DocumentBuilder(
                dataset(stored_reference=MODEL, each={"kind": "dialogue", "format": "chatml"}), TOKENIZER, SPEC
            ),
            samples[0],
            "of another document",
        ),
    ]
    for builder, sample, reason in cases:
        with pytest.raises(SampleError, match=reason):
            builder(sample)


def test_pairs_without_a_document_are_reported(write_set: WriteSet, tmp_path: Path) -> None:
    pairs = [pair(0), pair(1, rejected=""), pair(2, chosen="many words " * 40), pair(3)]
    found = stored(write_set, tmp_path / "out", pairs, on_error=OnError.SKIP)
    assert [each.fields["prompt"][-2] for each in found] == ["0", "3"]
    reasons = (tmp_path / "out" / "b.skipped.jsonl").read_text()
    assert "field 'rejected' is ''" in reasons
    assert "a pack holds 40" in reasons


def test_random_documents_and_other_templates_are_refused(write_set: WriteSet, tmp_path: Path) -> None:
    source = ReshardSource([NamedManifest("a", write_set("a", [pair(0)]))], Selection())
    random = {"kind": "fixed", "size": 16, "augment": {"flip": 0.5}}
    augmented = dataset().model_copy(
        update={"transforms": dataset().model_validate({"name": "d", "manifest": "x", "transforms": random}).transforms}
    )
    images = MediaSpec(Placement.EMBEDDING, patch_size=8)
    with pytest.raises(DataConfigError, match="a randomly cropped or augmented image differs"):
        ReferenceSource(source, Lengths(), augmented, CONFIG, images, 40)
    drawing = {"kind": "drawing", "prompts": ["{prompt}", "Draw: {prompt}"]}
    tokens = {"codebook_size": 8, "first_id": TOKENIZER.vocab_size}
    drawn = dataset(each=drawing).model_copy(update={"image_tokens": ImageTokensConfig.model_validate(tokens)})
    with pytest.raises(DataConfigError, match=r"each\.prompts has 2, of which each epoch draws another; give one, or"):
        ReferenceSource(source, Lengths(), drawn, CONFIG, SPEC, 40)
    drawn = dataset(each={"kind": "drawing"}).model_copy(update={"image_tokens": drawn.image_tokens})
    several = ReshardSource([NamedManifest("b", write_set("b", [pair(0, captions=["a", "b"])]))], Selection())
    with pytest.raises(SampleError, match="it has 2 captions, of which each epoch draws another"):
        ingest(ReferenceSource(several, Lengths(), drawn, CONFIG, SPEC, 40), tmp_path, "b")
    plain = DatasetConfig.model_validate({"name": "d", "manifest": "x", "template": {"kind": "text"}})
    with pytest.raises(DataConfigError, match=r"template\.kind=text gives no pairs"):
        ReferenceSource(source, Lengths(), plain, CONFIG, SPEC, 40)
