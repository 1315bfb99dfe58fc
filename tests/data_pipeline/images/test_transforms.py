"""Crops: sizes, order of patches, roles by placement, and augmentation as a pure function."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.crops import AugmentConfig, crop_to_box, patchify, resize
from data_pipeline.images.native_sizes import area_size
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec, Placement

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(2, 2))
AUGMENT = {"shift": 0.2, "scale": [0.7, 1.3], "flip": 0.5, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3}


def _image(height: int, width: int, encoding: str = "PNG") -> bytes:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, encoding)
    return out.getvalue()


def _transform(spec: MediaSpec, **config: object) -> ImageTransform:
    return ImageTransform(TypeAdapter(TransformConfig).validate_python(config), spec)


def _roles(crops: tuple[MediaItem, ...]) -> list[bool]:
    return [crop.embedded for crop in crops]


def patches_of(pixels: np.ndarray, size: int) -> np.ndarray:
    out = np.empty((pixels.shape[0] * pixels.shape[1] // size**2, 3 * size**2), dtype=np.uint8)
    patchify(pixels, size, out)
    return out


def test_patches_are_row_major_and_channel_first() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = patches_of(pixels, 2)
    assert patches.shape == (6, 12)
    for row in range(2):
        for column in range(3):
            square = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = [square[y, x, c] for c in range(3) for y in range(2) for x in range(2)]
            assert patches[row * 3 + column].tolist() == expected


def test_resize_is_close_to_pillow() -> None:
    pixels = np.array(Image.open(io.BytesIO(_image(48, 80))))
    ours = resize(pixels, (20, 30)).astype(int)
    theirs = np.asarray(Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 2


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    multiple=st.sampled_from([14, 28]),
    limits=st.sampled_from([(56 * 56, 200_000), (1, 28 * 28), (50_000, 60_000)]),
)
def test_native_sizes_are_multiples_within_the_limit(
    height: int, width: int, multiple: int, limits: tuple[int, int]
) -> None:
    new_height, new_width = area_size(height, width, multiple, *limits)
    assert new_height % multiple == new_width % multiple == 0
    assert min(new_height, new_width) >= multiple
    assert new_height * new_width <= limits[1]


def test_native_keeps_a_legal_size() -> None:
    crops = _transform(MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2), kind="native", min_pixels=64)(
        _image(32, 48)
    )
    assert [crop.grid for crop in crops] == [(1, 4, 6)]


@pytest.mark.parametrize(
    ("placement", "kind", "roles"),
    [
        (Placement.EMBEDDING, "fixed", [True]),
        (Placement.CROSS_ATTENTION, "fixed", [False]),
        (Placement.HYBRID, "fixed", [True, False]),
        (Placement.EMBEDDING, "tiles", [True, True, True]),
        (Placement.CROSS_ATTENTION, "tiles", [False, False, False]),
        (Placement.HYBRID, "tiles", [False, False, True]),
    ],
)
def test_roles_follow_the_placement(placement: Placement, kind: str, roles: list[bool]) -> None:
    spec = MediaSpec(placement, patch_size=8, fixed_grid=(2, 2))
    crops = _transform(spec, kind=kind)(_image(20, 40))
    assert _roles(crops) == roles
    assert all(crop.grid == (1, 2, 2) and crop.values.shape == (4, 192) for crop in crops)


def test_tiles_cover_the_image_in_reading_order() -> None:
    data = _image(16, 32)
    left, right, _overview = _transform(SPEC, kind="tiles", tiling={"kind": "internvl", "max_tiles": 2})(data)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(left.values, patches_of(pixels[:, :16], 8))
    np.testing.assert_array_equal(right.values, patches_of(pixels[:, 16:], 8))


def test_keep_aspect_pads_with_white() -> None:
    (crop,) = _transform(SPEC, kind="fixed", keep_aspect=True)(_image(4, 16))
    image = crop.values.reshape(2, 2, 3, 8, 8).transpose(0, 3, 1, 4, 2).reshape(16, 16, 3)
    assert (image[:5] == 255).all()
    assert (image[-5:] == 255).all()
    assert (image[7] != 255).any()


def test_augmentation_is_a_pure_function_of_its_generator() -> None:
    transform, data = _transform(SPEC, kind="fixed", augment=AUGMENT), _image(30, 30)
    first, same, other = (transform(data, np.random.default_rng(seed))[0].values for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_without_generator_nothing_is_augmented() -> None:
    data = _image(16, 16)
    (crop,) = _transform(SPEC, kind="fixed", augment=AUGMENT)(data)
    np.testing.assert_array_equal(crop.values, patches_of(np.asarray(Image.open(io.BytesIO(data))), 8))


@given(seed=st.integers(0, 1000), height=st.integers(1, 40), width=st.integers(1, 40))
def test_crops_stay_within_their_strengths(seed: int, height: int, width: int) -> None:
    config = AugmentConfig(shift=0.25, scale=(0.5, 2.0))
    (top, left, box_height, box_width), _, _ = config.draw((height, width), np.random.default_rng(seed))
    assert 0.5 * height - 1 <= box_height <= 2 * height + 1
    assert abs(left + box_width / 2 - width / 2) <= 0.25 * width + 1
    assert crop_to_box(np.zeros((height, width, 3), np.uint8), (top, left, box_height, box_width)).shape == (
        box_height,
        box_width,
        3,
    )


def test_cut_puts_pixels_where_they_were() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    framed = crop_to_box(pixels, (-1, -2, 4, 5))
    np.testing.assert_array_equal(framed[1:3, 2:4], pixels)
    assert framed.sum() == pixels.sum() + 255 * 3 * (20 - 4)


def test_jitter_without_strength_changes_nothing_and_gray_keeps_its_hue() -> None:
    pixels = np.full((2, 2, 3), 100, np.uint8)
    assert AugmentConfig(flip=1).draw((2, 2), np.random.default_rng(0))[2] is None
    saturate, darken = (
        AugmentConfig(**{name: 0.9}).draw((2, 2), np.random.default_rng(3))[2] for name in ("saturation", "brightness")
    )
    assert saturate is not None
    assert darken is not None
    np.testing.assert_array_equal(saturate(pixels), pixels)
    assert (darken(pixels) != pixels).all()


@pytest.mark.parametrize(
    ("config", "seed", "needed"),
    [
        ({"kind": "fixed"}, None, (16, 16)),
        ({"kind": "fixed", "augment": {"scale": [0.5, 0.5]}}, 1, (32, 32)),
        ({"kind": "fixed", "augment": {"scale": [0.5, 0.5]}}, None, (16, 16)),
        ({"kind": "tiles", "tiling": {"kind": "internvl", "max_tiles": 4}}, None, (32, 32)),
    ],
)
def test_fast_decoding_leaves_enough_pixels_for_the_tiles_and_the_crop(
    config: dict, seed: int | None, needed: tuple[int, int]
) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    assert _transform(SPEC, decode="fast", **config).plan((512, 512), rng).needed_size == needed


def test_fast_decoding_crops_where_exact_decoding_does() -> None:
    smooth = Image.fromarray(np.linspace(0, 255, 64 * 64, dtype=np.uint8).reshape(64, 64)).resize((512, 512))
    out = io.BytesIO()
    smooth.convert("RGB").save(out, "JPEG", quality=95)
    augment = {"scale": [0.5, 0.9], "shift": 0.3, "flip": 0.5}
    for seed in range(4):
        exact, fast = (
            _transform(SPEC, kind="fixed", decode=mode, augment=augment)(out.getvalue(), np.random.default_rng(seed))[0]
            for mode in ("exact", "fast")
        )
        assert (
            np.abs(exact.values.astype(int) - fast.values).mean() < 2
        )  # The white border may differ by less than a pixel.


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (SPEC, {"kind": "fixed", "size": 32}, "takes 16x16 pixels"),
        (SPEC, {"kind": "fixed", "size": 20}, "multiple of patch size x merge = 8"),
        (SPEC, {"kind": "native"}, "fixed size"),
        (MediaSpec(Placement.EMBEDDING, patch_size=8), {"kind": "tiles"}, "size is missing"),
        (MediaSpec(Placement.EMBEDDING, patch_size=99), {"kind": "native", "max_pixels": 5000}, "max_pixels=5000"),
        (MediaSpec(Placement.EMBEDDING, channels=1), {"kind": "native"}, "1 channels"),
    ],
)
def test_transforms_that_do_not_fit_the_model_are_refused(spec: MediaSpec, config: dict, message: str) -> None:
    with pytest.raises(DataConfigError, match=message):
        _transform(spec, **config)


def test_strips_are_refused_and_so_is_a_scale_upside_down() -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8)
    with pytest.raises(SampleError, match="aspect"):
        _transform(spec, kind="native", max_aspect=5)(_image(4, 60))
    with pytest.raises(ValidationError, match="low <= high"):
        AugmentConfig(scale=(1.0, 0.5))
