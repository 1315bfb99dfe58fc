"""The software of this process: versions of packages, digests of mmscale's source files, the git commit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_pipeline.io.checksums import sha256_of

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the packages in ``PACKAGES``: a checkout, or ``site-packages``."""
PACKAGES = ("data_pipeline", "mmscale")
_LIBRARIES = ("deepspeed", "numpy", "sentencepiece", "tokenizers", "torch", "torchvision")
"""Libraries whose version may change numbers, token ids or communication."""
_GIT_SECONDS = 10.0


def versions() -> dict[str, str]:
    """Return the versions of mmscale, Python and ``_LIBRARIES``; ``none`` for a library that is not installed."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"mmscale": _version("mmscale"), "python": python, **{name: _version(name) for name in _LIBRARIES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def source_files() -> dict[str, str]:
    """Return the sha256 of each Python file in ``PACKAGES``, by its path below ``ROOT``. 500 files take about 20 ms."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): sha256_of(path) for path in paths}


def source_digest() -> str:
    """Return one sha256 over names and contents of all Python files in ``PACKAGES``."""
    return hashlib.sha256(repr(sorted(source_files().items())).encode()).hexdigest()


def git_commit() -> tuple[str, bool] | None:
    """Return the git commit of the packages in ``PACKAGES``, and whether their tracked files differ from it.

    Returns:
        None if git does not track the packages, or is not installed.
    """
    if _git("ls-files", "--error-unmatch", "mmscale/__init__.py") is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return None if commit is None else (commit, _git("diff", "--quiet", "HEAD", "--", *PACKAGES) is None)


def _git(*words: str) -> str | None:
    """Return the output of a git command in ``ROOT``, without white space at the ends; None if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
