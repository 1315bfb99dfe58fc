"""The ``evaluation`` block: held-out sets to score, and captions for the report."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.images.transforms import TransformConfig
from data_pipeline.io.strict import StrictConfig
from data_pipeline.text.templates import DialogueTemplate, TemplateConfig
from data_pipeline.text.templates.base import parse
from mmscale.evaluate.answer_metrics import Ignored, MetricName
from mmscale.models.sampling import SamplingConfig


class Normalise(str, Enum):
    """How the log-likelihoods of candidates are normalised before they are compared."""

    NONE = "none"
    """Sum over the candidate's tokens: log P(answer | image). Use it if training saw all answers equally often."""
    TOKENS = "tokens"
    """Mean over the candidate's tokens, so that long answers are not penalised."""
    PRIOR = "prior"
    """Sum over the candidate's tokens, minus the candidate's mean sum over the other images scored with it.

    This estimates the pointwise mutual information of image and answer. Use it if answers were not equally frequent in
    training. Scores then depend on the set's other images and are noisy if few images share a candidate."""


MOST_DRAWINGS = 64
"""Most drawings of an evaluation in the report. Every rank draws all of them, and the report holds their images."""
LOWER_IS_BETTER = ("loss", "bits_per_byte", "frechet")
"""Values of a result of which the best is the lowest. For every other value the highest is the best."""


class _HeldOut(StrictConfig):
    """Fields of sets of every kind."""

    compared: ClassVar[tuple[str, ...]] = ("score",)
    """Values of a result that ``evaluation.best.metric`` may name."""
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the set, and its key in the result; unique among the sets."""
    manifest: Path
    """Manifest of the set. A relative path is relative to the working directory."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice in this set: samples, blocks and candidates."""
    limit: int | None = Field(default=None, ge=2)
    """Largest number of samples to score, chosen at random; at least 2. Null scores all samples."""
    transforms: TransformConfig | None = None
    """How an image becomes crops, without augmentation. Null uses the transform of the first data set."""


class _Answered(_HeldOut):
    """Fields of sets with candidate answers."""

    template: str = "{value}"
    """Format string of an answer; it contains ``{value}`` exactly once. Begin it as training answers begin, for example
    with a space."""

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        if names != ["value"]:
            raise ValueError("expected text with {value} in it once, and no other field")
        return template


class _Named(_Answered):
    """Fields of sets whose samples have one right answer among candidates that occur in a manifest."""

    field: str
    """Field of a sample that holds the right answer, a text; ``a.b`` reads b of the object a."""
    choices: int | None = Field(default=50, ge=2)
    """Number of candidates per question, the right one included; at least 2. Null uses every value that occurs."""
    candidates_from: Path | None = None
    """Manifest whose values of ``field`` are candidates. Null uses the values of the set itself."""


class HeldOutSet(_Named):
    """Samples with an image, a video or a sound; the model chooses the candidate that names it."""

    compared: ClassVar[tuple[str, ...]] = ("score", "loss")
    kind: Literal["images"] = "images"
    prompt: str = ""
    """Format string over the sample's fields for the text between image and answer, as in the training template."""
    ends: bool = True
    """Whether the end-of-text token is scored as part of the answer; false if training text continues after answers."""
    normalise: Normalise = Normalise.NONE
    """How log-likelihoods are normalised before candidates are compared: ``none``, ``tokens`` or ``prior``."""
    shuffle_frames: bool = False
    """Whether the frames of each video are in a random order. A control: a score that stays as high as with the frames
    in order does not depend on the order. A sample without a video of at least two used frames raises."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        parse(prompt)
        return prompt


class PerplexitySet(_HeldOut):
    """Documents of any template; the score is the model's mean loss on their learned tokens."""

    compared: ClassVar[tuple[str, ...]] = ("loss", "bits_per_byte")
    kind: Literal["perplexity"]
    template: TemplateConfig | None = None
    """Template of the documents. Tokens with a loss weight are scored, with that weight. Null uses the template of the
    first data set."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest document in tokens, at least 2. Longer ones are cut, and each part is scored without the parts before it.
    Null uses ``data.packing.max_tokens``. The model's number of positions also limits the length."""


ChoiceNormalise = Literal["none", "tokens", "characters", "bytes"]
"""Divisor of a choice's log-likelihood: 1, or its number of tokens, characters or bytes."""


