"""Sum the loads of experts over windows of steps: metrics of each window, and the newest loads in ``router.json``.

    StepReport.router --every step--> RouterLog --step N, 2 N, ...--> router/... in the step's line of metrics.jsonl
                                                                 --> RUN/router.json, the loads by expert

A window has ``metrics.router_every`` steps: in a small step, experts have no token by chance. Checkpoints contain the
window so far, so a resumed run gets the same values as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.io.retry import explain_io
from data_pipeline.io.strict import StrictConfig, first_fault
from data_pipeline.io.untrusted import parse_json, read_json
from mmscale.dist import World
from mmscale.engine.graph import RouterSums
from mmscale.errors import MMScaleError

ROUTER_FILE = "router.json"
_KEY = "router_window"
TEXT_AND_IMAGE = ("text", "image")
_Count = Annotated[int, Field(ge=0)]
Column = npt.NDArray[np.float64]


class _Record(StrictConfig):
    """A ``RouterWindow`` as JSON."""

    first: int = Field(ge=1)
    last: int = Field(ge=1)
    blocks: tuple[_Count, ...] = Field(min_length=1)
    tokens: tuple[tuple[_Count, ...], ...]
    entropy: tuple[tuple[float, ...], ...]
    load: tuple[tuple[tuple[_Count, ...], ...], ...]
    dropped: tuple[_Count, ...]
    kinds: tuple[str, ...] = Field(default=TEXT_AND_IMAGE, min_length=2)


@dataclass(frozen=True)
class RouterWindow:
    """Choices of the routers, summed over the tokens of some consecutive steps on all ranks.

    The second dimension of arrays is the K kinds of tokens. L is the number of blocks with experts.

    Attributes:
        first, last: First and last step, both included.
        blocks: 0-based number in the decoder of each block with experts.
        tokens: int64 ``(L, K)``, number of tokens.
        entropy: float64 ``(L, K)``, sum of the entropies of the tokens' probabilities, in nats.
        load: int64 ``(L, K, E)``, number of times that tokens chose each expert.
        dropped: int64 ``(L,)``, number of choices that no expert computed because of ``capacity_factor``.
        kinds: Names of the kinds of tokens: text, image, and the further modalities of the model.
    """

    first: int
    last: int
    blocks: tuple[int, ...]
    tokens: npt.NDArray[np.int64]
    entropy: Column
    load: npt.NDArray[np.int64]
    dropped: npt.NDArray[np.int64]
    kinds: tuple[str, ...] = TEXT_AND_IMAGE

    def max_over_mean(self) -> Column:
        """Return the largest load of an expert, divided by the mean load, of each block; NaN without a token."""
        return max_over_mean(self.load.sum(1))

    def mean_entropy(self) -> Column:
        """Return the mean entropy of a token in nats, of each block; NaN without a token."""
        return _quotient(self.entropy.sum(1), self.tokens.sum(1))

    def dead(self) -> npt.NDArray[np.int64]:
        """Return the number of experts that no token chose, of each block."""
        return (self.load.sum(1) == 0).sum(1)

    def modality_distance(self) -> Column:
        """Return the distance of the loads of text and of all other tokens, of each block; NaN without one of both.

        The distance is half the sum over experts of the difference of the shares: 0 if both kinds of tokens use the
        experts equally, 1 if they share no expert (total variation distance).
        """
        load = np.stack([self.load[:, 0], self.load[:, 1:].sum(1)], axis=1)
        shares = _quotient(load, load.sum(2, keepdims=True))
        distance: Column = np.abs(shares[:, 0] - shares[:, 1]).sum(1) / 2
        return distance

    def metrics(self) -> dict[str, float]:
        """Return ``router/max_over_mean`` (of the worst block), ``router/dead`` (of all blocks), and those of blocks.

        ``router/BLOCK/modality_distance`` is absent unless there are text and other tokens, and the share of dropped
        choices, ``router/dropped`` and ``router/BLOCK/dropped``, unless there are some. Without a token, there are no
        metrics.
        """
        if not self.tokens.any():
            return {}
        ratio, dead = self.max_over_mean(), self.dead()
        found = {"router/max_over_mean": float(np.nanmax(ratio)), "router/dead": int(dead.sum())}
        rows = zip(self.blocks, ratio, self.mean_entropy(), dead, self.modality_distance(), strict=True)
        for block, most, entropy, none, distance in rows:
            found[f"router/{block}/max_over_mean"] = float(most)
            found[f"router/{block}/entropy"] = float(entropy)
            found[f"router/{block}/dead"] = int(none)
            if not np.isnan(distance):
                found[f"router/{block}/modality_distance"] = float(distance)
        if self.dropped.any():
            choices = self.load.sum((1, 2))
            found["router/dropped"] = float(self.dropped.sum() / choices.sum())
            shares = _quotient(self.dropped, choices).tolist()
            found |= {f"router/{block}/dropped": share for block, share in zip(self.blocks, shares, strict=True)}
        return found

    def to_json(self) -> str:
        """Return the window as JSON, with the names of the attributes."""
        arrays = {name: getattr(self, name).tolist() for name in ("tokens", "entropy", "load", "dropped")}
        return _Record(
            first=self.first, last=self.last, blocks=self.blocks, kinds=self.kinds, **arrays
        ).model_dump_json()

    @classmethod
    def from_record(cls, value: Any) -> RouterWindow:
        """Return the window of a parsed ``to_json``.

        Raises:
            ValueError: a value is missing or wrong, or the sizes differ.
        """
        record = _Record.model_validate(value)
        if list(record.blocks) != sorted(set(record.blocks)):
            raise ValueError("blocks: expected ascending numbers")
        length, kinds = len(record.blocks), len(record.kinds)
        if any(len(rows) != kinds for rows in record.load):
            raise ValueError(f"load: expected {kinds} rows, one for each of kinds, in every block")
        experts = len(record.load[0][0]) if record.load else 0
        tokens, entropy = np.array(record.tokens, np.int64), np.array(record.entropy, np.float64)
        load = np.array(record.load, np.int64) if experts else np.zeros(0, np.int64)
        dropped = np.array(record.dropped, np.int64)
        shapes = (tokens.shape, entropy.shape, load.shape, dropped.shape)
        if shapes != ((length, kinds), (length, kinds), (length, kinds, experts), (length,)):
            raise ValueError(f"tokens, entropy, load and dropped do not fit {length} blocks of {experts} experts")
        return cls(record.first, record.last, record.blocks, tokens, entropy, load, dropped, record.kinds)


def max_over_mean(load: npt.NDArray[np.int64]) -> Column:
    """Return the largest value of the last dimension, divided by the mean; NaN if all are 0."""
    return _quotient(load.max(-1), load.mean(-1))


def _quotient(above: npt.NDArray[Any], below: npt.NDArray[Any]) -> Column:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)


def read_router(run_dir: Path) -> RouterWindow | None:
    """Return the content of ``router.json``; None if there is no such file.

    Raises:
        MMScaleError: the file cannot be read, or is damaged.
    """
    path = run_dir / ROUTER_FILE
    if not path.exists():
        return None
    value = None
    try:
        value = read_json(path)
        return RouterWindow.from_record(value)
    except ValidationError as error:
        raise MMScaleError(f"{path} is damaged: {first_fault(error, value)}") from error
    except (OSError, ValueError) as error:
        raise MMScaleError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


class RouterLog:
    """Sums the routers' choices over a window, and writes ``router.json`` on rank 0. All ranks must create one.

    ``router.json`` has the last whole window. Before the first one is complete, it has the steps up to the last
    checkpoint.

    Args:
        run_dir: The run folder.
        every: ``metrics.router_every``; None for no sums and no file.
        world: This rank.
        step: Finished steps. If ``router.json`` contains later ones, it is removed, since they are repeated.
        extra: ``TrainState.extra`` of the run.

    Raises:
        MMScaleError: the file cannot be removed.
    """

    def __init__(self, run_dir: Path, every: int | None, world: World, step: int, extra: Mapping[str, Any]) -> None:
        self._path, self._every, self._is_main = run_dir / ROUTER_FILE, every, world.is_main
        saved = extra.get(_KEY)
        self._window = None if saved is None else RouterWindow.from_record(parse_json(saved))
        self._has_whole = False
        if self._is_main:
            self._open(step)

    def step(self, step: int, sums: RouterSums | None, model: Any) -> dict[str, float]:
        """Add a step. Return ``RouterWindow.metrics`` if it is the last one of its window, else nothing.

        Args:
            step: Number of the step, from 1.
            sums: ``StepReport.router``; None if the step had no token, or the model has no experts.
            model: The model of the step.

        Raises:
            MMScaleError: the file cannot be written.
        """
        if self._every is None:
            return {}
        if self._window is not None and ((step - 1) % self._every == 0 or self._window.last != step - 1):
            self._window = None
        if sums is not None and bool(sums.entropy.isfinite().all()):  # After NaN weights a window would stay NaN.
            self._add(step, sums, model)
        if self._window is None:
            return {}
        self._window = replace(self._window, last=step)
        if step % self._every:
            return {}
        self._write()
        self._has_whole = True
        return self._window.metrics()

    def write(self) -> None:
        """Write ``router.json`` if it has no whole window. Call it before each checkpoint.

        Raises:
            MMScaleError: the file cannot be written.
        """
        if not self._has_whole:
            self._write()

    def extra_state(self) -> dict[str, Any]:
        """Return the entry of ``TrainState.extra`` that a resume needs to continue the window."""
        return {} if self._window is None else {_KEY: self._window.to_json()}

    def _open(self, step: int) -> None:
        try:
            written = read_router(self._path.parent)
        except MMScaleError:
            written = None  # It is replaced.
        if written is not None and written.last <= step:
            self._has_whole = self._every is not None and written.last % self._every == 0
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise MMScaleError(f"{self._path}: cannot be removed: {error.strerror}") from error

    def _add(self, step: int, sums: RouterSums, model: Any) -> None:
        load, entropy, dropped = sums.load.numpy(), sums.entropy.double().numpy(), sums.dropped.numpy()
        decoder = model.config.decoder
        blocks = tuple(number for number, mlp in enumerate(decoder.block_mlps()) if mlp.has_experts)
        tokens = load.sum(2) // decoder.mlp.experts_per_token
        window, kinds = self._window, (*TEXT_AND_IMAGE, *model.config.modalities)
        if window is None or (window.blocks, window.kinds) != (blocks, kinds) or window.load.shape != load.shape:
            self._window = RouterWindow(step, step, blocks, tokens, entropy, load, dropped, kinds)
            return
        self._window = replace(
            window,
            tokens=window.tokens + tokens,
            entropy=window.entropy + entropy,
            load=window.load + load,
            dropped=window.dropped + dropped,
        )

    def _write(self) -> None:
        if self._is_main and self._window is not None:
            try:
                write_whole(self._path, as_utf8(self._window.to_json() + "\n"))
            except OSError as error:
                raise MMScaleError(f"{self._path}: cannot be written: {explain_io(error)}") from error
