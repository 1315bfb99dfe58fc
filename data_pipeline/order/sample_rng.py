"""Randomness of single samples: a pure function of seed, sample and epoch, wherever and whenever the sample is read.

Not for: the order of samples (``lanes``).
"""

from __future__ import annotations

from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from data_pipeline.order.lanes import Place, mix


class Draws(Protocol):
    """What templates and augmentation draw from; a ``numpy.random.Generator`` is one."""

    @overload
    def random(self) -> float: ...

    @overload
    def random(self, size: int) -> npt.NDArray[np.float64]: ...

    def random(self, size: int | None = None) -> Any:
        """Uniform in [0, 1)."""

    def permutation(self, x: int) -> npt.NDArray[np.int64]:
        """The numbers below ``x`` in random order."""


class SampleDraws:
    """Draws of one sample in one epoch. Most samples draw nothing, so the generator is made when it is asked for.

    Args:
        seed: ``lane_stream.dataset_seed``.
        place: Sample and epoch.
    """

    __slots__ = ("_generator", "_place", "_seed")

    def __init__(self, seed: int, place: Place) -> None:
        self._seed, self._place = seed, place
        self._generator: np.random.Generator | None = None

    @property
    def generator(self) -> np.random.Generator:
        """The generator of all draws."""
        if self._generator is None:
            words = _Words(self._seed, self._place)
            self._generator = np.random.Generator(np.random.PCG64(words))  # type: ignore[arg-type]  # Stubs lack the interface.
        return self._generator

    @overload
    def random(self) -> float: ...

    @overload
    def random(self, size: int) -> npt.NDArray[np.float64]: ...

    def random(self, size: int | None = None) -> Any:
        """Uniform in [0, 1)."""
        return self.generator.random(size)

    def permutation(self, x: int) -> npt.NDArray[np.int64]:
        """The numbers below ``x`` in random order."""
        return self.generator.permutation(x)


class _Words(ISeedSequence):
    """The 256 bits that start a PCG64. ``SeedSequence`` would ask the system for entropy each time, a slow call."""

    def __init__(self, seed: int, place: Place) -> None:
        self._start = mix(mix(mix(seed) ^ place.sample) ^ place.epoch)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        """Words of a counter through the hash."""
        return np.array([mix((self._start + i) & (2**64 - 1)) for i in range(n_words)], dtype=np.uint64).astype(dtype)
