"""Configuration of the stages of a run: which components to train, for how many steps, at which learning rates.

A run is a list of stages. Each stage trains some components of the model and freezes the others. A stage begins with
the weights of the previous one, but its optimizer state, schedule and moving average start anew. A stage may change
the model and the data. If the data block and the model's ``MediaSpec`` are unchanged, the stage continues the data
where the previous one stopped; otherwise, it starts at the beginning of its data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.objectives.base import OwnObjective
from mmscale.objectives.reconstruction import ReconstructionConfig
from mmscale.optim.config import AdamWConfig, EmaConfig, OptimizerConfig

ALL = "all"
"""Name for every component of the model."""
DEFAULT = "default"
"""Key of the value for components without a key of their own."""


Steps = Annotated[int, Field(ge=0)]
Norm = Annotated[float, Field(ge=0)]
_Value = TypeVar("_Value")


def _by_component(value: _Value | dict[str, _Value]) -> dict[str, _Value]:
    return value if isinstance(value, dict) else {DEFAULT: value}


Rate = Annotated[float, Field(gt=0)]
_RATE = {"type": "number", "exclusiveMinimum": 0}
Rates = Annotated[
    dict[str, Rate],
    BeforeValidator(_by_component),
    WithJsonSchema({"anyOf": [_RATE, {"type": "object", "additionalProperties": _RATE}]}),
]
"""Learning rates by component. A file may give one number for all."""


def _check_names(names: tuple[str, ...], key: str) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{key}={list(names)} names a component twice")
    if ALL in names and len(names) > 1:
        raise ValueError(f"{key}={list(names)}: `{ALL}` must be the only name")


class WeightsConfig(StrictConfig):
    """Weights to load from another checkpoint, as far as they fit the model."""

    checkpoint: Path
    """A checkpoint folder (``RUN/checkpoints/step-N``), or a run folder for its newest complete checkpoint."""
    components: tuple[str, ...] = Field(default=(ALL,), min_length=1)
    """Components to load; the others keep their weights. ``[all]`` loads every component."""
    ema: bool = False
    """Load the moving averages instead of the weights, for parameters with an average in the checkpoint. The checkpoint
    must contain averages."""

    @model_validator(mode="after")
    def _check(self) -> WeightsConfig:
        _check_names(self.components, "components")
        return self


class DistillConfig(StrictConfig):
    """A teacher: a frozen model whose predictions the stage's model learns (Hinton et al. 2015)."""

    checkpoint: Path
    """A checkpoint folder (``RUN/checkpoints/step-N``), or a run folder for its newest complete checkpoint. The teacher
    must have the student's number of logits and the student's image inputs. The run does not check that an id is the
    same token for both."""
    weight: float = Field(default=1.0, gt=0, le=1)
    """Share of the loss for the divergence from this teacher. The cross-entropy has the remaining share: 1 minus the
    weights of all teachers, which may sum to at most 1."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of teacher and student before the softmax. The divergence is multiplied by its square."""
    ema: bool = False
    """Load the moving averages instead of the weights, for parameters with an average in the checkpoint. The checkpoint
    must contain averages."""


class PreferenceConfig(StrictConfig):
    """Direct preference optimisation: make the chosen answer of each pair more likely than the rejected one.

    With ``d`` the log-probability of the chosen answer minus that of the rejected one, minus the same of a frozen
    reference model, the loss of a pair is ``-log(sigmoid(beta * d))``. Source: Rafailov et al. 2023 (arXiv 2305.18290),
    equation 7.
    """

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """``sigmoid``: as above. ``ipo``: ``(d - 1 / (2 * beta)) ** 2``, which does not push certain pairs further (Azar et
    al. 2023, arXiv 2310.12036, equation 17)."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference: the larger it is, the less the model departs from the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed probability that a pair has the wrong order, below 0.5, for ``loss: sigmoid`` (conservative DPO): the
    loss is ``(1 - p)`` times that of the pair plus ``p`` times that of the swapped pair."""
    length_normalised: bool = False
    """Divide each answer's log-probabilities by its number of tokens (weighted by their loss weights). TRL does so for
    its ``ipo`` and ``sigmoid_norm``."""
    next_token: float = Field(default=0.0, ge=0)
    """Coefficient of an additional term, at least 0: the mean cross-entropy of the chosen answer's tokens. It keeps
    the chosen answers likely (Emu3; Llama 3: 0.2)."""
    reference: Literal["start", "none"] | Path = "start"
    """The frozen reference model. ``start``: the weights that the stage begins with, which are those of the previous
    stage, or of the only entry of ``weights`` in the first stage. A path: a checkpoint or run folder. ``none``: no
    reference; ``d`` is then the difference of the model's own log-probabilities (reference-free)."""

    @model_validator(mode="after")
    def _check(self) -> PreferenceConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing={self.label_smoothing}: belongs to loss=sigmoid, not {self.loss}")
        return self


