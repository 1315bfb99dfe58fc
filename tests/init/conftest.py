"""A tiny model in the form of a published one, imported; and small data sets in a folder with blanks and umlauts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmscale.run.imported import import_run

REPO = Path(__file__).resolve().parents[2]
NAMES = ("rot", "grün", "blau", "gelb")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with blanks and umlauts in its path."""
    folder = tmp_path / "erster Tag, größer"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (48 + 8 * (number % 3), 40), (number % 256, 50 * (number % 4), 100))


def pictures(folder: Path, count: int = 24) -> list[str]:
    """Write images, and return their names."""
    folder.mkdir(parents=True)
    for number in range(count):
        picture(number).save(folder / f"bild {number:02d}.png")
    return [f"bild {number:02d}.png" for number in range(count)]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that ``examples/tiny_hf_model.py`` writes."""
    folder = tmp_path_factory.mktemp("published") / "tiny vl"
    example = load_example()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tiny_hf_model.py", str(folder)])
        example.main()
    return folder


@pytest.fixture(scope="session")
def imported(published: Path) -> Path:
    """Return a run folder with the imported model."""
    run = published.parent / "importiert"
    assert import_run(published, run).is_whole
    return run


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_hf_model", REPO / "examples/tiny_hf_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
