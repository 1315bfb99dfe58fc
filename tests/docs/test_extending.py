"""docs/extending.md: each section is followed in a copy of the code, with the files that it names and no others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("mmscale", "data_pipeline")
SECTIONS = dict(
    re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", (REPO / "docs/extending.md").read_text(), re.MULTILINE | re.DOTALL)
)
PARTS = ("Projector", "Connector", "Vision tower", "Objective", "Template", "Source format")
SLOW = ("Objective",)
"""Parts whose test trains a step of a run."""
MODEL = "Published model"
OWN = "Your own package"
MODEL_YAML, LAYOUT = "configs/models/vip-llava-7b.yaml", "mmscale/hf/layouts/vipllava.py"

_FILE = re.compile(r"^`([^`\n]+)`, (new|changed):\n", re.MULTILINE)
_BLOCK = re.compile(r"^```(python|yaml|diff)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def copy_packages(folder: Path, *packages: str) -> None:
    """Copy packages with their compiled modules, which stay valid: each source keeps its time."""
    for package in packages:
        # Python writes a compiled module under a temporary name first.
        shutil.copytree(REPO / package, folder / package, ignore=shutil.ignore_patterns("*.pyc.*"))


def follow(section: str, copy: Path) -> list[str]:
    """Write and change the files of a section; return their names.

    Raises:
        AssertionError: a new file exists already, or a change does not fit its file.
    """
    found = list(_FILE.finditer(section))
    ends = [match.start() for match in found[1:]] + [len(section)]
    for match, end in zip(found, ends, strict=True):
        path, blocks = copy / match[1], _BLOCK.findall(section, match.end(), end)
        if match[2] == "new":
            ((language, code),) = blocks
            assert language != "diff"
            assert not (REPO / match[1]).exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
            continue
        assert blocks
        for language, hunk in blocks:
            assert language == "diff"
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] != "+")
            after = "".join(line[1:] for line in lines if line[0] != "-")
            text = path.read_text()
            assert text.count(before) == 1, f"{match[1]} must contain this exactly once:\n{before}"
            path.write_text(text.replace(before, after))
    return [match[1] for match in found]


def run(copy: Path, *words: str) -> str:
    """Run Python in the copy and return its output. Modules of the copy hide those of the repository."""
    # With accelerate, transformers imports DeepSpeed, which prints its choice of a device unless one is set.
    quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(REPO)]), **quiet},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lint(copy: Path, *files: str) -> None:
    first_party = 'lint.isort.known-first-party = ["data_pipeline", "mmscale", "tests"]'
    for words in (["check"], ["format", "--check"]):
        run(copy, "-m", "ruff", *words, "--config", str(REPO / "pyproject.toml"), "--config", first_party, *files)


def test_every_section_with_code_is_followed() -> None:
    with_code = {name for name, section in SECTIONS.items() if _FILE.search(section) or _BLOCK.search(section)}
    assert with_code == {*PARTS, MODEL, OWN}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PARTS]
)
def test_the_section_works_in_at_most_three_files(name: str, tmp_path: Path) -> None:
    copy_packages(tmp_path, *PACKAGES)
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(REPO / folder)
    *production, test = follow(SECTIONS[name], tmp_path)
    assert all(file.startswith(PACKAGES) for file in production)
    assert 1 <= len(production) <= 3
    assert test.startswith("tests/")
    assert " passed" in run(tmp_path, "-m", "pytest", "-q", test, "-p", "no:cacheprovider")
    lint(tmp_path, *production, test)


def printed(command: str) -> str:
    """The output that the section of the published model shows for a command."""
    (console,) = re.findall(rf"^\$ {re.escape(command)}\n((?:[^$`].*\n)*)", SECTIONS[MODEL], re.MULTILINE)
    return str(console)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code with the files of the published model."""
    folder = tmp_path_factory.mktemp("added")
    copy_packages(folder, "mmscale")
    assert follow(SECTIONS[MODEL], folder) == [MODEL_YAML, LAYOUT, "prove.py"]
    return folder


@pytest.mark.parity
def test_the_parameter_count_is_that_of_the_page_and_of_the_reference(copy: Path) -> None:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    shown = printed(f"mmscale params {MODEL_YAML}")
    assert run(copy, "-m", "mmscale.cli.main", "params", MODEL_YAML) == shown
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):  # LlamaConfig's defaults are Llama 7B's, except for the vocabulary.
        config = VipLlavaConfig(text_config=LlamaConfig(vocab_size=32064), vision_config=tower)
        reference = VipLlavaForConditionalGeneration(config)
    assert f"{sum(parameter.numel() for parameter in reference.parameters()):,}" in shown


@pytest.mark.parity
@pytest.mark.slow
def test_the_weights_are_imported_and_exported(copy: Path, tmp_path: Path) -> None:
    """The proof prints the page's lines, except for the rounding error; then the page's two commands work."""
    output = run(copy, "prove.py", str(tmp_path))
    expected = printed("PYTHONPATH=. python prove.py runs/add-a-model")
    number = r"logits \S+"
    assert re.sub(number, "", output) == re.sub(number, "", expected)
    for command in re.findall(r"^\$ mmscale (checkpoint .*)$", SECTIONS[MODEL], re.MULTILINE):
        words = command.replace("$THEIRS", str(tmp_path / "theirs")).replace("runs/add-a-model", str(tmp_path)).split()
        run(copy, "-m", "mmscale.cli.main", *words)
    assert (tmp_path / "exported" / "config.json").exists()


@pytest.mark.parity
def test_the_layout_passes_the_linter(copy: Path) -> None:
    lint(copy, LAYOUT)
