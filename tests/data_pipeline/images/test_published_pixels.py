"""Pixels of crops, compared with the image processors of transformers: order of tiles, padding, fill, resizing.

The images are lossless, so decoding has no effect. The processors resize with torchvision, as we do.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from transformers import (
    CLIPImageProcessor,
    FuyuImageProcessor,
    GotOcr2ImageProcessor,
    JanusImageProcessor,
    MllamaImageProcessor,
    PixtralImageProcessor,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
)

from data_pipeline.errors import SampleError
from data_pipeline.images.native_sizes import shrunk_size
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec, Placement

RAW: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
SIZES = [(60, 90), (200, 60), (41, 43), (160, 160), (1, 70)]


def _image(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _crops(of: tuple[int, int], spec: MediaSpec, **config: Any) -> list[npt.NDArray[np.uint8]]:
    """Return our crops as ``(3, H, W)``."""
    out = io.BytesIO()
    _image(*of).save(out, "PNG")
    transform = ImageTransform(TypeAdapter(TransformConfig).validate_python(config), spec)
    patch, crops = spec.patch_size, []
    for item in transform(out.getvalue()):
        _, rows, columns = item.grid
        squares = item.values.reshape(rows, columns, 3, patch, patch).transpose(2, 0, 3, 1, 4)
        crops.append(squares.reshape(3, rows * patch, columns * patch))
    return crops


def _assert_close(ours: npt.NDArray[np.uint8], theirs: torch.Tensor) -> None:
    """Assert equality up to one step, because the processors resize some types in float."""
    assert ours.shape == tuple(theirs.shape)
    assert np.abs(ours.astype(int) - theirs.round().numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_internvl(size: tuple[int, int]) -> None:
    processor = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=12)
    theirs = processor(_image(*size), **RAW)["pixel_values"]
    ours = _crops(size, MediaSpec(Placement.EMBEDDING, patch_size=8), kind="tiles", size=32)
    assert len(ours) == len(theirs)
    for crop, tile in zip(ours, theirs, strict=True):
        _assert_close(crop, tile)


@pytest.mark.parametrize("size", [*SIZES, (300, 7), (61, 96)])
def test_janus(size: tuple[int, int]) -> None:
    """Grey around an image whose shorter side has at least 14 pixels; equal bytes."""
    processor = JanusImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (theirs,) = processor(_image(*size), **RAW)["pixel_values"]
    grey = {"keep_aspect": True, "background": [127, 127, 127], "min_side": 14}
    (ours,) = _crops(size, MediaSpec(Placement.EMBEDDING, patch_size=8), kind="fixed", size=32, **grey)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("size", SIZES)
def test_llama(size: tuple[int, int]) -> None:
    processor = MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=4)
    found = processor(_image(*size), **RAW)
    tiling = {"kind": "llama"}
    spec = MediaSpec(Placement.CROSS_ATTENTION, patch_size=8)
    ours = _crops(size, spec, kind="tiles", size=32, tiling=tiling, interpolation="bilinear")
    assert len(ours) == found["num_tiles"][0][0]
    for crop, tile in zip(ours, found["pixel_values"][0, 0], strict=False):
        _assert_close(crop, tile)


# Without (1, 70), whose shorter side the processor rounds to 0.
@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 70)])
def test_pixtral(size: tuple[int, int]) -> None:
    processor = PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    theirs = processor(_image(*size), **RAW)["pixel_values"][0]
    (ours,) = _crops(size, MediaSpec(Placement.EMBEDDING, patch_size=8), kind="longest_side", longest=64)
    _assert_close(ours, theirs[:, : ours.shape[1], : ours.shape[2]])


@pytest.mark.parametrize("size", SIZES)
def test_fuyu(size: tuple[int, int]) -> None:
    frame = {"height": 90, "width": 120}
    theirs = FuyuImageProcessor(size=frame)(_image(*size), **RAW)["images"][0][0]
    limits = {"max_height": 90, "max_width": 120, "interpolation": "bilinear"}
    (ours,) = _crops(size, MediaSpec(Placement.EMBEDDING, patch_size=30), kind="padded", **limits)
    theirs = theirs[:, : ours.shape[1], : ours.shape[2]]
    _assert_close(ours, theirs)
    height, width = shrunk_size(*size, (90, 120))
    np.testing.assert_array_equal(ours[:, height:], theirs[:, height:].numpy())  # The padding is exactly equal.
    np.testing.assert_array_equal(ours[:, :, width:], theirs[:, :, width:].numpy())


@pytest.mark.parametrize("size", [(60, 90), (200, 60), (300, 300)])
def test_qwen2_vl(size: tuple[int, int]) -> None:
    limits = {"min_pixels": 32 * 32, "max_pixels": 128 * 128}
    processor = Qwen2VLImageProcessor(patch_size=8, merge_size=2, temporal_patch_size=1, **limits)
    found = processor(_image(*size), **RAW)
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2)
    (ours,) = _crops(size, spec, kind="native", **limits)
    _, rows, columns = found["image_grid_thw"][0].tolist()
    # The processor orders patches by squares of 2 x 2, and each patch by (channel, row, column).
    squares = found["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 8, 8)
    _assert_close(ours, squares.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 8, columns * 8))


HUNDRED = [tuple(int(side) for side in np.random.default_rng(number).integers(20, 150, 2)) for number in range(97)]
HUNDRED += [(32, 32), (32, 64), (96, 32)]


def _normalised(crops: list[npt.NDArray[np.uint8]], processor: Any) -> torch.Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(np.stack(crops)) / 255 - mean) / std


def _off_by(processor: Any, of: tuple[int, int], spec: MediaSpec, **config: Any) -> float:
    """Return the largest difference of normalised pixel values, in steps of one byte."""
    theirs = processor(_image(*of), return_tensors="pt")["pixel_values"]
    ours = _normalised(_crops(of, spec, **config), processor)
    assert ours.shape == theirs.shape, of
    return float((ours - theirs).abs().max() * 255 * min(processor.image_std))


def test_internvl_at_a_hundred_sizes() -> None:
    processor = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6)
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8)
    tiling = {"kind": "internvl", "max_tiles": 6}
    off = [_off_by(processor, size, spec, kind="tiles", size=32, tiling=tiling) for size in HUNDRED]
    assert max(off) < 1e-4


def test_clip_at_a_hundred_sizes() -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8)
    off = [_off_by(processor, size, spec, kind="fixed", size=32, crop="center") for size in HUNDRED]
    assert max(off) < 1e-4


@pytest.mark.parametrize("size", [(40, 70), (90, 33), (32, 32)])
def test_a_random_square_lies_anywhere_in_training_and_in_the_middle_else(size: tuple[int, int]) -> None:
    """Each position along the longer side is drawn, and no other position."""
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8)
    block = {"kind": "fixed", "size": 32, "crop": "random"}
    transform = ImageTransform(TypeAdapter(TransformConfig).validate_python(block), spec)
    plans = [transform.plan(size, np.random.default_rng(seed)) for seed in range(400)]
    content = plans[0].canvases[0].content
    places = {(plan.crops[0].top, plan.crops[0].left) for plan in plans}
    assert min(content) == 32
    assert places == {(top, left) for top in range(content[0] - 31) for left in range(content[1] - 31)}
    middle = (content[0] - 32) // 2, (content[1] - 32) // 2
    assert (transform.plan(size).crops[0].top, transform.plan(size).crops[0].left) == middle


def test_siglip_at_a_hundred_sizes() -> None:
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8)
    off = [_off_by(processor, size, spec, kind="fixed", size=32) for size in HUNDRED]
    assert max(off) < 1e-4


def test_a_strip_whose_middle_would_be_cut_out_of_too_large_an_image_is_refused() -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8)
    with pytest.raises(SampleError, match="an image of 160000x32 pixels"):
        _crops((1, 5000), spec, kind="fixed", size=32, crop="center", max_image_pixels=10**6)


def test_crop_and_padding_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="keep_aspect pads the image and crop cuts it"):
        _crops((40, 40), MediaSpec(Placement.EMBEDDING, patch_size=8), kind="fixed", crop="center", keep_aspect=True)
    with pytest.raises(ValueError, match="background, min_side: only keep_aspect pads an image; set keep_aspect: true"):
        _crops((40, 40), MediaSpec(Placement.EMBEDDING, patch_size=8), kind="fixed", min_side=14)
