"""The report's section about experts: values of the files, readable pictures, nothing without experts."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmscale.metrics.router_log import ROUTER_FILE, RouterWindow
from mmscale.report.build import build_report, render
from tests.report.pages import Page

BLOCKS = (1, 3, 5)
LOADS = [
    [[8, 0, 4, 4], [0, 4, 0, 4]],
    [[4, 4, 4, 4], [2, 2, 2, 2]],
    [[16, 0, 0, 0], [8, 0, 0, 0]],
]


def window(loads: Any = LOADS, blocks: tuple[int, ...] = BLOCKS) -> RouterWindow:
    load = np.array(loads, np.int64)
    tokens = load.sum(2) // 2
    return RouterWindow(41, 60, blocks, tokens, tokens * np.array([0.5, 1.0]), load, np.zeros(len(load), np.int64))


def write_run(folder: Path, table: RouterWindow | None) -> Path:
    """Write a run of 60 steps whose windows have the metrics of ``window``, times 1, 2 and 3 for the ratios."""
    lines = []
    for step in range(1, 61):
        line: dict[str, Any] = {"step": step, "stage": "ab"[step > 30], "loss": 2.0, "seconds": 0.5, "lr": 1e-3}
        line |= {"data_wait_seconds": 0.1, "tokens": 10, "samples": 1, "grad_norm": 1.0}
        if step % 20 == 0 and table is not None:
            factor = {name: step // 20 if name.endswith("mean") else 1 for name in table.metrics()}
            line |= {name: value * factor[name] for name, value in table.metrics().items()}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if table is not None:
        (folder / ROUTER_FILE).write_text(table.to_json())
    return folder


def charts(page: Page, axis: str) -> list[dict[str, dict[str, list[float]]]]:
    """Return the lines by label of each chart of the section with this axis."""
    return [{line["label"]: line for line in chart["lines"]} for chart in page.charts[5:] if chart["axis"] == axis]


def pictures(page: Page) -> list[np.ndarray]:
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    data = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    return [np.array(Image.open(io.BytesIO(each)).convert("RGB")) for each in data]


def test_the_curves_are_those_of_the_blocks(tmp_path: Path) -> None:
    page = Page(build_report(write_run(tmp_path, window())).read_text())
    ratio, entropy, dead, distance = charts(page, "step")
    # Loads of both kinds: 8 4 4 8, 6 6 6 6, 24 0 0 0, so the ratios are 4/3, 1 and 4.
    assert ratio["median block"]["x"] == [20, 40, 60]
    assert ratio["median block"]["y"] == pytest.approx([4 / 3, 8 / 3, 4])
    assert ratio["median block"]["low"] == pytest.approx([1, 2, 3])
    assert ratio["median block"]["high"] == ratio["highest block"]["y"] == pytest.approx([4, 8, 12])
    assert entropy["median block"]["y"] == pytest.approx([2 / 3] * 3)  # Two thirds of the tokens are text.
    assert dead["all blocks"]["y"] == [3, 3, 3]
    assert distance["highest block"]["y"] == [0.75] * 3
    assert distance["median block"]["y"] == [0] * 3
    ratio, entropy, dead, distance = charts(page, "block")
    assert ratio["all tokens"]["x"] == [*BLOCKS]
    assert [ratio[f"{kind} tokens"]["y"] for kind in ("text", "image")] == [[2, 1, 4], [2, 1, 4]]
    assert entropy["image tokens"]["y"] == [1, 1, 1]
    assert [dead[f"{kind} tokens"]["y"] for kind in ("all", "text", "image")] == [[0, 0, 3], [1, 0, 3], [2, 0, 3]]
    assert distance["text and image"]["y"] == [0.75, 0, 0]
    for words in ("steps 41 to 60", "dead experts 3", "4.00 (block 5)", "0.75 (block 1)", "8, 4"):
        assert words in page.text
    assert page.runs_its_own_script_alone()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_heat_maps_have_a_cell_for_each_block_and_expert(tmp_path: Path) -> None:
    text, image = pictures(Page(build_report(write_run(tmp_path, window())).read_text()))
    assert text.shape == image.shape == (3, 4, 3)
    none, mean, double, most = text[0, 1], text[1, 0], text[0, 0], text[2, 0]
    assert (text[2, 1:] == none).all()
    assert (image[0, [0, 2]] == none).all()
    assert none.max() < 20
    assert (text[0, 2:] == mean).all()
    assert (image[1] == mean).all()
    assert mean.min() > 230
    assert np.abs(double - (mean.astype(float) + most) / 2).max() <= 1  # The scale is logarithmic and ends at 4.
    assert (image[2, 0] == most).all()


@pytest.mark.parametrize(("length", "experts", "is_wide"), [(28, 64, False), (64, 128, True), (1, 2, False)])
def test_pictures_of_large_models_are_small_files_with_few_labels(
    tmp_path: Path, length: int, experts: int, is_wide: bool
) -> None:
    loads = np.random.default_rng(0).integers(0, 9_999, (length, 2, experts))
    text = build_report(write_run(tmp_path, window(loads, tuple(range(length))))).read_text()
    page = Page(text)
    assert [picture.shape for picture in pictures(page)] == [(length, experts, 3)] * 2
    assert ("figure wide" in text.split('id="experts"')[1]) == is_wide
    labels = [attributes["style"] or "" for tag, attributes in page.tags if tag == "span" and "style" in attributes]
    assert 0 < sum(label.startswith("left:") for label in labels) <= 2 * 16
    (height,) = {attributes["style"] for tag, attributes in page.tags if tag == "img"}
    assert 4 * length <= int((height or "").removeprefix("height:").removesuffix("px")) <= max(280, 4 * length)
    assert len(page.charts) == (5 + 8 if length > 1 else 5 + 4)


def test_text_alone_has_one_map_and_no_distance(tmp_path: Path) -> None:
    loads = np.array(LOADS) * np.array([1, 0])[:, None]
    page = Page(build_report(write_run(tmp_path, window(loads))).read_text())
    assert len(pictures(page)) == 1
    assert "Load by text tokens" in page.text
    assert "Load by image tokens" not in page.text
    assert "distance" not in page.text.lower()


def test_dropped_choices_have_a_curve(tmp_path: Path) -> None:
    table = replace(window(), dropped=np.array([6, 0, 12]))
    page = Page(build_report(write_run(tmp_path, table)).read_text())
    assert charts(page, "step")[-1]["median block"]["high"] == [0.5] * 3
    assert "dropped choices 25%" in page.text


def test_a_run_without_experts_has_no_section(tmp_path: Path) -> None:
    page = render(write_run(tmp_path, None))
    assert "Experts" not in page
    assert "heat" not in page


def test_a_damaged_or_absent_table_leaves_the_curves(tmp_path: Path) -> None:
    write_run(tmp_path, window())
    (tmp_path / ROUTER_FILE).write_text("{")
    notes: list[str] = []
    page = Page(render(tmp_path, notes.append))
    assert len(page.charts) == 5 + 4
    assert [f"{tmp_path / ROUTER_FILE} is damaged" in note for note in notes] == [True]
    (tmp_path / ROUTER_FILE).unlink()
    notes.clear()
    assert len(Page(render(tmp_path, notes.append)).charts) == 5 + 4
    assert notes == []