class ChoiceSet(_Answered):
    """Multiple-choice questions. Images of a sample come before its question."""

    compared: ClassVar[tuple[str, ...]] = ("score", "loss")
    kind: Literal["choice"]
    prompt: str = "{question}"
    """Format string over the sample's fields for the text before an answer."""
    choices: str | tuple[str, ...] = "choices"
    """Field of a sample that lists the choices (``a.b`` reads b of the object a), or a list of at least two different
    texts that are the choices of every sample."""
    answer: str = "answer"
    """Field of a sample that identifies the right choice."""
    answer_as: Literal["index", "letter", "text"] = "index"
    """Form of ``answer``: ``index`` (from 0), ``letter`` (from A, either case), or ``text`` (of one choice)."""
    dialogue: DialogueTemplate | None = None
    """Chat format; the prompt becomes the user's turn. Null uses the prompt without a chat format."""
    ends: bool = False
    """Whether the closing tokens (end of turn in a dialogue, else end of text) are scored as part of an answer."""
    normalise: ChoiceNormalise = "none"
    """Divisor of the log-likelihoods that ``score`` compares: 1 (``none``), or the choice's ``tokens``, ``characters``
    or ``bytes``. ``none`` is ``acc`` of lm-evaluation-harness, ``characters`` its ``acc_norm``. The result lists all
    four."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        parse(prompt)
        return prompt

    @field_validator("choices")
    @classmethod
    def _check_choices(cls, choices: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(choices, str) and (len(choices) < 2 or len(set(choices)) < len(choices)):
            raise ValueError(f"expected at least two different texts, got {list(choices)}")
        return choices


class GenerationSet(_HeldOut):
    """Questions that the model answers in its own words. Images, videos and sounds of a sample come first."""

    kind: Literal["generation"]
    prompt: str | None = "{question}"
    """Format string over the sample's fields for the text before the answer. Null asks with the turns of the sample
    before its last answer; this needs ``dialogue``."""
    dialogue: DialogueTemplate | None = None
    """Chat format; the prompt becomes the user's turn. Null uses the prompt without a chat format."""
    answers: str = "answer"
    """Field of a sample with the reference answer: a text, a number, a list of them, or a list of objects whose
    ``answer`` is a text, as in VQAv2. ``a.b`` reads b of the object a."""
    metric: MetricName = "exact_match"
    """``exact_match``, ``vqa`` (VQAv2), ``anls`` (DocVQA), ``relaxed_accuracy`` (ChartQA), ``wer`` (1 minus the word
    error rate), ``chrf`` or ``cider``."""
    control: bool = False
    """Whether the result also has a control and a chance: the metric of each answer for the references of another
    sample, and that of another sample's reference as the answer. They need no further forward pass."""
    ignore: tuple[Ignored, ...] | None = None
    """Differences that ``exact_match`` ignores: ``case``, ``punctuation``, ``articles``. Null ignores case and
    punctuation. Other metrics have their own rules, so they accept only null."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Longest answer, tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer and are not part of it. The end of a turn or a text always ends it."""
    sampling: SamplingConfig = SamplingConfig()
    """How tokens are sampled. The default always takes the most likely token."""

    @model_validator(mode="after")
    def _check_question(self) -> GenerationSet:
        if self.prompt is None and self.dialogue is None:
            raise ValueError("prompt: null asks with the turns of a dialogue; set dialogue, or give a prompt")
        if self.metric != "exact_match" and self.ignore is not None:
            raise ValueError(f"ignore: belongs to metric=exact_match; metric={self.metric} has its own rules")
        if self.prompt is not None:
            parse(self.prompt)
        return self


