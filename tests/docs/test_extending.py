"""The pages of docs/extending, each followed in a copy of the code: the files that the page names, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted((REPO / "docs" / "extending").glob("*.md"))
PACKAGES = ("mmscale", "data_pipeline")
_FILE = re.compile(r"^`([^`\n]+\.py)`, (new|changed):\n", re.MULTILINE)
_BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"\A# [^\n]+\n\n```console\n\$ python ([^\n]+)\n([^\n]+)\n```\n")


def follow(page: str, copy: Path) -> list[str]:
    """Write and change the files of a page; return their names.

    Raises:
        AssertionError: a new file exists already, or a change does not fit its file.
    """
    found = list(_FILE.finditer(page))
    ends = [match.start() for match in found[1:]] + [len(page)]
    for match, end in zip(found, ends, strict=True):
        path, blocks = copy / match[1], _BLOCK.findall(page, match.end(), end)
        if match[2] == "new":
            ((language, code),) = blocks
            assert language == "python"
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
            assert text.count(before) == 1, f"{match[1]} has not once:\n{before}"
            path.write_text(text.replace(before, after))
    return [match[1] for match in found]


_SLOW = {"objective"}
"""Pages whose command trains a step of a run."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in _SLOW else []) for path in PAGES],
)
def test_the_page_works_in_at_most_three_files(path: Path, tmp_path: Path) -> None:
    page = path.read_text()
    for package in PACKAGES:
        shutil.copytree(REPO / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(REPO / folder)
    names = follow(page, tmp_path)
    production = [name for name in names if name.startswith(PACKAGES)]
    assert 1 <= len(production) <= 3
    assert len(names) == len(production) + 1
    command = _COMMAND.match(page)
    assert command is not None, "a page begins with the command that shows the result"
    done = subprocess.run(
        [sys.executable, *command[1].split(), "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert command[2] in done.stdout
    first_party = 'lint.isort.known-first-party = ["data_pipeline", "mmscale", "tests"]'
    for words in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *words, "--config", str(REPO / "pyproject.toml"), "--config", first_party]
        ruff += names
        checked = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text()):
        assert (path.parent / target).exists(), target
