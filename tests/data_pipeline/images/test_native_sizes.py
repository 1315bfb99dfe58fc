"""Native sizes, compared with the image processors of transformers at published and random sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.image_utils import SizeDict
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data_pipeline.images.native_sizes import area_size, fitted, longest_side_size, round_up, shrunk_size

QWEN2_VL = [
    (56 * 56, 28 * 28 * 1280),
    (4 * 28 * 28, 16384 * 28 * 28),
]  # Limits of its image processor; limits of qwen-vl-utils.


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    # 64 tokens for 224 x 224: the paper, section 2.1. The rest follows from rounding to 28, halves to even.
    [(224, 224, 64), (1080, 1920, 1222), (42, 42, 4), (70, 98, 8), (28, 28, 4), (14, 2000, 24)],
)
def test_qwen2_vl_at_known_sizes(height: int, width: int, tokens: int) -> None:
    new_height, new_width = area_size(height, width, 28, *QWEN2_VL[0])
    assert new_height * new_width == tokens * 28 * 28


@example(height=14, width=1000, limits=QWEN2_VL[0])
@example(height=1, width=200, limits=QWEN2_VL[0])
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), limits=st.sampled_from(QWEN2_VL))
def test_qwen2_vl_is_smart_resize(height: int, width: int, limits: tuple[int, int]) -> None:
    if max(height, width) <= 200 * min(height, width):
        assert area_size(height, width, 28, *limits) == smart_resize(height, width, 28, *limits)


@pytest.mark.parametrize(
    ("height", "width", "patches"),
    [
        (1024, 1024, (64, 64)),
        (512, 512, (32, 32)),
        (2048, 1024, (64, 32)),
        (2000, 1001, (64, 32)),  # 512.5 pixels are rounded down.
        (17, 16, (2, 1)),
        (3000, 1, (64, 1)),
    ],
)
def test_pixtral_at_known_sizes(height: int, width: int, patches: tuple[int, int]) -> None:
    assert longest_side_size(height, width, 16, 1024) == (patches[0] * 16, patches[1] * 16)


@given(height=st.integers(5, 5000), width=st.integers(5, 5000))
def test_pixtral_is_that_of_transformers(height: int, width: int) -> None:
    image = np.broadcast_to(np.uint8(0), (height, width, 3))
    assert longest_side_size(height, width, 16, 1024) == get_resize_output_image_size(image, 1024, 16)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1080, 1920), (1080, 1920)), ((300, 300), (300, 300)), ((2160, 1920), (1080, 960)), ((1, 5000), (1, 1920))],
)
def test_fuyu_at_known_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shrunk_size(*size, (1080, 1920)) == expected


@given(height=st.integers(40, 400), width=st.integers(40, 700))
def test_fuyu_is_that_of_transformers(height: int, width: int) -> None:
    processor = FuyuImageProcessorPil()
    image = np.zeros((3, height, width), np.uint8)
    theirs = processor.resize(image, SizeDict(height=108, width=192)).shape[1:]
    assert shrunk_size(height, width, (108, 192)) == theirs
    assert [round_up(side, 30) for side in theirs] == [math.ceil(side / 30) * 30 for side in theirs]


@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)), into=st.tuples(st.integers(1, 900), st.integers(1, 900))
)
def test_a_fitted_image_fills_one_side_and_keeps_its_aspect(size: tuple[int, int], into: tuple[int, int]) -> None:
    height, width = fitted(size, into)
    assert height <= into[0]
    assert width <= into[1]
    assert height == into[0] or width == into[1]
    scale = min(into[0] / size[0], into[1] / size[1])
    assert abs(height - size[0] * scale) < 1 or height == 1
    assert abs(width - size[1] * scale) < 1 or width == 1
