"""``result.json``: the results of a run, for programs. Keys may be added; existing keys keep name and type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.io.strict import first_fault
from data_pipeline.io.untrusted import read_json
from mmscale.errors import MMScaleError

RESULT_FILE = "result.json"
ANSWERS_FOLDER = "answers"
"""Folder in a run folder with a file ``NAME.jsonl`` for each set of kind ``generation``."""


@dataclass(frozen=True)
class SetResult:
    """Result of a set of kind ``images``.

    Attributes:
        score: Accuracy, in [0, 1].
        control: Accuracy with the images permuted among the samples, that is, without information from the image.
        chance: Accuracy of a random guess.
        n: Number of samples.
        metric: Description of the task, such as ``name among 50``.
        error: Binomial standard error of ``score``.
        control_error: Binomial standard error of ``control``.
        loss: Mean negative log-likelihood of the right answers per token, nats. None for a contrastive model and in
            older files.
    """

    score: float
    control: float
    chance: float
    n: int
    metric: str
    error: float
    control_error: float
    loss: float | None = None
    kind: str = "images"

    @property
    def summary(self) -> str:
        """One line for a log."""
        return (
            f"{self.metric} {self.score:.3f} ± {self.error:.3f}, images permuted {self.control:.3f}, "
            f"chance {self.chance:.3f} (n={self.n})"
        )


@dataclass(frozen=True)
class ChoiceResult:
    """Result of a set of multiple-choice questions.

    Attributes:
        score: Accuracy, in [0, 1], with the normalisation of the set.
        chance: Accuracy of a random guess.
        n: Number of questions.
        metric: Description of the task, such as ``right choice among 4``.
        error: Binomial standard error of ``score``.
        scores: Accuracy by normalisation: ``none``, ``tokens``, ``characters``, ``bytes``.
        loss: Mean negative log-likelihood of the right choices per token, nats. None in older files.
    """

    score: float
    chance: float
    n: int
    metric: str
    error: float
    scores: Mapping[str, float]
    loss: float | None = None
    kind: str = "choice"

    @property
    def summary(self) -> str:
        """One line for a log."""
        return f"{self.metric} {self.score:.3f} ± {self.error:.3f}, chance {self.chance:.3f} (n={self.n})"


@dataclass(frozen=True)
class PerplexityResult:
    """Result of a set of kind ``perplexity``.

    Attributes:
        loss: Negative log-likelihood per learned token, nats; mean weighted by loss weight.
        error: Standard error of ``loss`` over documents.
        perplexity: ``exp(loss)``.
        bits_per_byte: Unweighted bits of all learned tokens over the UTF-8 bytes of the learned text. Closing tokens
            add bits but no bytes. None if there is no learned text.
        tokens: Number of learned tokens.
        bytes: UTF-8 bytes of the learned text.
        n: Number of samples; a document that was cut counts once.
    """

    loss: float
    error: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    n: int
    metric: str = "perplexity per token"
    kind: str = "perplexity"

    @property
    def summary(self) -> str:
        """One line for a log."""
        per_byte = f", {self.bits_per_byte:.3f} bits per byte" if self.bits_per_byte is not None else ""
        return (
            f"perplexity {self.perplexity:.4g}, loss {self.loss:.4f} ± {self.error:.4f}{per_byte} "
            f"({self.tokens} tokens, n={self.n})"
        )


@dataclass(frozen=True)
class GenerationResult:
    """Result of a set of kind ``generation``.

    Attributes:
        score: Value of the metric, in [0, 1]; of CIDEr in [0, 10]. Tables show 100 times this.
        n: Number of samples.
        metric: Name of the metric, such as ``VQA accuracy``.
        error: Standard error of ``score`` over samples; for chrF from a bootstrap.
        control: Value of the metric with the answers permuted among the samples, that is, without information from the
            media. None if the set has no control.
        chance: Value of the metric if the answers are references of other samples. None if the set has no control.
        control_error: Standard error of ``control``. None if the set has no control.
    """

    score: float
    n: int
    metric: str
    error: float
    control: float | None = None
    chance: float | None = None
    kind: str = "generation"
    control_error: float | None = None

    @property
    def summary(self) -> str:
        """One line for a log."""
        permuted = "" if self.control is None else f", answers permuted {self.control:.3f}, chance {self.chance:.3f}"
        return f"{self.metric} {self.score:.3f} ± {self.error:.3f}{permuted} (n={self.n})"


@dataclass(frozen=True)
class DrawingsResult:
    """Result of a set of kind ``drawings``.

    Attributes:
        score: Share of drawings that the classifier names right, in [0, 1].
        control: The same share with the drawings permuted among the samples.
        chance: Accuracy of a random guess.
        n: Number of drawings.
        metric: Description of the task, such as ``name of drawings among 50``.
        error: Binomial standard error of ``score``.
        control_error: Binomial standard error of ``control``.
        frechet: Squared Frechet distance of ``frechet_n`` drawings and as many real images of the set, by the
            classifier's vectors.
        frechet_real: The same of the real images and as many others: the floor of ``frechet``.
        frechet_n: Number of images on each side. Values with other numbers cannot be compared.
        nearest: Median distance of a drawing to its nearest training image: root of the mean squared difference of
            pixel values in [0, 1]. None without training images.
        nearest_real: The same of the real images, which are no copies.
        near_copies: Share of drawings that are nearer to a training image than 19 of 20 real images are. About 0.05 if
            the drawings are as far from the training images as real images are.
        classifier: Checksum that identifies the checkpoint of the classifier.
    """

    score: float
    control: float
    chance: float
    n: int
    metric: str
    error: float
    control_error: float
    frechet: float
    frechet_real: float
    frechet_n: int
    nearest: float | None
    nearest_real: float | None
    near_copies: float | None
    classifier: str
    kind: str = "drawings"

    @property
    def summary(self) -> str:
        """One line for a log."""
        near = ""
        if self.near_copies is not None:
            near = f", near copies {self.near_copies:.3f}"
        return (
            f"{self.metric} {self.score:.3f} ± {self.error:.3f}, images permuted {self.control:.3f}, "
            f"chance {self.chance:.3f}, Frechet distance {self.frechet:.3f} (real images {self.frechet_real:.3f})"
            f"{near} (n={self.n})"
        )


HeldOutResult = SetResult | ChoiceResult | PerplexityResult | GenerationResult | DrawingsResult
"""Result of one held-out set; the field ``kind`` identifies the type."""


def curve_values(results: Mapping[str, HeldOutResult]) -> dict[str, float]:
    """Return the values of results that curves show, as ``heldout/SET/VALUE``, without those that are None."""
    names = ("score", "control", "loss", "bits_per_byte", "error", "frechet", "near_copies")
    found = {
        f"heldout/{held}/{name}": getattr(result, name, None) for held, result in results.items() for name in names
    }
    return {name: value for name, value in found.items() if value is not None}


def binomial_error(share: float, n: int) -> float:
    """Return the standard error of a share of ``n`` independent yes/no outcomes; 0 for no outcomes."""
    return math.sqrt(share * (1 - share) / n) if n else 0.0


@dataclass(frozen=True)
class Params:
    """Number of parameters: in total, active for one token, and in total by component."""

    total: int
    active: int
    components: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Peak memory of each rank in bytes, in rank order. ``device_bytes`` is None without accelerators."""

    rss_bytes: tuple[int, ...]
    device_bytes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Efficiency:
    """Floating point operations of the model, and utilisation of the devices.

    Attributes:
        mfu: Model FLOPs utilisation: operations of the steps over the peak of the devices in that time. None if the
            peak is unknown.
        peak_flops: Peak operations per second of one rank's device; None if unknown.
        peak_source: Source of ``peak_flops``, or the reason why it is unknown.
        model_flops: Operations of all steps on all ranks.
    """

    mfu: float | None
    peak_flops: float | None
    peak_source: str
    model_flops: int


