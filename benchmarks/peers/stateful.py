"""Shared code of loaders that end after each epoch and have the state API of torchdata's StatefulDataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def batches(loader: Any) -> Iterator[int]:
    """Yield the number of samples of each batch."""
    while True:
        for images, _ in loader:
            yield len(images)


def state_at(loader: Any, num_samples: int) -> Any:
    """Return the state after ``num_samples`` samples."""
    seen = 0
    for images, _ in loader:
        seen += len(images)
        if seen >= num_samples:
            return loader.state_dict()
    raise ValueError(f"the epoch ended after {seen} samples, {num_samples} wanted")


def resume(loader: Any, state: Any) -> None:
    """Resume and read the first batch after the state."""
    loader.load_state_dict(state)
    next(iter(loader))
