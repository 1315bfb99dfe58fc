"""With the imported mean and std, the tower sees the values of transformers' image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of, pixels
from mmscale.hf.read import PREPROCESSOR, read_config
from tests.hf.towers import images, saved_reference
from tests.models.reference_models import distance
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
SIDE = 28
SIZE = {"size": {"height": SIDE, "width": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "all on": STATISTICS,
    "not normalised": {**STATISTICS, "do_normalize": False},
    "not scaled": {"image_mean": [120.0, 110.0, 100.0], "image_std": [50.0, 60.0, 70.0], "do_rescale": False},
    "neither": {**STATISTICS, "do_normalize": False, "do_rescale": False},
    "another scale": {**STATISTICS, "rescale_factor": 1 / 127.5},
    "another scale, not normalised": {"rescale_factor": 1 / 127.5, "do_normalize": False},
    "grey images stay grey": {**STATISTICS, "do_convert_rgb": False},
    "a filter": {**STATISTICS, "resample": 2},
}


def keys_of(folder: Path) -> dict[str, Any]:
    """Return ``vision`` of the imported folder."""
    values = read_config(folder)
    config = layout_of(values["model_type"]).model_config(values, str(folder / "config.json"))
    assert config.vision is not None
    return config.vision.model_dump()


def normalised_pixels(vision: dict[str, Any], values: torch.Tensor) -> torch.Tensor:
    """Return pixels normalised as in the tower."""
    mean, std = (torch.tensor(vision[name])[:, None, None] for name in ("mean", "std"))
    return (values / 255 - mean) / std


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder without a processor for each tower."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("clip", "siglip")}
    for name, folder in found.items():
        saved_reference(name, folder)
    return found


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", PROCESSORS)
@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_the_tower_sees_what_the_processor_gives(
    family: str, case: str, nested: bool, folders: dict[str, Path], tmp_path: Path, parity: Recorder
) -> None:
    """Measured: 2.4e-7."""
    processor = getattr(transformers, f"{family}ImageProcessor")(**{**SIZE, **PROCESSORS[case]})
    folder = folders[family.lower()]
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    if nested:  # Format of version 5 for a processor with a tokenizer.
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.9] * 3, "image_std": [0.9] * 3}))
        whole = {"processor_class": f"{family}Processor", "image_processor": json.loads(processor.to_json_string())}
        (folder / "processor_config.json").write_text(json.dumps(whole))
    else:
        processor.save_pretrained(folder)
    picture = images(SIDE, count=1)[0]
    expected = processor(Image.fromarray(picture.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values[0]
    parity(
        family.lower(), "pixels of every setting", distance(normalised_pixels(keys_of(folder), picture), expected), 2e-6
    )
    found = pixels.transforms(read_config(folder), "config.json")
    assert found["interpolation"] == ("bilinear" if case == "a filter" else "bicubic")


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one whole number": ({"image_mean": 0, "image_std": 1}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    "one number": ({"image_mean": 0.5, "image_std": 0.25}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
    "whole numbers": ({"image_mean": [0, 0, 1], "image_std": [1, 1, 2]}, {"mean": (0, 0, 1), "std": (1, 1, 2)}),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two channels": ({**STATISTICS, "image_mean": [0.5, 0.5]}, "image_mean=.* must be a number or a list of 3 numbers"),
    "words": ({**STATISTICS, "image_std": ["a", "b", "c"]}, "image_std=.* must be a number or a list of 3 numbers"),
    "a deviation of nothing": ({**STATISTICS, "image_std": 0}, "image_std=0: every value must be above 0"),
    "no statistics": ({"do_resize": True}, "image_mean=None must be a number or a list of 3 numbers"),
    "no scale": ({**STATISTICS, "rescale_factor": 0.0}, "rescale_factor=0.0 must be above 0"),
    "a word for a switch": ({**STATISTICS, "do_normalize": "no"}, "do_normalize='no' must be of type bool"),
    "images as they are": ({**STATISTICS, "do_resize": False}, "do_resize=False is not supported"),
    "another filter": ({**STATISTICS, "resample": 0}, "resample=0 is not supported, only 1 .lanczos., 2"),
    "a smaller crop": (
        {**STATISTICS, "size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}},
        "crop_size=.* is not the size that images are resized to",
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_statistics(case: str, folders: dict[str, Path]) -> None:
    values, expected = FORMS[case]
    folder = folders["siglip"]
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    vision = keys_of(folder)
    assert {name: vision[name] for name in expected} == expected


@pytest.mark.parametrize("case", REFUSED)
def test_no_processor_key_is_ignored(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    values, message = REFUSED[case]
    folder = folders["clip"]
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    with pytest.raises(CheckpointError, match=message):
        import_folder(folder, tmp_path / "run")


def test_transforms_of_a_processor() -> None:
    def of(processor: Any) -> dict[str, Any]:
        return pixels.transforms({PREPROCESSOR: json.loads(processor.to_json_string())}, "config.json")

    clip = {"interpolation": "bicubic", "crop": "center"}
    assert of(transformers.CLIPImageProcessor()) == clip
    assert of(transformers.SiglipImageProcessor()) == {"interpolation": "bicubic"}
    assert of(transformers.MllamaImageProcessor()) == {"interpolation": "bilinear"}
    limits = {"min_pixels": 3136, "max_pixels": 12_845_056}
    assert of(transformers.Qwen2VLImageProcessor(**limits)) == {"interpolation": "bicubic", **limits}
    assert of(transformers.PixtralImageProcessor()) == {"interpolation": "bicubic"}
    assert of(transformers.FuyuImageProcessor()) == {"interpolation": "bilinear"}
    first = {"crop_size": 224, "do_center_crop": True, "do_resize": True, "resample": 3, "size": 224}  # As in 2022.
    assert pixels.transforms({PREPROCESSOR: first}, "config.json") == clip
    published = {"min_pixels": 3136, "max_pixels": 12_845_056, "resample": 3}  # As in 2024.
    assert pixels.transforms({PREPROCESSOR: published}, "config.json") == {"interpolation": "bicubic", **limits}


def test_the_way_back_keeps_one_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    """If the folder for ``--like`` has only ``processor_config.json``, an export writes no second processor."""
    folder = folders["siglip"]
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": STATISTICS}))
    report = import_folder(folder, tmp_path / "run")
    export_weights(Path(report.checkpoint), tmp_path / "back", to=HuggingFace(folder))
    assert [file.name for file in (tmp_path / "back").glob("*processor_config.json")] == ["processor_config.json"]
    assert "preprocessor_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": 0, "image_std": 1}}))
    with pytest.raises(CheckpointError, match="its image processor normalises pixels with"):
        export_weights(Path(report.checkpoint), tmp_path / "other", to=HuggingFace(folder))
