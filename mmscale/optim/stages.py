"""The stage program: what is trained, for how long, and how fast.

A run is a list of stages. Each stage trains some components of the model and freezes the others; between two stages
only weights are handed on (new optimizer state, new schedule), and model and data may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.optim.config import AdamWConfig, EmaConfig, OptimizerConfig

ALL = "all"
"""Stands for every component of the model."""
DEFAULT = "default"
"""Key of the value of components that are not named."""


Steps = Annotated[int, Field(ge=0)]
Norm = Annotated[float, Field(ge=0)]
_Value = TypeVar("_Value")


def _by_component(value: _Value | dict[str, _Value]) -> dict[str, _Value]:
    return value if isinstance(value, dict) else {DEFAULT: value}


def _check_names(names: tuple[str, ...], key: str) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{key}={list(names)} names a component twice")
    if ALL in names and len(names) > 1:
        raise ValueError(f"{key}={list(names)}: `{ALL}` stands alone")


class WeightsConfig(StrictConfig):
    """Weights from elsewhere, as far as they fit."""

    checkpoint: Path
    """A checkpoint folder (``RUN/checkpoints/step-N``), or a run folder: then its newest whole one."""
    components: tuple[str, ...] = Field(default=(ALL,), min_length=1)
    """Components that are taken; the others keep what they have. ``all`` alone takes every one."""
    ema: bool = False
    """Take the averages of the weights, where the checkpoint keeps them, instead of the weights."""

    @model_validator(mode="after")
    def _check(self) -> WeightsConfig:
        _check_names(self.components, "components")
        return self


class DistillConfig(StrictConfig):
    """A teacher: a frozen model whose predictions the stage's model follows (Hinton et al. 2015)."""

    checkpoint: Path
    """A checkpoint folder (``RUN/checkpoints/step-N``), or a run folder: then its newest whole one. Its vocabulary must
    be the student's, and it must take images as the student does."""
    weight: float = Field(default=1.0, gt=0, le=1)
    """Share of the loss that is the divergence from this teacher; what the weights of all teachers leave of 1 is the
    cross-entropy's."""
    temperature: float = Field(default=1.0, gt=0)
    """By which the logits of both are divided before the softmax; the loss is multiplied with its square."""
    ema: bool = False
    """Take the averages of its weights, where the checkpoint keeps them, instead of the weights."""


class StageConfig(StrictConfig):
    """One stage."""

    name: str = Field(min_length=1)
    """Name in logs and checkpoints."""
    steps: int = Field(ge=1)
    """Optimizer steps; the schedules are stretched over them."""
    train: tuple[str, ...] = Field(default=(ALL,), min_length=1)
    """Components that learn, of ``vision``, ``connector``, ``decoder``, ``extra_tokens``; or ``all`` alone. The rest is
    frozen."""
    learning_rate: dict[str, Annotated[float, Field(gt=0)]] = Field(default={DEFAULT: 1e-3})
    """Peak learning rate of each trained component; ``default`` serves those that are not named."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak after the warm-up."""
    warmup_steps: Steps | dict[str, Steps] = 0
    """Steps of linear rise to the peak, at most ``steps``: of all components, or of each; ``default`` serves those that
    are not named. The fall begins where a component's own rise ends."""
    min_learning_rate: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step as a share of the peak. Unused by ``constant``."""
    optimizer: OptimizerConfig = AdamWConfig()
    """How gradients become steps: ``adamw``, ``adafactor`` or ``muon``, each with its own fields."""
    ema: EmaConfig | None = None
    """Average of the trained weights beside them, from the weights that the stage begins with; None keeps none."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the square of the logits' log-normaliser, added to each token's loss (PaLM, OLMo, Molmo: 1e-4); 0 for
    none."""
    clip: Norm | dict[str, Norm] = 1.0
    """Largest gradient norm; larger gradients are scaled down to it, 0 switches that off. A number limits the norm of
    the whole gradient; names limit that of each component by itself, ``default`` that of those not named."""
    data: dict[str, Any] | None = None
    """Overrides of the ``data`` block during this stage, for example another mixture; None keeps it."""
    model: dict[str, Any] | None = None
    """Overrides of the ``model`` block from this stage on: unlike ``data``, a model that was changed stays so."""
    weights: tuple[WeightsConfig, ...] = ()
    """Taken in this order at the beginning of the stage, after the weights of the stage before."""
    distill: tuple[DistillConfig, ...] = ()
    """Teachers whose predictions are targets beside the data's tokens; none for the data alone."""

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        _check_names(self.train, "train")
        shares = [teacher.weight for teacher in self.distill]
        if math.fsum(shares) > 1 + 1e-9:
            raise ValueError(f"distill: the weights {shares} are shares of one loss, so they may sum to 1 at most")
        warmups = _by_component(self.warmup_steps)
        if max(warmups.values(), default=0) > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is longer than the stage (steps={self.steps})")
        named: dict[str, Mapping[str, float]] = {
            "learning_rate": self.learning_rate,
            "warmup_steps": warmups,
            "clip": _by_component(self.clip),
        }
        for key, values in named.items():
            unknown = set(values) - set(self.train) - {DEFAULT}
            if unknown and ALL not in self.train:
                raise ValueError(f"{key} names {sorted(unknown)}, which this stage does not train: {list(self.train)}")
            missing = [name for name in self.train if name not in values]
            if missing and DEFAULT not in values:
                raise ValueError(f"{key} has no value for {missing} and no `{DEFAULT}`")
        return self

    @property
    def named_components(self) -> set[str]:
        """Components that have a learning rate, a warm-up or a clipping norm of their own."""
        return {*self.learning_rate, *_by_component(self.warmup_steps), *_by_component(self.clip)} - {DEFAULT}

    @property
    def whole_clip(self) -> float:
        """Largest norm of the whole gradient; 0 for none, and where each component has its own."""
        return 0.0 if isinstance(self.clip, dict) else self.clip

    def component_clip(self, component: str) -> float:
        """Largest norm of the gradient of ``component`` by itself; 0 for none, and where the whole gradient has one."""
        return self.clip.get(component, self.clip.get(DEFAULT, 0.0)) if isinstance(self.clip, dict) else 0.0

    def peak_learning_rate(self, component: str) -> float:
        """Peak learning rate of ``component``."""
        return self.learning_rate.get(component, self.learning_rate.get(DEFAULT, 0.0))

    def stretched(self, steps: int) -> StageConfig:
        """The stage over another number of steps: warm-ups in proportion, so that the schedules keep their shape."""

        def part(warmup: int) -> int:
            return -(-warmup * steps // self.steps)

        old = self.warmup_steps
        new = part(old) if isinstance(old, int) else {name: part(warmup) for name, warmup in old.items()}
        return self.model_copy(update={"steps": steps, "warmup_steps": new})

    def warmup(self, component: str) -> int:
        """Warm-up of ``component``, steps."""
        warmups = _by_component(self.warmup_steps)
        return warmups.get(component, warmups.get(DEFAULT, 0))
