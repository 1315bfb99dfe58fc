"""docs/add-a-model.md, followed to the letter in a copy of the code: two files of the page, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "add-a-model.md").read_text()
MODEL, LAYOUT = "configs/models/internvl3-1b.yaml", "mmscale/hf/layouts/internvl.py"

pytestmark = pytest.mark.parity


def block(language: str, number: int) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[number]


def shown(command: str) -> str:
    """What the page says that a command prints."""
    (console,) = re.findall(rf"^\$ {re.escape(command)}\n((?:[^$`].*\n)*)", PAGE, re.MULTILINE)
    return str(console)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code with the files of the page."""
    folder = tmp_path_factory.mktemp("added")
    shutil.copytree(REPO / "mmscale", folder / "mmscale", ignore=shutil.ignore_patterns("__pycache__"))
    added = {MODEL: block("yaml", 0), LAYOUT: block("python", 0), "prove.py": block("python", 1)}
    for name, text in added.items():
        assert f"`{name}`" in PAGE
        assert not (REPO / name).exists()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(copy: Path, *words: str) -> str:
    path = os.pathsep.join([str(copy), str(REPO)])  # The copy first: it has a family more.
    done = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_count_is_that_of_the_page_and_of_the_reference(copy: Path) -> None:
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    said = shown(f"mmscale params {MODEL}")
    assert run(copy, "-m", "mmscale.cli.main", "params", MODEL) == said
    text = Qwen2Config(
        vocab_size=151674,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    with torch.device("meta"):  # InternVLVisionConfig's defaults are InternViT-300M's, save for biases.
        vision = InternVLVisionConfig(attention_bias=True)
        config = InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        theirs = InternVLForConditionalGeneration(config)
    assert f"{sum(parameter.numel() for parameter in theirs.parameters()):,}" in said


def test_its_weights_come_and_go(copy: Path, tmp_path: Path) -> None:
    """The proof prints what the page says, up to the last digit of a rounding error; then the page's two commands."""
    printed = run(copy, "prove.py", str(tmp_path))
    wanted = shown("PYTHONPATH=. python prove.py runs/add-a-model")
    number = r"logits \S+"
    assert re.sub(number, "", printed) == re.sub(number, "", wanted)
    for command in re.findall(r"^\$ mmscale (checkpoint .*)$", PAGE, re.MULTILINE):
        words = command.replace("$THEIRS", str(tmp_path / "theirs")).replace("runs/add-a-model", str(tmp_path)).split()
        run(copy, "-m", "mmscale.cli.main", *words)
    assert (tmp_path / "exported" / "config.json").exists()


def test_the_code_of_the_page_is_clean(copy: Path) -> None:
    for words in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *words, "--config", str(REPO / "pyproject.toml"), str(copy / LAYOUT)]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
