"""Aria's images: equal to its processor in transformers, and to its authors' rule for splits, which differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from transformers import AriaImageProcessor

from data_pipeline.errors import DataConfigError
from data_pipeline.images.crops import render, resize
from data_pipeline.images.splits import ARIA_GRIDS, nearest_aspect_grid, scaled_size
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec, Placement
from tests.data_pipeline.images.test_published_pixels import RAW, _crops, _image

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=14)
RNG = np.random.default_rng(0)
HUNDRED = [(int(h), int(w)) for h, w in RNG.integers(20, 1500, (94, 2))]
HUNDRED += [(490, 490), (980, 980), (7, 900), (900, 7), (1, 1), (336, 490)]
SPLIT = {"kind": "scaled", "longer": 490, "split": {"kind": "most_pixels"}}


def _transform(**config: Any) -> ImageTransform:
    return ImageTransform(TypeAdapter(TransformConfig).validate_python(config), SPEC)


def _assert_equal(ours: list[Any], found: Any, of: tuple[int, int]) -> None:
    """Assert equal pixels where their mask marks a patch, and that the mask marks exactly our patches."""
    assert len(ours) == len(found["pixel_values"]), of
    for crop, pixels, mask in zip(ours, found["pixel_values"], found["pixel_mask"], strict=True):
        side = mask.shape[0] // 14
        _, height, width = crop.shape
        marked = mask.numpy().reshape(side, 14, side, 14).any((1, 3))
        assert marked.sum() == marked[: height // 14, : width // 14].sum() == height * width // 196, of
        assert torch.equal(torch.from_numpy(crop), pixels[:, :height, :width]), of


def test_one_crop_at_a_hundred_sizes() -> None:
    """Every pixel at 490, on images of a quarter of the sizes."""
    processor = AriaImageProcessor(max_image_size=490)
    for height, width in HUNDRED:
        size = (max(1, height // 4), max(1, width // 4))
        found = processor(_image(*size), **RAW)
        _assert_equal(_crops(size, SPEC, kind="scaled", longer=490), found, size)


@pytest.mark.parametrize("size", [(300, 700), (1200, 500)])
def test_one_crop_of_980_pixels(size: tuple[int, int]) -> None:
    found = AriaImageProcessor()(_image(*size), **RAW)
    _assert_equal(_crops(size, SPEC, kind="scaled", longer=980), found, size)


def test_splits_of_transformers_at_a_hundred_sizes() -> None:
    for longer in (490, 980):
        transform = _transform(**{**SPLIT, "longer": longer})
        for size in HUNDRED:
            expected = AriaImageProcessor(max_image_size=longer).get_number_of_image_patches(
                *size, {"split_image": True, "max_image_size": longer}
            )
            plan = transform.plan(size)
            assert len(plan.crops) == expected, size
            assert all(max(crop.grid) == longer // 14 for crop in plan.crops)


@pytest.mark.parametrize("longer", [490, 980])
@pytest.mark.parametrize("size", [(400, 1300), (1400, 900), (1000, 350), (300, 200)])
def test_pixels_of_the_splits_of_transformers(size: tuple[int, int], longer: int) -> None:
    """At 980, parts of 490 pixels are enlarged once more."""
    found = AriaImageProcessor(max_image_size=longer, split_image=True)(_image(*size), **RAW)
    _assert_equal(_crops(size, SPEC, **{**SPLIT, "longer": longer}), found, size)


@pytest.mark.parametrize("size", [(300, 800), (500, 170)])
def test_the_authors_split_has_the_whole_image_first(size: tuple[int, int]) -> None:
    ours = _crops(size, SPEC, kind="scaled", longer=490, split={"kind": "nearest_aspect"})
    rows, columns = min(ARIA_GRIDS, key=lambda grid: abs(size[1] / size[0] - grid[1] / grid[0]))
    assert len(ours) == 1 + rows * columns
    np.testing.assert_array_equal(ours[0], _crops(size, SPEC, kind="scaled", longer=490)[0])
    stretched = np.asarray(_image(*size).resize((490 * columns, 490 * rows), Image.Resampling.BICUBIC)).astype(int)
    for number, crop in enumerate(ours[1:]):
        top, left = 490 * (number // columns), 490 * (number % columns)
        assert np.abs(crop.transpose(1, 2, 0) - stretched[top : top + 490, left : left + 490]).max() <= 2


def test_grids_of_the_authors() -> None:
    assert nearest_aspect_grid((980, 980), 980, ARIA_GRIDS) == (2, 2)
    assert nearest_aspect_grid((1900, 950), 980, ARIA_GRIDS) == (2, 1)
    assert nearest_aspect_grid((2000, 1000), 980, ARIA_GRIDS) == (4, 2)  # 2000 squared is above 4 x 980 squared.
    (crop,) = _transform(kind="scaled", split={"kind": "nearest_aspect", "grids": [[1, 1], [4, 1]]}).plan((9, 9)).crops
    assert crop.cell is None


def test_colours_of_parts_change_once() -> None:
    """A part is cut from a canvas whose colours have been changed."""
    transform = _transform(**SPLIT, augment={"brightness": 0.5})
    plan = transform.plan((100, 200), np.random.default_rng(3))
    assert plan.color is not None
    whole = resize(np.full((100, 200, 3), 100, np.uint8), plan.canvases[0].content)
    changed = plan.color(whole)
    out = [np.empty((crop.grid[1] * crop.grid[2], 588), np.uint8) for crop in plan.crops]
    render(np.full((100, 200, 3), 100, np.uint8), plan, 14, "bicubic", out)
    assert {int(value) for patches in out for value in np.unique(patches)} == {int(changed[0, 0, 0])}


def test_a_fast_decoder_leaves_enough_pixels_for_the_largest_canvas() -> None:
    plan = _transform(kind="scaled", longer=490, split={"kind": "nearest_aspect"}).plan((3000, 3000))
    assert plan.needed_size == (980, 980)


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        ({"longer": 500}, SPEC, r"transforms\.longer=500: must be a multiple of patch size x merge = 14"),
        ({"longer": 504}, MediaSpec(Placement.EMBEDDING, 14, query_sizes=((35, 3),)), "at most 490 pixels a side"),
        ({}, MediaSpec(Placement.EMBEDDING, 14, fixed_grid=(7, 7)), "the vision tower has a fixed size"),
        (
            {"split": {"kind": "most_pixels"}},
            MediaSpec(Placement.HYBRID, 14),
            "needs a crop of the whole image; use nea",
        ),
        (
            {"split": {"kind": "nearest_aspect"}},
            MediaSpec(Placement.PAIR, 14),
            "a crop of the whole image; use no split",
        ),
    ],
)
def test_wrong_uses_are_refused(config: dict[str, Any], spec: MediaSpec, message: str) -> None:
    with pytest.raises(DataConfigError, match=message):
        ImageTransform(TypeAdapter(TransformConfig).validate_python({"kind": "scaled", **config}), spec)


def test_sizes() -> None:
    assert scaled_size((735, 1470), 980, 336) == (490, 980)
    assert scaled_size((700, 1400), 980, 336) == (489, 980)  # 700 * (980 / 1400) is below 490 in float64.
    assert scaled_size((100, 1000), 490, 336) == (336, 490)
    assert scaled_size((1000, 100), 490, 336) == (490, 336)
    with pytest.raises(ValueError, match="shorter=600 is above longer=490"):
        _transform(kind="scaled", longer=490, shorter=600)
