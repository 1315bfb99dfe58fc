"""Which held-out sets are scored, and which of their images are captioned for the report."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.images.transforms import TransformConfig
from data_pipeline.io.strict import StrictConfig
from data_pipeline.text.templates import DialogueTemplate, TemplateConfig
from data_pipeline.text.templates.base import parse
from mmscale.models.sampling import SamplingConfig


class Normalise(str, Enum):
    """What a candidate's log-likelihood is compared by."""

    NONE = "none"
    """The sum over its tokens: log P(answer | image). The right rule where training gave all answers equal chances."""
    TOKENS = "tokens"
    """The mean over its tokens: long answers are not held against themselves."""
    PRIOR = "prior"
    """The sum, less the candidate's mean over the other images that were asked about it: an estimate of the pointwise
    mutual information of image and answer, for answers that training saw unequally often. It lets the set's other
    images take part in a score, and is noisy where few images share a candidate."""


class _HeldOut(StrictConfig):
    """What sets of every kind have."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Key of the result."""
    manifest: Path
    """Manifest of the set; relative to the working directory."""
    seed: int = Field(default=0, ge=0)
    """Of every draw."""
    limit: int | None = Field(default=None, ge=2)
    """Take so many samples at most, drawn at random; null for all."""
    transforms: TransformConfig | None = None
    """How an image becomes views; null for the transform of the first data set, without augmentation."""


class _Answered(_HeldOut):
    """What sets with candidate answers have."""

    template: str = "{value}"
    """What an answer looks like; ``{value}`` is its text. Begin it as the training template does (a blank, say)."""

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        if names != ["value"]:
            raise ValueError("expected text with {value} in it once, and no other field")
        return template


class HeldOutSet(_Answered):
    """One set of samples and the question asked about each: which of these candidates names the image?"""

    kind: Literal["images"] = "images"
    field: str
    """Field of a sample that holds the right answer, a string; ``a.b`` reads b of the object a."""
    prompt: str = ""
    """Format string over the sample's fields that stands between image and answer, as in the training template."""
    ends: bool = True
    """Whether the end-of-text token is part of the answer; false where training goes on after it."""
    choices: int | None = Field(default=50, ge=2)
    """Candidates of a question, the right one among them; null for every value that occurs."""
    candidates_from: Path | None = None
    """Manifest whose values of ``field`` are candidates; null for the values of the set itself."""
    normalise: Normalise = Normalise.NONE
    """How candidates are compared."""


class PerplexitySet(_HeldOut):
    """Documents of any template: how well does the model predict what is learned of them?"""

    kind: Literal["perplexity"]
    template: TemplateConfig
    """Which text is read and which is scored, as in training; its weights count here too."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longer documents are cut, and each part is read from its own beginning; null: ``data.packing.max_tokens``,
    or the positions that the model has if those are fewer."""


Compared = Literal["none", "tokens", "characters", "bytes"]
"""What the log-likelihood of an answer is divided by."""


class ChoiceSet(_Answered):
    """Questions with their choices in the samples; images, if there are any, stand before the question."""

    kind: Literal["choice"]
    prompt: str = "{question}"
    """Format string over the sample's fields: all that is read before an answer."""
    choices: str | tuple[str, ...] = "choices"
    """Field of a sample that lists the texts to choose from (``a.b`` reads b of the object a), or the texts themselves,
    the same for every sample."""
    answer: str = "answer"
    """Field of a sample that says which choice is right."""
    answer_as: Literal["index", "letter", "text"] = "index"
    """How it says so: a number from 0, a letter from A (either case), or the text of the choice."""
    dialogue: DialogueTemplate | None = None
    """Ask in this chat format: the prompt is what the user says. Null: the prompt as it stands."""
    ends: bool = False
    """Whether what closes an answer (of a dialogue the end of the turn, else the end-of-text token) is part of it."""
    normalise: Compared = "none"
    """How choices are compared for ``score``: by log-likelihood, or by that a token, a character or a byte of the text.
    ``none`` is the ``acc`` of lm-evaluation-harness, ``characters`` its ``acc_norm``. The result has all four."""

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


EvaluationSet = Annotated[HeldOutSet | PerplexitySet | ChoiceSet, Field(discriminator="kind")]
"""Which question; ``kind`` picks the member, ``images`` where it is left out."""


class CaptionsConfig(StrictConfig):
    """Captions for the report."""

    num_images: int = Field(default=12, ge=1)
    """Images of each set."""
    sets: tuple[str, ...] | None = None
    """Names of sets of the kind ``images``; null for all of these."""
    prompt: str | None = None
    """Prompt in place of the one of the set."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Longest caption, tokens."""
    sampling: SamplingConfig = SamplingConfig()
    """How tokens are chosen."""


class EvaluationConfig(StrictConfig):
    """The ``evaluation`` block of a run."""

    sets: tuple[EvaluationSet, ...] = ()
    """Sets scored at the end of the run."""
    captions: CaptionsConfig | None = CaptionsConfig()
    """Captions of held-out images for the report; null for none."""
    tokens_per_forward: int = Field(default=8192, ge=1)
    """Tokens of one forward at most, for perplexity with its patches (memory)."""
    rows_per_head: int = Field(default=1024, ge=1)
    """Rows that meet the vocabulary at a time: rows times vocabulary float32 are held at once."""

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
            raise ValueError(f"sets need names of their own, got {names}")
        of_images = [held.name for held in self.image_sets]
        wanted = self.captions.sets if self.captions is not None else None
        unknown = sorted(set(wanted or ()) - set(of_images))
        if unknown:
            raise ValueError(f"captions.sets names {unknown}; the sets of images are {of_images}")
        return self

    @property
    def image_sets(self) -> tuple[HeldOutSet, ...]:
        """The sets that ask about images alone."""
        return tuple(held for held in self.sets if isinstance(held, HeldOutSet))
