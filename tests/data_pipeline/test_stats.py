"""Figures against counting by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.stats import quantiles, statistics
from data_pipeline.tokenizer import SentencePieceTokenizerConfig, load_tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "tokenizer.model"


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "png")
    return buffer.getvalue()


def test_figures_agree_with_counting(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x", max_samples=2) as writer:
        writer.write("a", {"0.png": picture(10, 5), "1.png": picture(4, 8), "json": b'{"captions": ["abc", "a"]}'})
        writer.write("b", {"txt": b"five!"})
        writer.write("c", {"png": picture(3, 3)})
        writer.write("d", {"png": b"no picture"})
    manifest = write_manifest(tmp_path / "x.manifest", writer.shards)
    tokenizer = load_tokenizer(SentencePieceTokenizerConfig(path=BUNDLED))
    figures = statistics(manifest.path, tokenizer)
    assert (figures["samples"], figures["shards"]) == (4, 2)
    assert figures["bytes"] == sum(path.stat().st_size for path in writer.shards)
    assert figures["members"] == {"0.png": 1, "1.png": 1, "json": 1, "png": 2, "txt": 1}
    images = figures["images"]
    assert (images["count"], images["damaged_headers"]) == (4, 1)
    assert images["num_per_sample"] == {"0": 1, "1": 2, "2": 1}
    assert (images["width"]["min"], images["width"]["median"], images["width"]["max"]) == (3, 4, 10)
    assert (images["aspect_ratio"]["min"], images["aspect_ratio"]["max"]) == (0.5, 2)
    assert images["pixels"]["mean"] == round((50 + 32 + 9) / 3, 4)
    assert (figures["text_bytes"]["max"], figures["text_bytes"]["mean"]) == (5, 2)
    counts = [len(tokenizer.encode(text)) for text in ("abc", "a", "five!")]
    assert (figures["text_tokens"]["count"], figures["text_tokens"]["sum"]) == (3, sum(counts))


@given(values=st.lists(st.integers(0, 10**9), min_size=1, max_size=40))
def test_quantiles_are_numpys(values: list[int]) -> None:
    found = quantiles(values)
    assert found["min"] == min(values)
    assert found["max"] == max(values)
    assert abs(found["p95"] - np.quantile(values, 0.95)) < 1e-3


def test_an_empty_data_set_has_zero_of_everything(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "x.manifest", [])
    assert statistics(manifest.path) == {"samples": 0, "shards": 0, "bytes": 0, "members": {}}
