"""A folder in the state after `make quickstart`, and a shell that runs blocks of the pages."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.engine.fork_server import Commands

REPO = Path(__file__).resolve().parents[2]
ACTIVATE = "source .venv/bin/activate"
_NOT_LINKED = {".git", ".venv", "runs"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return the repository in a path with blanks and umlauts, with an empty ``runs`` and this Python as ``.venv``."""
    folder = tmp_path / "my models, größer"
    for path in REPO.iterdir():
        if path.name not in _NOT_LINKED:
            (folder / path.name).parent.mkdir(exist_ok=True)
            (folder / path.name).symlink_to(path)
    (folder / "runs").mkdir()
    activate = folder / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n")
    return folder


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    process = Commands(tmp_path_factory.mktemp("commands"))
    yield process
    process.close()


@pytest.fixture
def quick_checkout(checkout: Path, commands: Commands) -> Path:
    """Return the same with an ``mmscale`` that forks from a process with all imports done."""
    scripts = checkout / ".venv/bin"
    commands.write_client(scripts / "mmscale")
    with (scripts / "activate").open("a") as file:
        file.write(f"export PATH={shlex.quote(str(scripts))}:$PATH\n")
    return checkout


def paste(block: str, checkout: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a block in a new shell in ``checkout``: ``mmscale`` is not on its PATH and ``RUN`` is not set.

    Raises:
        AssertionError: a command of the block failed.
    """
    scripts = str(Path(sys.executable).parent)
    path = [entry for entry in os.environ["PATH"].split(os.pathsep) if entry != scripts]
    inherited = {name: value for name, value in os.environ.items() if name not in ("RUN", "VIRTUAL_ENV")}
    text = block if ACTIVATE in block else f"{ACTIVATE}\n{block}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=checkout,
        env={**inherited, **(environment or {}), "PATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n--- exit code {done.returncode}, output:\n{done.stdout}"
