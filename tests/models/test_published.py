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
    "fuyu-8b": 9_408_238_592,
    "clip-vit-l-14-336": 303_507_456,
    "clip-vit-h-14": 630_766_080,
    "siglip-so400m": 412_987_248,  # Without the pooling head of 15,238,352, which features do not pass.
    "siglip-l-16-384": 303_688_704,  # The same, 12,595,200.
    "internvit-6b": 5_536_496_000,
}
NOMINAL = {  # Their sizes were not published: models of the published form, near the published number.
    "mm1.5-1b": (997_853_760, 1e9),
    "mm1.5-3b": (2_967_440_448, 3e9),
    "mm1.5-7b": (7_014_788_672, 7e9),
    "mm1.5-30b": (30_601_908_800, 30e9),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_number_of_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", str(FOLDER / f"{name}.yaml"), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["total"] == counted["active"] == COUNTS[name]


@pytest.mark.parametrize("name", NOMINAL)
def test_models_of_unpublished_widths_are_near_their_nominal_size_and_say_so(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FOLDER / f"{name}.yaml"
    assert main(["params", str(path), "--json"]) == 0
    total, nominal = NOMINAL[name]
    assert json.loads(capsys.readouterr().out)["total"] == total
    assert total == pytest.approx(nominal, rel=0.05)
    text = path.read_text()
    assert f": {total:,} parameters" in text
    decoder = text[text.index("decoder:") : text.index("vision:")].splitlines()[1:]
    assert decoder
    assert all(line.endswith("# unknown: not published, our choice") for line in decoder)


def test_every_published_configuration_has_a_number() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*COUNTS, *NOMINAL, "tiny"}
