"""Runners whose loaders end after each epoch and keep a state as torchdata's StatefulDataLoader does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def batches(loader: Any) -> Iterator[int]:
    """Samples of each batch."""
    while True:
        for images, _ in loader:
            yield len(images)


def state_at(loader: Any, num_samples: int) -> Any:
    """The state that it gives after so many samples."""
    seen = 0
    for images, _ in loader:
        seen += len(images)
        if seen >= num_samples:
            return loader.state_dict()
    raise ValueError(f"the epoch ended after {seen} samples, {num_samples} wanted")


def resume(loader: Any, state: Any) -> None:
    """The first batch behind the state."""
    loader.load_state_dict(state)
    next(iter(loader))
