"""Tilings, compared with published grids, the image processors of transformers, and brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2
from transformers.models.mllama import image_processing_pil_mllama as mllama
from transformers.models.molmo2 import image_processing_molmo2 as molmo2

from data_pipeline.errors import DataConfigError
from data_pipeline.images.tilings import (
    InternvlTiling,
    LlamaTiling,
    Mm15Tiling,
    MolmoTiling,
    Tiled,
    TilingConfig,
    covering_grid,
    grids,
    internvl_grid,
    llama_content,
    mm1_5_grid,
)
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec, Placement

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=14, merge=2)
sides = st.integers(1, 4000)


def _grid(tiled: Tiled) -> tuple[int, int]:
    return _grid_of([tile.cell for tile in tiled.tiles])


def _grid_of(all_cells: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    cells = [cell for cell in all_cells if cell is not None]
    return max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1


def test_nvlm_chooses_among_its_published_ratios() -> None:
    # Section 4.1 lists them as width:height.
    published = ["1:1", "1:2", "1:3", "1:4", "1:5", "1:6", "2:1", "2:2", "2:3", "3:1", "3:2", "4:1", "5:1", "6:1"]
    assert sorted(f"{columns}:{rows}" for rows, columns in grids(1, 6)) == published


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1300, 800), (3, 2)),  # InternVL 1.5, figure 4: matched to 2:3, cut into 896 x 1344 pixels.
        ((448, 448), (1, 1)),
        ((100, 100), (1, 1)),
        ((951, 951), (3, 3)),  # Slightly more, and slightly fewer, pixels than half of 9 tiles.
        ((950, 950), (2, 2)),
        ((448, 1344), (1, 3)),
    ],
)
def test_internvl_at_known_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert internvl_grid(size, 448) == grid


@given(size=st.tuples(sides, sides), most=st.sampled_from([1, 6, 12, 40]), least=st.sampled_from([1, 2]))
def test_internvl_is_that_of_transformers(size: tuple[int, int], most: int, least: int) -> None:
    if least <= most:
        columns, rows = got_ocr2.get_optimal_tiled_canvas(size, (448, 448), least, most)
        assert internvl_grid(size, 448, least, most) == (rows, columns)


def test_internvl_puts_the_overview_last_and_none_beside_one_tile() -> None:
    tiled = InternvlTiling().plan((448, 896), 448, SPEC)
    assert [(tile.canvas, tile.top, tile.left, tile.cell) for tile in tiled.tiles] == [
        (0, 0, 0, (0, 0)),
        (0, 0, 448, (0, 1)),
        (1, 0, 0, None),
    ]
    assert [canvas.content for canvas in tiled.canvases] == [(448, 896), (448, 448)]
    (single,) = InternvlTiling().plan((448, 448), 448, SPEC).tiles
    assert single.cell is None


@given(size=st.tuples(sides, sides), most=st.sampled_from([4, 9]), side=st.sampled_from([448, 560]))
def test_llama_is_that_of_transformers(size: tuple[int, int], most: int, side: int) -> None:
    canvas = tuple(int(length) for length in mllama.get_optimal_tiled_canvas(*size, most, side))
    grid = covering_grid(size, side, most)
    assert (grid[0] * side, grid[1] * side) == canvas
    assert llama_content(size, canvas, side) == mllama.get_image_size_fit_to_canvas(*size, *canvas, side)


@pytest.mark.parametrize(
    ("size", "grid", "content"),
    [
        ((560, 560), (1, 1), (560, 560)),
        ((300, 200), (1, 1), (560, 373)),
        ((561, 560), (2, 1), (561, 560)),
        ((2000, 1000), (2, 1), (1120, 560)),
        ((500, 4000), (1, 4), (280, 2240)),
    ],
)
def test_llama_pads_and_does_not_stretch(
    size: tuple[int, int], grid: tuple[int, int], content: tuple[int, int]
) -> None:
    tiled = LlamaTiling().plan(size, 560, SPEC)
    (canvas,) = tiled.canvases
    assert (_grid(tiled), canvas.content, canvas.at, canvas.fill) == (grid, content, (0, 0), 0)
    assert all(tile.cell is not None for tile in tiled.tiles)  # No overview.


@given(size=st.tuples(sides, sides), most=st.sampled_from([8, 12]))
def test_molmo_is_that_of_its_successor_in_transformers(size: tuple[int, int], most: int) -> None:
    rows, columns, height, width = molmo2.compute_crop_geometry(*size, most, [4, 4], 336, 14)
    tiled = MolmoTiling(max_tiles=most).plan(size, 336, SPEC)
    assert _grid(tiled) == (rows, columns)
    assert tiled.canvases[1].size == (height, width)
    assert len(tiled.tiles) == 1 + rows * columns


def test_molmo_at_known_sizes() -> None:
    # A crop of 336 px has 24 x 24 patches and a margin of 4: a window of 224 px, and 144 features; 64 to 144 are kept.
    for size, grid in {(336, 336): (1, 1), (560, 560): (2, 2), (4000, 4000): (3, 3), (784, 1008): (3, 4)}.items():
        tiled = MolmoTiling().plan(size, 336, SPEC)
        assert _grid(tiled) == grid
        rows, columns = grid
        kept = sum(
            tile.kept_region.height * tile.kept_region.width for tile in tiled.tiles if tile.kept_region is not None
        )
        assert kept == (rows * 8 + 4) * (columns * 8 + 4)  # Halves of the 16 window and 8 margin patches.
        assert tiled.tiles[0].cell is None


@given(size=st.tuples(sides, sides), margin=st.sampled_from([2, 4, 6]))
def test_molmo_keeps_every_feature_of_the_canvas_once(size: tuple[int, int], margin: int) -> None:
    tiled = MolmoTiling(margin=margin).plan(size, 336, SPEC)
    height, width = (side // 28 for side in tiled.canvases[1].size)
    seen = np.zeros((height, width), int)
    for tile in tiled.tiles[1:]:
        assert tile.kept_region is not None
        top, left = tile.top // 28 + tile.kept_region.top, tile.left // 28 + tile.kept_region.left
        seen[top : top + tile.kept_region.height, left : left + tile.kept_region.width] += 1
    assert (seen == 1).all()


@given(size=st.tuples(sides, sides), least=st.sampled_from([1, 4]), most=st.sampled_from([9, 16]))
def test_mm1_5_pads_least_or_reduces_least(size: tuple[int, int], least: int, most: int) -> None:
    side = 672
    rows, columns = mm1_5_grid(size, side, least, most)
    assert least <= rows * columns <= most

    def scale(r: int, c: int) -> float:
        return min(r * side / size[0], c * side / size[1])

    choices = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if least <= r * c <= most]
    covering = [(r, c) for r, c in choices if r * side >= size[0] and c * side >= size[1]]
    if not covering:
        assert scale(rows, columns) == max(scale(r, c) for r, c in choices)
        return
    assert (rows, columns) in covering

    def padding(r: int, c: int) -> float:
        return r * c * side**2 - size[0] * size[1] * scale(r, c) ** 2

    slack = 2 * side * most  # The reference does not round to whole pixels.
    assert padding(rows, columns) <= min(padding(r, c) for r, c in covering) + slack


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((672, 672), (2, 2)),
        ((1344, 1344), (2, 2)),
        ((672, 2688), (1, 4)),
        ((1345, 1344), (3, 3)),
        ((9000, 1000), (9, 1)),
    ],
)
def test_mm1_5_at_known_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    tiled = Mm15Tiling().plan(size, 672, SPEC)
    assert _grid(tiled) == grid
    assert tiled.tiles[-1].cell is None


@pytest.mark.parametrize("margin", [3, 12])
def test_margins_that_do_not_fit_are_refused(margin: int) -> None:
    with pytest.raises(DataConfigError, match=f"margin={margin}: must be a multiple of the model's merge, 2"):
        MolmoTiling(margin=margin).check(336, SPEC)


def test_more_tiles_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tiles=5 is above max_tiles=4"):
        TypeAdapter(TilingConfig).validate_python({"kind": "mm1_5", "min_tiles": 5, "max_tiles": 4})


@pytest.mark.parametrize(
    ("tiling", "split", "single"),
    [("internvl", 3, 1), ("llama", 2, 1), ("molmo", 5, 2), ("mm1_5", 9, 1)],
)
def test_images_of_crowded_samples_are_not_split(tiling: str, split: int, single: int) -> None:
    config = {"kind": "tiles", "size": 168, "tiling": {"kind": tiling}, "split_up_to": 2}
    transform = ImageTransform(TypeAdapter(TransformConfig).validate_python(config), SPEC)
    split_up = transform.dry_run((168, 336), num_images=2)
    assert {crop.tiles for crop in split_up} == {_grid_of([crop.cell for crop in split_up])}
    counts = {number: len(transform.dry_run((168, 336), num_images=number)) for number in (1, 2, 3, 9)}
    assert counts == {1: split, 2: split, 3: single, 9: single}


@pytest.mark.parametrize(
    ("tiling", "said"),
    [
        ({"kind": "internvl", "max_tiles": 4}, "has an overview, but the vision tower"),
        ({"kind": "llama", "max_tiles": 5}, "max_tiles=5: the vision tower accepts at most 4"),
    ],
)
def test_tiles_that_the_tower_does_not_know_are_refused(tiling: dict[str, object], said: str) -> None:
    spec = MediaSpec(Placement.CROSS_ATTENTION, patch_size=14, fixed_grid=(4, 4), max_tiles=4)
    config = TypeAdapter(TransformConfig).validate_python({"kind": "tiles", "tiling": tiling})
    with pytest.raises(DataConfigError, match=said):
        ImageTransform(config, spec)


def test_a_kept_class_token_is_a_feature_more() -> None:
    spec = MediaSpec(Placement.CROSS_ATTENTION, patch_size=14, fixed_grid=(4, 4), class_features=1)
    assert spec.num_features((1, 4, 4)) == 17
    with pytest.raises(DataConfigError, match="only where features are attended"):
        MediaSpec(Placement.EMBEDDING, class_features=1)
