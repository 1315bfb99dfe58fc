"""A comparison of tiny models. Tests run in the repository's root, because manifests are relative to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmscale.compare import Comparison, read_comparison

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "tests/compare/tiny.yaml"

Read = Callable[..., Comparison]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return ``read(*words)``, which reads the tiny comparison with overrides and a run_dir in ``tmp_path``."""

    def tiny(*words: str) -> Comparison:
        return read_comparison(TINY, [f"run_dir={tmp_path / 'runs'}", *words])

    return tiny