class StageConfig(StrictConfig):
    """One stage."""

    name: str = Field(min_length=1)
    """Name in logs and checkpoints."""
    steps: int = Field(ge=1)
    """Number of optimizer steps; the learning rate schedule ends with the last one."""
    train: tuple[str, ...] = Field(default=(ALL,), min_length=1)
    """Components to train: any of ``vision``, ``connector``, ``video_connector``, ``audio``, ``audio_connector``,
    ``decoder``, ``extra_tokens``, ``image_tokens``, ``adapters``, or ``[all]``; of an image tokenizer ``encoder``,
    ``codebook``, ``decoder``. The others are frozen, and ``[all]`` leaves out the image tokenizer of a model that
    draws."""
    learning_rate: Rates = Field(default={DEFAULT: 1e-3})
    """Peak learning rate: one number, or a number per trained component with ``default`` for components without a
    key."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up: decay to ``min_learning_rate``, or ``constant``."""
    warmup_steps: Steps | dict[str, Steps] = 0
    """Steps of linear warm-up, at most ``steps``: one number, or a number per component with ``default`` for components
    without a key. The decay of a component begins when its own warm-up ends."""
    min_learning_rate: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step as a share of the peak. Ignored with ``schedule: constant``."""
    optimizer: OptimizerConfig = AdamWConfig()
    """Optimizer: ``kind`` is ``adamw``, ``adafactor`` or ``muon``, each with its own fields."""
    ema: EmaConfig | None = None
    """Moving average of the trained weights, started from the weights at the beginning of the stage; null for none."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the z loss: each token adds its loss weight * ``z_loss`` * ``logsumexp(logits) ** 2`` to the loss
    (PaLM, OLMo, Molmo: 1e-4). 0 for none."""
    clip: Norm | dict[str, Norm] = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0 for no clipping. A number limits the norm of the
    whole gradient. A mapping limits the norm of each component separately, with ``default`` for components without a
    key."""
    objective: OwnObjective | None = None
    """An objective of another package: ``kind`` is the path of a class, ``my_package.my_module:MyClass``, or the name
    of an entry point. Its other keys are the fields of that class. Null for the loss of the model: next-token or
    contrastive."""
    reconstruction: ReconstructionConfig | None = None
    """Losses of an image tokenizer; null for the defaults, and for a model with a decoder of text."""
    data: dict[str, Any] | None = Field(default=None, json_schema_extra={"x-block": "data"})
    """Overrides of the ``data`` block during this stage, for example another mixture; null for none."""
    model: dict[str, Any] | None = Field(default=None, json_schema_extra={"x-block": "model"})
    """Overrides of the ``model`` block from this stage on; null for none. Unlike ``data``, they also apply to the later
    stages."""
    weights: tuple[WeightsConfig, ...] = ()
    """Weights to load at the beginning of the stage, in this order, over the weights of the previous stage."""
    upcycle: bool = False
    """Start the experts of the decoder from the dense feed-forwards of the loaded weights, so that the model computes
    what the dense one did (sparse upcycling). ``expert_dim`` must be the width of the dense feed-forward or a divisor
    of it, and the weights of the chosen experts must sum to 1 (``renormalise``, or ``router: topk_then_softmax``)."""
    distill: tuple[DistillConfig, ...] = ()
    """Teachers whose predictions are targets in addition to the tokens of the data; empty for none."""
    preference: PreferenceConfig | None = None
    """Preference optimisation on pairs of answers (DPO) instead of the next-token loss. Every data set of the stage
    needs a template of kind ``preference``. null for none."""

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        _check_names(self.train, "train")
        if self.objective is not None and (self.z_loss or self.distill):
            raise ValueError(f"objective={self.objective.kind}: replaces the loss; leave out z_loss and distill")
        if self.preference is not None and (self.objective or self.z_loss or self.distill):
            raise ValueError("preference: replaces the loss; leave out objective, z_loss and distill")
        shares = [teacher.weight for teacher in self.distill]
        if math.fsum(shares) > 1 + 1e-9:
            raise ValueError(f"distill: the weights {shares} are shares of one loss and must sum to at most 1")
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
    def upcycles_previous(self) -> bool:
        """Whether the stage upcycles the decoder of the previous stage, and not one that ``weights`` loads."""
        return self.upcycle and not any({ALL, "decoder"} & set(source.components) for source in self.weights)

    @property
    def named_components(self) -> set[str]:
        """Components with a key in ``learning_rate``, ``warmup_steps`` or ``clip``."""
        return {*self.learning_rate, *_by_component(self.warmup_steps), *_by_component(self.clip)} - {DEFAULT}

    @property
    def whole_clip(self) -> float:
        """Largest norm of the whole gradient; 0 for no limit, or if ``clip`` is per component."""
        return 0.0 if isinstance(self.clip, dict) else self.clip

    def component_clip(self, component: str) -> float:
        """Return the largest norm of the gradient of ``component``; 0 for no limit, or if ``clip`` is one number."""
        return self.clip.get(component, self.clip.get(DEFAULT, 0.0)) if isinstance(self.clip, dict) else 0.0

    def peak_learning_rate(self, component: str) -> float:
        """Return the peak learning rate of ``component``."""
        return self.learning_rate.get(component, self.learning_rate.get(DEFAULT, 0.0))

    def with_steps(self, steps: int) -> StageConfig:
        """Return the stage with another number of steps, and with warm-ups scaled in proportion and rounded up."""

        def scaled(warmup: int) -> int:
            return -(-warmup * steps // self.steps)

        old = self.warmup_steps
        new = scaled(old) if isinstance(old, int) else {name: scaled(warmup) for name, warmup in old.items()}
        return self.model_copy(update={"steps": steps, "warmup_steps": new})

    def warmup(self, component: str) -> int:
        """Return the number of warm-up steps of ``component``."""
        warmups = _by_component(self.warmup_steps)
        return warmups.get(component, warmups.get(DEFAULT, 0))
