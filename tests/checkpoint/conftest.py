"""Fixtures of the tests of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def no_sync() -> Iterator[None]:
    """Skip every fsync in tests that write hundreds of checkpoints and cut no power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