class DrawingSet(_Named):
    """Texts that the model draws. A classifier, a contrastive model of another run, names the drawings."""

    compared: ClassVar[tuple[str, ...]] = ("score", "frechet")
    kind: Literal["drawings"]
    classifier: Path
    """Run folder of a contrastive model, or one checkpoint in it. The newest checkpoint is used. A relative path is
    relative to the working directory. Its run gives the tokenizer of names and how an image becomes its input."""
    template: str = "{value}"
    """Format string of a name as the classifier reads it; it contains ``{value}`` exactly once."""
    prompt: str | None = None
    """Format string over the sample's fields for the text to draw, which fills the one field of the training template's
    prompt. Null draws what the training template makes of the sample's fields."""
    size: int | None = Field(default=None, ge=1, le=8192)
    """Side of a drawing, pixels; a multiple of the pixels of a code. Null draws the size of ``image_tokens.grid``."""
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    """How codes are chosen. Drawing i uses ``seed`` plus i."""
    guidance: float = Field(default=1.0, ge=1, le=1000)
    """Scale of classifier-free guidance, at least 1; 1 for none."""
    batch_size: int | None = Field(default=None, ge=1)
    """Drawings that a rank draws together; limits memory. Guidance doubles the sequences. Null for 16, or fewer if they
    have many codes."""
    tokenizer: Path | None = None
    """Run folder or checkpoint of the image tokenizer that encoded the data, for a model without ``image_tokenizer``.
    Null for that of the model."""
    train: Path | None = None
    """Manifest of the training images. The nearest one of each drawing shows whether the model copies. Null compares
    with none."""
    train_limit: int | None = Field(default=None, ge=1)
    """Largest number of training images to compare with, chosen at random; at least 1. Null compares with all."""

    @model_validator(mode="after")
    def _check_drawing(self) -> DrawingSet:
        parse(self.prompt or "")
        if self.train is None and self.train_limit is not None:
            raise ValueError(f"train_limit={self.train_limit}: has no effect without train; name the manifest")
        return self


EvaluationSet = Annotated[
    HeldOutSet | PerplexitySet | ChoiceSet | GenerationSet | DrawingSet, Field(discriminator="kind")
]
"""A held-out set; ``kind`` selects its type and defaults to ``images``."""


class CaptionsConfig(StrictConfig):
    """Captions of held-out images in the report."""

    num_images: int = Field(default=12, ge=1)
    """Number of images per set."""
    sets: tuple[str, ...] | None = None
    """Names of sets of kind ``images``. Null uses all sets of this kind."""
    prompt: str | None = None
    """Format string of the prompt. Null uses the prompt of the set."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Longest caption, tokens."""
    sampling: SamplingConfig = SamplingConfig()
    """How tokens are sampled."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str | None) -> str | None:
        parse(prompt or "")
        return prompt


class DrawingsConfig(StrictConfig):
    """Drawings in the report and TensorBoard, at every evaluation during training and at the end of the run."""

    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MOST_DRAWINGS)] = ()
    """Texts to draw, as for ``mmscale generate --prompt``; at most 64 drawings with those of ``sets``."""
    sets: tuple[str, ...] = ()
    """Names of sets whose samples' fields give further texts, by the first prompt of the data set that draws."""
    num_images: int = Field(default=4, ge=1, le=MOST_DRAWINGS)
    """Drawings of each set in ``sets``, 1 to 64."""
    size: int | None = Field(default=None, ge=1, le=8192)
    """Side of a drawing, pixels; a multiple of the pixels of a code. Null draws the size of ``image_tokens.grid``."""
    guidance: float = Field(default=1.0, ge=1, le=1000)
    """Scale of classifier-free guidance, at least 1; 1 for none."""
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    """How codes are chosen. Drawing i uses ``seed`` plus i at every step, so drawings of different steps compare."""
    tokenizer: Path | None = None
    """Run folder or checkpoint of the image tokenizer that encoded the data, for a model without ``image_tokenizer``.
    Null for that of the model."""

    @model_validator(mode="after")
    def _check_number(self) -> DrawingsConfig:
        number = len(self.prompts) + self.num_images * len(self.sets)
        if not 1 <= number <= MOST_DRAWINGS:
            raise ValueError(
                f"{number} drawings: give 1 to {MOST_DRAWINGS}, as prompts, or as sets with num_images each"
            )
        return self


class DuringConfig(StrictConfig):
    """The part of the held-out sets that is scored during training."""

    sets: tuple[str, ...] | None = None
    """Names of the sets. Null scores all sets."""
    limit: int | None = Field(default=256, ge=2)
    """Largest number of samples per set, the same ones each time; at least 2. The set's own ``limit`` also applies.
    Null scores as many samples as at the end of the run."""