@dataclass(frozen=True)
class BestRecord:
    """The best checkpoint of a run by ``evaluation.best.metric``; ``checkpoint`` is relative to the run folder."""

    metric: str
    value: float
    step: int
    checkpoint: str


@dataclass(frozen=True)
class EarlyStop:
    """Why a run ended before its last step, and the number of evaluations in a row that did not improve."""

    reason: str
    evaluations: int


@dataclass(frozen=True)
class RunResult:
    """Contents of ``result.json``.

    Attributes:
        world_size: Number of ranks.
        zero_stage: ZeRO stage, 0 to 3.
        precision: ``fp32`` or ``bf16``.
        steps: Optimizer steps over all stages.
        train_seconds: Wall time of training steps over all starts of the run, without set-up and evaluation.
        params: Numbers of parameters.
        heldout: Results by set name.
        precision_reason: Reason for this precision, one sentence.
        tokens: Tokens trained on.
        samples: Samples trained on.
        memory: Peak memory.
        machine: Description of the device and the number of ranks.
        efficiency: Operations, and their share of the devices' peak.
        goodput: ``metrics.goodput.Goodput`` as a mapping: the wall time of all starts by activity.
        finished: False if the run stopped before its last step.
        best: The best checkpoint; None if the run keeps none.
        early_stop: Why the run ended before its last step; None if it did all its steps.
    """

    world_size: int
    zero_stage: int
    precision: str
    steps: int
    train_seconds: float
    params: Params
    heldout: Mapping[str, HeldOutResult] = field(default_factory=dict)
    precision_reason: str = ""
    tokens: int = 0
    samples: int = 0
    memory: Memory | None = None
    machine: str = ""
    efficiency: Efficiency | None = None
    goodput: Mapping[str, float | int] | None = None
    finished: bool = True
    best: BestRecord | None = None
    early_stop: EarlyStop | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``write_result`` writes."""
        return asdict(self) | {"heldout": {name: asdict(result) for name, result in self.heldout.items()}}


def write_result(run_dir: Path, result: RunResult) -> Path:
    """Write ``result.json`` atomically. Call it on rank 0 only.

    Returns:
        The path of the file.
    """
    path = run_dir / RESULT_FILE
    write_whole(path, as_utf8(json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n"), parents=True)
    return path


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, lt=2**53)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Value = Annotated[float, Field(ge=0, le=10)]
_open = with_config(ConfigDict(extra="allow"))  # Another version may write more keys.


@_open
class _Scored(TypedDict):
    kind: NotRequired[Literal["images", "choice"]]
    score: _Share
    chance: Annotated[float, Field(gt=0, le=1)]
    control: NotRequired[_Share]
    n: Annotated[int, Field(ge=1, lt=2**63)]
    metric: str
    error: NotRequired[_Number]
    control_error: NotRequired[_Number]


@_open
class _Drawings(TypedDict):
    kind: Literal["drawings"]
    score: _Share
    control: _Share
    chance: Annotated[float, Field(gt=0, le=1)]
    n: Annotated[int, Field(ge=1, lt=2**63)]
    metric: str
    error: _Number
    control_error: _Number
    frechet: _Number
    frechet_real: _Number
    near_copies: _Share | None


@_open
class _Perplexity(TypedDict):
    kind: Literal["perplexity"]
    loss: float
    error: float
    perplexity: float
    bits_per_byte: float | None
    tokens: _Count
    n: _Count
    metric: str


@_open
class _Generation(TypedDict):
    kind: Literal["generation"]
    score: _Value
    n: Annotated[int, Field(ge=1, lt=2**63)]
    metric: str
    error: _Number
    control: _Value | None
    chance: _Value | None
    control_error: NotRequired[_Number | None]


def _kind(held: Any) -> str:
    kind = held.get("kind") if isinstance(held, dict) else None
    return kind if kind in ("perplexity", "generation", "drawings") else "scored"


# Discriminate by kind, so that the error for a damaged set lists the keys of its own kind.
_Set = Annotated[
    Annotated[_Perplexity, Tag("perplexity")]
    | Annotated[_Generation, Tag("generation")]
    | Annotated[_Drawings, Tag("drawings")]
    | Annotated[_Scored, Tag("scored")],
    Discriminator(_kind),
]


@_open
class _Params(TypedDict):
    total: _Count
    active: _Count
    components: NotRequired[dict[str, _Count]]


@_open
class _Memory(TypedDict, total=False):
    rss_bytes: list[_Count] | None
    device_bytes: list[_Count] | None


@_open
class _Best(TypedDict):
    metric: str
    value: float
    step: _Count
    checkpoint: str


@_open
class _EarlyStop(TypedDict):
    reason: str
    evaluations: _Count


@_open
class _Result(TypedDict, total=False):
    world_size: _Count
    zero_stage: int
    precision: str
    precision_reason: str
    steps: _Count
    train_seconds: _Seconds
    params: _Params
    heldout: dict[str, _Set]
    memory: _Memory | None
    machine: str
    finished: bool
    best: _Best | None
    early_stop: _EarlyStop | None


_RESULT = TypeAdapter(_Result)


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return ``result.json`` as a mapping, empty if the file is missing.

    The keys of ``_Result`` are validated if they are present. Other keys are returned as they are.

    Raises:
        MMScaleError: the file cannot be read, or is damaged.
    """
    path = run_dir / RESULT_FILE
    if not path.exists():
        return {}
    value = None
    try:
        value = read_json(path)
        return dict(_RESULT.validate_python(value))
    except ValidationError as error:
        raise MMScaleError(f"{path} is damaged: {first_fault(error, value)}") from error
    except (OSError, ValueError) as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
