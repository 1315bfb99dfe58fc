"""Configurations of published models count what was published, to the last parameter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli.main import main

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "models"
COUNTS = {  # Counted in the reference implementations (transformers; Molmo's own code for OLMo-7B-1024).
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "olmo-7b-1024": 7_298_617_344,
    "mistral-nemo-12b": 12_247_782_400,
    "llama3.2-11b-vision": 10_670_220_835,
    "llama3.2-11b-vision-448": 10_642_941_475,
    "llama3.2-90b-vision": 88_593_355_323,
    "llama3.2-90b-vision-448": 88_566_075_963,
    "fuyu-8b": 9_408_238_592,
    "clip-vit-l-14-336": 303_507_456,
    "clip-vit-h-14": 630_766_080,
    "siglip-so400m": 412_987_248,  # Without the pooling head of 15,238,352, which features do not pass.
    "siglip-l-16-384": 303_688_704,  # The same, 12,595,200.
    "internvit-6b": 5_536_496_000,
}
SPLITS = {  # Vision; projector and cross-attention; text without and with the rows for images.
    "llama3.2-11b-vision": (863_567_379, 31_461_376 + 1_744_898_064, 8_030_294_016 - 8 * 4096, 8 * 4096),
    "llama3.2-11b-vision-448": (836_288_019, 31_461_376 + 1_744_898_064, 8_030_294_016 - 8 * 4096, 8 * 4096),
    "llama3.2-90b-vision": (863_567_379, 62_922_752 + 17_113_093_160, 70_553_772_032 - 8 * 8192, 8 * 8192),
    "llama3.2-90b-vision-448": (836_288_019, 62_922_752 + 17_113_093_160, 70_553_772_032 - 8 * 8192, 8 * 8192),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_number_of_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", str(FOLDER / f"{name}.yaml"), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["total"] == counted["active"] == COUNTS[name]
    if name in SPLITS:
        parts = ("vision", "connector", "decoder", "extra_tokens")
        assert tuple(counted["components"][part] for part in parts) == SPLITS[name]


def test_every_published_configuration_has_a_number() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*COUNTS, "tiny"}
