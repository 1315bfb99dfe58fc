"""Fixtures of the tests of bad steps."""

from tests.checkpoint.conftest import no_sync

__all__ = ["no_sync"]
