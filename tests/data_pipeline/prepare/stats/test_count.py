"""Statistics agree with counts by hand, and those of a sample with those of the whole set."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.prepare.stats.count import Training, count, share_error, spread
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer
from mmscale.config import load
from mmscale.run.config import RunConfig

REPO = Path(__file__).resolve().parents[4]
TOKENIZER = SentencePieceTokenizerConfig(path=REPO / "examples" / "emoji" / "tokenizer.model")
EMOJI = REPO / "examples" / "emoji" / "shards" / "train-quick.manifest"


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    with ShardWriter(tmp_path, "x", max_samples=2) as writer:
        parts = b'{"captions": ["abc", "a"]}'
        writer.write("a", {"0.png": picture(10, 5), "1.png": picture(4, 80), "json": parts})
        writer.write("b", {"txt": "ein fünfter".encode()})
        writer.write("c", {"png": picture(300, 300)})
        writer.write("d", {"png": b"no picture"})
        writer.write("e", {"png": picture(10, 5), "json": b'{"caption": "abc'})
    return write_manifest(tmp_path / "x.manifest", writer.shards)


def test_statistics_agree_with_counting(small: Manifest) -> None:
    found = count(small.path, tokenizer=TOKENIZER).summary
    assert (found["samples"], found["shards"], found["looked_at"], found["share_error_95"]) == (5, 3, 5, 0)
    assert found["bytes"] == sum(small.shard_bytes(number) for number in range(3))
    assert (found["samples_per_shard"]["min"], found["samples_per_shard"]["max"]) == (1, 2)
    assert found["members"] == {"0.png": 1, "1.png": 1, "json": 2, "png": 3, "txt": 1}
    assert found["kinds"] == {"json+png": 2, "png": 2, "txt": 1}
    images = found["images"]
    assert (images["count"], images["per_sample"]["max"], images["per_sample"]["sum"]) == (5, 2, 5)
    assert (images["width"]["count"], images["width"]["min"], images["width"]["median"]) == (4, 4, 10)
    assert (images["aspect_ratio"]["min"], images["aspect_ratio"]["max"]) == (0.05, 2)
    assert images["pixels"]["sum"] == 50 + 320 + 90_000 + 50
    assert found["odd"] == {
        "damaged_header": 1,
        "no_image": 1,
        "no_text": 2,
        "side_8_times_the_other": 1,
        "side_below_32": 3,
    }
    assert found["refused"] == {"text": 1}
    assert "x-00002.tar/e" in found["refused_examples"][0]
    lengths = [len(text) for text in ("abc", "a", "ein fünfter")]
    assert (found["text_characters"]["count"], found["text_characters"]["sum"]) == (3, sum(lengths))
    tokens = [len(load_tokenizer(TOKENIZER).encode(text)) for text in ("abc", "a", "ein fünfter")]
    assert found["text_tokens"]["sum"] == sum(tokens)
    assert sum(found["languages"].values()) == 3
    assert found["copies"]["images"] == 1
    assert found["text_bytes"]["max"] == 12


@pytest.mark.long
@pytest.mark.slow
def test_documents_cost_what_the_run_makes_of_them() -> None:
    """Compare the counts with those of fully built documents with decoded images."""
    run = load(REPO / "configs" / "quickstart.yaml", [], RunConfig).value
    training = Training(run.data.datasets[0], run.media_spec, max_tokens=7)
    found = count(EMOJI, tokenizer=run.data.tokenizer, training=training).summary["documents"]
    build = DocumentBuilder(run.data.datasets[0], load_tokenizer(run.data.tokenizer), run.media_spec)
    documents = [build(sample) for sample in read_samples(EMOJI)]
    tokens = [document.num_tokens for document in documents]
    assert (found["tokens"]["sum"], found["tokens"]["max"]) == (sum(tokens), max(tokens))
    assert found["patches"]["sum"] == sum(document.num_patches for document in documents)
    assert found["cost"]["sum"] == sum(round(document.cost(run.media_spec)) for document in documents)
    assert found["longer_than_a_pack"] == sum(n > 7 for n in tokens) > 0


@pytest.mark.long
def test_processes_change_nothing(small: Manifest) -> None:
    alone, shared = (count(small.path, tokenizer=TOKENIZER, workers=workers).summary for workers in (0, 2))
    assert alone == shared


@pytest.mark.long
def test_a_sample_is_right_to_the_stated_error() -> None:
    whole, part = count(EMOJI), count(EMOJI, sample=200)
    assert part.summary["looked_at"] == 200
    error = part.summary["share_error_95"]
    assert error == pytest.approx(1.3581 / 200**0.5, rel=1e-3)
    for kind, number in whole.summary["kinds"].items():
        assert abs(number / 1024 - part.summary["kinds"].get(kind, 0) / 200) <= error
    sizes = np.sort([len(s.parts[0].data) for s in read_samples(EMOJI)])  # type: ignore[union-attr]
    for share in (0.05, 0.5, 0.95):
        rank = np.searchsorted(sizes, part.tally.images["bytes"].quantile(share)) / len(sizes)
        assert abs(rank - share) <= error + 0.01
    assert "copies" not in part.summary
    assert count(EMOJI, sample=5000).summary == whole.summary


def test_languages_are_detected_in_a_limited_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.prepare.stats.count._LANGUAGES_OF", 128)
    few, many = count(EMOJI, sample=100).summary, count(EMOJI).summary
    assert sum(few["languages"].values()) == few["text_characters"]["count"]
    share = sum(many["languages"].values()) / many["text_characters"]["count"]
    assert share == pytest.approx(1 / 8, rel=0.1)


@given(total=st.integers(1, 10**12), num=st.integers(1, 300))
def test_a_sample_is_spread_over_all(total: int, num: int) -> None:
    num = min(num, total)
    chosen = spread(total, num)
    assert np.all(np.diff(chosen) > 0)
    assert chosen[0] >= 0
    assert chosen[-1] < total
    assert len(chosen) >= 0.6 * num
    assert np.diff(chosen).max(initial=0) <= 2 * total / num + 1
    assert 0 < share_error(num) <= 1


def test_an_empty_data_set_has_zero_of_everything(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "x.manifest", [])
    for sample in (None, 10):
        found = count(manifest.path, sample=sample).summary
        assert (found["samples"], found["images"]["count"], found["copies"]["images"]) == (0, 0, 0)


@pytest.mark.fault
def test_a_changed_member_is_counted_and_named(small: Manifest) -> None:
    path = small.shard_path(0)
    content = path.read_bytes()
    path.write_bytes(content.replace("ein fünfter".encode(), "kein fünfte".encode()))
    os.utime(path, (1, 1))  # Keep the old time, so that the damage is not detected by it.
    found = count(small.path).summary
    assert found["refused"] == {"checksum": 1, "text": 1}
    assert "kein" not in str(found)


@pytest.mark.fault
def test_half_a_pair_of_utf16_is_counted_with_its_place_and_not_encoded(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x") as writer:
        writer.write("good", {"json": b'{"captions": ["abc"]}'})
        writer.write("bad", {"json": b'{"captions": ["a", "b\\ud800"]}'})
    found = count(write_manifest(tmp_path / "x.manifest", writer.shards).path, tokenizer=TOKENIZER).summary
    assert found["refused"] == {"text": 1}
    assert "x-00000.tar/bad: the text is not valid Unicode" in str(found)


def test_no_media_means_no_documents_with_images(small: Manifest) -> None:
    """Samples with images are unusable for a text model, as in its run."""
    run = load(REPO / "configs" / "quickstart.yaml", [], RunConfig).value
    dataset = run.data.datasets[0].model_copy(update={"template": type(run.data.datasets[0].template)()})
    found = count(small.path, tokenizer=TOKENIZER, training=Training(dataset, MediaSpec(), 100)).summary
    assert found["documents"]["tokens"]["count"] == 1
    assert found["refused"] == {"document": 1, "text": 3}  # An image; no caption, no caption, broken JSON.
