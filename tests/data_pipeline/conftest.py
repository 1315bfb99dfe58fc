"""A small synthetic mixture: captioned pictures, plain text, and interleaved pages of several pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter

Members = dict[str, bytes]


def picture(number: int, width: int = 20, height: int = 16, encoding: str = "PNG", mode: str = "RGB") -> bytes:
    """A random image that differs by number."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, mode).save(out, encoding)
    return out.getvalue()


def captioned(number: int) -> Members:
    """A picture with a name, a group and two captions."""
    fields = {"name": f"thing {number}", "group": "things", "captions": [f"thing {number}", "x" * (number % 23 + 1)]}
    return {"png": picture(number), "json": json.dumps(fields).encode()}


def plain_text(number: int) -> Members:
    """A text of uneven length."""
    return {"txt": ("word " * (number % 9 + 1)).strip().encode()}


def page(number: int) -> Members:
    """Two pictures in a row, text, a third picture, text."""
    parts = [{"image": "0.png"}, {"image": "1.png"}, {"text": f"two {number}"}, {"image": "2.jpg"}, {"text": "end"}]
    images = {"0.png": picture(number), "1.png": picture(number + 1), "2.jpg": picture(number, encoding="JPEG")}
    return {**images, "json": json.dumps({"parts": parts}).encode()}


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes."""
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


WriteSet = Callable[[str, Sequence[Members]], Path]


def set_writer(folder: Path) -> WriteSet:
    """Return a function that writes samples below ``folder`` as shards of at most 13, and returns the manifest."""

    def write(name: str, samples: Sequence[Members]) -> Path:
        with ShardWriter(folder / name, "part", max_samples=13) as writer:
            for number, members in enumerate(samples):
                writer.write(f"{number:06d}", members)
        manifest = folder / name / f"{name}.manifest"
        write_manifest(manifest, writer.shards)
        return manifest

    return write


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    return set_writer(tmp_path)


@pytest.fixture
def hybrid_spec() -> MediaSpec:
    """A tower of 16 px images in 8 px patches, thumbnail embedded and tiles attended."""
    return MediaSpec(Placement.HYBRID, patch_size=8, fixed_grid=(2, 2))


@pytest.fixture
def mixture_config(write_set: WriteSet, tokenizer_path: Path) -> DataConfig:
    return mixture(write_set, tokenizer_path)


def mixture(write_set: WriteSet, tokenizer_path: Path) -> DataConfig:
    """Three data sets of unlike kind, with augmentation and look-ahead."""
    augment = {"shift": 0.1, "scale": (0.8, 1.1), "flip": 0.5, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
    fixed = {"kind": "fixed", "augment": augment}
    sets = [
        ("captions", [captioned(i) for i in range(41)], 2.0, {"kind": "caption"}, fixed),
        ("text", [plain_text(i) for i in range(17)], 1.0, {"kind": "text"}, fixed),
        (
            "pages",
            [page(i) for i in range(11)],
            0.7,
            {"kind": "interleaved"},
            {
                "kind": "tiles",
                "tiling": {"kind": "internvl", "max_tiles": 3},
                "layout": {"start": "[", "end": "]", "tile": "{n}", "overview": "o", "spell": True},
            },
        ),
    ]
    datasets = [
        DatasetConfig.model_validate(
            {
                "name": name,
                "manifest": write_set(name, samples),
                "weight": weight,
                "template": template,
                "transforms": t,
            }
        )
        for name, samples, weight, template, t in sets
    ]
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "tokenizers", "path": tokenizer_path},
            "datasets": datasets,
            "lanes": 5,
            "packing": {"max_tokens": 90, "max_cost": 160, "look_ahead": 4},
            "order": {"block_size": 3, "window_blocks": 2},
        }
    )
