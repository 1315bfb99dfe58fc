"""The page of a data set: hostile text stays text, and the bars count every number."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.prepare.stats.count import count
from data_pipeline.prepare.stats.histogram import Histogram
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.report.charts import histogram_chart
from mmscale.report.data_page import write_page
from tests.report.pages import Page

HOSTILE = """</p><script>alert(1)</script><img src=x onerror='alert(2)'>"{{ 7*7 }}" <svg onload=alert(3)>&amp;"""


def picture(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).save(out, "png")
    return out.getvalue()


@pytest.fixture
def page(tmp_path: Path) -> Page:
    with ShardWriter(tmp_path, "x", max_samples=3) as writer:
        writer.write('k"onmouseover="alert(4)', {"png": picture(400, 300), "txt": HOSTILE.encode()})
        parts = [{"image": f"{i}.png"} for i in range(6)] + [{"text": HOSTILE}, {"text": "\u202egnp.exe"}]
        images = {f"{i}.png": picture(40 + 90 * i, 20 + i) for i in range(6)}
        writer.write("many", {**images, "json": json.dumps({"parts": parts}).encode()})
        writer.write("broken", {"png": picture(30, 30)[:90], "txt": b"broken picture"})
        writer.write("text", {"txt": ("long " * 5000).encode()})
        writer.write("bad", {"json": b"{<b>"})
    manifest = write_manifest(tmp_path / "x.manifest", writer.shards)
    write_page(tmp_path / "page.html", "<i>title", [("<u>set", manifest, count(manifest.path))] * 2)
    return Page((tmp_path / "page.html").read_text())


@pytest.mark.fault
def test_hostile_text_stays_text(page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"iframe", "object", "link", "i", "u", "b"}
    assert page.runs_its_own_script_alone()
    attributes = [pair for _, found in page.tags for pair in found.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    sources = [value or "" for name, value in attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert page.text.count(HOSTILE) == 4
    assert 'k"onmouseover="alert(4)' in page.text
    assert "<i>title" in page.text


def test_samples_are_shown_small_and_short(page: Page) -> None:
    sources = [found["src"] or "" for _, found in page.tags if "src" in found]
    assert len(sources) == 2 * (1 + 4)
    for source in sources:
        shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert max(shown.size) <= 208
    assert "400 × 300" in page.text
    assert "6 images" in page.text
    assert "a damaged png image" in page.text
    assert len(page.text) < 20_000


@given(
    values=st.lists(st.one_of(st.integers(0, 60), st.integers(0, 10**9)), min_size=1, max_size=200),
    per_unit=st.sampled_from([1, 1000]),
)
def test_every_number_is_in_a_bar(values: list[int], per_unit: int) -> None:
    histogram = Histogram(per_unit)
    histogram.add(values)
    data = histogram_chart("t", "n", histogram, lambda value: f"{value:.3g}").data()
    (line,) = data["lines"]
    edges, heights = line["x"], line["y"]
    assert sum(heights[:-1]) == pytest.approx(len(values), rel=1e-6)
    assert len(data["ranges"]) == len(edges) - 1 <= 45
    assert edges == sorted(edges)
    assert min(heights) >= 0
    if data["log"]:
        assert edges[0] > 0
    else:  # Each number has a bar of its own, centred on the number.
        half = 0.5 if histogram.largest - histogram.smallest < 44 else 0
        assert edges[0] * per_unit == pytest.approx(min(values) - half, rel=1e-9, abs=1e-5)
    assert edges[-1] >= max(values) / per_unit * (1 - 1e-6)
    median, p95 = (place for place, _ in data["marks"])
    assert median <= p95 <= edges[-1] * (1 + 1e-6)


def test_half_a_pair_of_utf_16_is_shown_escaped(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x", max_samples=3) as writer:
        writer.write("a", {"png": picture(30, 30), "json": b'{"captions": ["half \\ud800"]}'})
    manifest = write_manifest(tmp_path / "x.manifest", writer.shards)
    write_page(tmp_path / "page.html", "t \udcff", [("set", manifest, count(manifest.path))])
    text = (tmp_path / "page.html").read_text()
    assert "half \\ud800" in text
    assert "t \\udcff" in text
