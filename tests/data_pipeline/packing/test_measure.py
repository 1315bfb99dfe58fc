"""Dry runs: documents are equal to built ones except for pixels, and draw the same random numbers."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import ImagePart, Part, Sample, TextPart
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer

ORIENTATION = 0x0112
FIXED = MediaSpec(Placement.EMBEDDING, patch_size=4, fixed_grid=(2, 2))
FREE = MediaSpec(Placement.EMBEDDING, patch_size=4, merge=2, position_axes=3)
AUGMENT = {"shift": 0.3, "scale": [0.4, 1.6], "flip": 0.5, "contrast": 0.3}
TRANSFORMS: list[tuple[MediaSpec, dict[str, Any]]] = [
    (FIXED, {"kind": "fixed"}),
    (FIXED, {"kind": "fixed", "keep_aspect": True, "decode": "fast"}),
    (FREE, {"kind": "native", "min_pixels": 64, "max_pixels": 1024}),
    (FREE, {"kind": "native", "decode": "fast"}),
    (FREE, {"kind": "longest_side", "longest": 48}),
    (FREE, {"kind": "padded", "max_height": 40, "max_width": 32}),
    (FIXED, {"kind": "tiles", "tiling": {"kind": "internvl", "max_tiles": 5}}),
    (FIXED, {"kind": "tiles", "tiling": {"kind": "llama"}, "split_up_to": 1}),
    (FIXED, {"kind": "tiles", "tiling": {"kind": "mm1_5", "min_tiles": 2}, "decode": "fast"}),
    (FIXED, {"kind": "tiles", "tiling": {"kind": "idefics3", "longest_side": 60}, "interpolation": "lanczos"}),
    (FREE, {"kind": "tiles", "size": 24, "tiling": {"kind": "molmo", "margin": 2, "max_tiles": 6}}),
]
LAYOUT = {"start": "[", "end": "]", "overview": "o", "crop_start": "(", "crop_end": ")", "spell": True}


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path))


@cache
def _image(height: int, width: int, encoding: str, orientation: int) -> bytes:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif, out = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(out, encoding, exif=exif)
    return out.getvalue()


images = st.builds(
    _image, st.integers(1, 60), st.integers(1, 60), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(1, 8)
)
samples = st.lists(st.one_of(images, st.text("ab ", min_size=1, max_size=5)), min_size=1, max_size=4).map(
    lambda parts: [*parts, "end"]
)


def _sample(parts: list[bytes | str]) -> Sample:
    made: list[Part] = [TextPart(p) if isinstance(p, str) else ImagePart(p, f"{i}.png") for i, p in enumerate(parts)]
    return Sample(tuple(made), {})


def assert_measured(built: Document, measured: Document) -> None:
    """Assert that all fields are equal; pixels have equal shapes, and those of the dry run take no memory."""
    for field in fields(Document):
        ours, theirs = getattr(built, field.name), getattr(measured, field.name)
        if field.name == "items":
            assert [replace(item, values=None) for item in ours] == [replace(item, values=None) for item in theirs]
            assert [item.values.shape for item in ours] == [item.values.shape for item in theirs]
            assert all(set(item.values.strides) == {0} for item in theirs)
        elif isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    parts=samples,
    chosen=st.sampled_from(TRANSFORMS),
    augment=st.booleans(),
    placement=st.sampled_from([Placement.EMBEDDING, Placement.CROSS_ATTENTION, Placement.HYBRID]),
    seed=st.integers(0, 100),
)
def test_a_measured_document_is_the_built_one_without_pixels(
    tokenizer: Tokenizer,
    parts: list[bytes | str],
    chosen: tuple[MediaSpec, dict[str, Any]],
    augment: bool,
    placement: Placement,
    seed: int,
) -> None:
    spec, transforms = replace(chosen[0], placement=placement), chosen[1] | ({"augment": AUGMENT} if augment else {})
    if placement is Placement.HYBRID and transforms.get("tiling", {}).get("kind") == "llama":
        return  # Rejected: it has no overview.
    if placement is Placement.EMBEDDING:
        transforms |= {"layout": LAYOUT}
    config = {"name": "x", "manifest": "x", "template": {"kind": "interleaved"}, "transforms": transforms}
    builder = DocumentBuilder(DatasetConfig.model_validate(config), tokenizer, spec)
    drawn, redrawn = np.random.default_rng(seed), np.random.default_rng(seed)
    sample = _sample(parts)
    assert_measured(builder(sample, drawn), builder.dry_run(sample, redrawn))
    assert drawn.random() == redrawn.random()


def test_a_dry_run_needs_the_index_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(tmp_path, "x", max_samples=10) as writer:
        for number, orientation in enumerate((1, 6, 8)):
            members = {
                "jpg": _image(30, 50, "JPEG", orientation),
                "0.png": _image(20, 9, "PNG", orientation),
                "txt": b"hi",
            }
            writer.write(f"{number}", members)
    write_manifest(tmp_path / "x.manifest", writer.shards)
    reader = SampleReader(Manifest.open(tmp_path / "x.manifest"), "x")
    transforms = {"kind": "native", "min_pixels": 64, "augment": AUGMENT}
    config = DatasetConfig.model_validate({"name": "x", "manifest": "x", "transforms": transforms})
    builder = DocumentBuilder(config, tokenizer, FREE)
    for index in range(3):
        plan = reader.read_without_images(index)
        assert not any(part.data for part in plan.parts if isinstance(part, ImagePart))
        built = builder(reader.read(index), np.random.default_rng(index))
        assert_measured(built, builder.dry_run(plan, np.random.default_rng(index)))


@pytest.mark.fault
def test_an_image_that_differs_from_its_index_is_refused(tokenizer: Tokenizer) -> None:
    config = DatasetConfig.model_validate({"name": "x", "manifest": "x", "template": {"kind": "interleaved"}})
    builder = DocumentBuilder(config, tokenizer, FIXED)
    data = _image(30, 50, "JPEG", 6)
    with pytest.raises(SampleError, match="an image of 30x50 pixels, the index says 50x30"):
        builder(Sample((ImagePart(data, "jpg", (30, 50)), TextPart("a")), {}))
    with pytest.raises(SampleError, match="no size for this image"):
        builder.dry_run(Sample((ImagePart(b"", "jpg", (0, 0)), TextPart("a")), {}))