class BestConfig(StrictConfig):
    """The checkpoint to keep, and when to end a run that no longer improves."""

    metric: str
    """Held-out value that is compared, as ``SET.VALUE``: ``style.score``, ``pages.loss``. A loss should be low, a score
    high."""
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """An evaluation improves on the best one if its value is better by more than this; at least 0."""
    stop_after: int | None = Field(default=None, ge=1)
    """End the run after this many evaluations in a row that do not improve; at least 1, null never. Only evaluations
    of the last stage count, so that no stage is left out."""

    @property
    def set(self) -> str:
        """Name of the set."""
        return self.metric.rpartition(".")[0]

    @property
    def value(self) -> str:
        """Name of the compared value in the set's result."""
        return self.metric.rpartition(".")[2]

    def improves(self, value: float, best: float | None) -> bool:
        """Return whether ``value`` is better than ``best`` by more than ``min_delta``. NaN never is."""
        if best is None:
            return math.isfinite(value)
        gain = best - value if self.value in LOWER_IS_BETTER else value - best
        return gain > self.min_delta


class EvaluationConfig(StrictConfig):
    """The ``evaluation`` block of a run."""

    sets: tuple[EvaluationSet, ...] = ()
    """Sets that are scored at the end of the run and by ``mmscale eval``."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also score during training, when the run's step is a multiple of this. Null scores at the end only."""
    during: DuringConfig = DuringConfig()
    """The part of ``sets`` that is scored during training."""
    best: BestConfig | None = None
    """Keep the checkpoint with the best held-out value; needs ``every_steps``. Null keeps the newest ones only."""
    captions: CaptionsConfig | None = CaptionsConfig()
    """Captions of held-out images for the report. Null generates none."""
    drawings: DrawingsConfig | None = None
    """Drawings for the report, of a model that draws. Null draws none."""
    tokens_per_forward: int = Field(default=8192, ge=1)
    """Largest number of tokens in one forward pass; limits memory. Image patches count too for sets of
    kind ``perplexity`` and for contrastive models. A single document may exceed the limit."""
    rows_per_head: int = Field(default=1024, ge=1)
    """Token rows per call of the output head; limits memory. A call needs a few float32 tensors rows x vocabulary."""

    @field_validator("sets", mode="before")
    @classmethod
    def _default_kind(cls, sets: Any) -> Any:
        if not isinstance(sets, list | tuple):
            return sets
        return [{"kind": "images", **held} if isinstance(held, dict) else held for held in sets]

    @model_validator(mode="after")
    def _check_names(self) -> EvaluationConfig:
        names = [held.name for held in self.sets]
        if len(set(names)) != len(names):
            raise ValueError(f"names of sets must differ, got {names}")
        of_images = [held.name for held in self.image_sets]
        wanted = self.captions.sets if self.captions is not None else None
        unknown = sorted(set(wanted or ()) - set(of_images))
        if unknown:
            raise ValueError(f"captions.sets names {unknown}; the sets of kind images are {of_images}")
        unknown = sorted(set(self.drawings.sets if self.drawings is not None else ()) - set(names))
        if unknown:
            raise ValueError(f"drawings.sets names {unknown}; the sets are {names}")
        unknown = sorted(set(self.during.sets or ()) - set(names))
        if unknown:
            raise ValueError(f"during.sets names {unknown}; the sets are {names}")
        return self

    @model_validator(mode="after")
    def _check_best(self) -> EvaluationConfig:
        if self.every_steps is not None and not self.during_training.sets and self.drawings is None:
            raise ValueError(
                f"every_steps={self.every_steps}: there is no set to score; add one to evaluation.sets, or set "
                "evaluation.drawings"
            )
        if self.best is None:
            return self
        if self.every_steps is None:
            raise ValueError("best: set every_steps too; without it no set is scored during training")
        known = [f"{held.name}.{value}" for held in self.during_training.sets for value in held.compared]
        if self.best.metric not in known:
            raise ValueError(f"best.metric={self.best.metric}: not a value of a set; known here: {', '.join(known)}")
        return self

    @property
    def during_training(self) -> EvaluationConfig:
        """The block with the sets and limits that apply during training, without captions."""
        names, most = self.during.sets, self.during.limit
        chosen = [held for held in self.sets if names is None or held.name in names]
        limits = [min((n for n in (held.limit, most) if n is not None), default=None) for held in chosen]
        sets = tuple(held.model_copy(update={"limit": n}) for held, n in zip(chosen, limits, strict=True))
        return self.model_copy(update={"sets": sets, "captions": None})

    @property
    def image_sets(self) -> tuple[HeldOutSet, ...]:
        """Sets of kind ``images``."""
        return tuple(held for held in self.sets if isinstance(held, HeldOutSet))
