"""Which held-out sets are scored, and which of their images are captioned for the report."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from string import Formatter

from pydantic import Field, field_validator, model_validator

from data_pipeline.strict import StrictConfig
from data_pipeline.transforms import TransformConfig
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


class HeldOutSet(StrictConfig):
    """One set of samples and the question asked about each: which of these candidates names the image?"""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Key of the result."""
    manifest: Path
    """Manifest of the set; relative to the working directory."""
    field: str
    """Field of a sample that holds the right answer, a string; ``a.b`` reads b of the object a."""
    prompt: str = ""
    """Format string over the sample's fields that stands between image and answer, as in the training template."""
    template: str = "{value}"
    """What the answer looks like; ``{value}`` is the field. Begin it as the training template does (a blank, say)."""
    ends: bool = True
    """Whether the end-of-text token is part of the answer; false where training goes on after it."""
    choices: int | None = Field(default=50, ge=2)
    """Candidates of a question, the right one among them; null for every value that occurs."""
    candidates_from: Path | None = None
    """Manifest whose values of ``field`` are candidates; null for the values of the set itself."""
    seed: int = 0
    """Of the draw of samples, candidates and permutation."""
    limit: int | None = Field(default=None, ge=2)
    """Ask about so many samples at most, drawn at random; null for all."""
    transforms: TransformConfig | None = None
    """How an image becomes views; null for the transform of the first data set, without augmentation."""
    normalise: Normalise = Normalise.NONE
    """How candidates are compared."""

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        if names != ["value"]:
            raise ValueError("expected text with {value} in it once, and no other field")
        return template


class CaptionsConfig(StrictConfig):
    """Captions for the report."""

    num_images: int = Field(default=12, ge=1)
    """Images of each set."""
    sets: tuple[str, ...] | None = None
    """Names of the sets; null for all."""
    prompt: str | None = None
    """Prompt in place of the one of the set."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Longest caption, tokens."""
    sampling: SamplingConfig = SamplingConfig()
    """How tokens are chosen."""


class EvaluationConfig(StrictConfig):
    """The ``evaluation`` block of a run."""

    sets: tuple[HeldOutSet, ...] = ()
    """Sets scored at the end of the run."""
    captions: CaptionsConfig | None = CaptionsConfig()
    """Captions of held-out images for the report; null for none."""
    tokens_per_forward: int = Field(default=8192, ge=1)
    """Tokens of one forward at most (memory)."""
    rows_per_head: int = Field(default=1024, ge=1)
    """Rows that meet the vocabulary at a time: rows times vocabulary float32 are held at once."""

    @model_validator(mode="after")
    def _check_names(self) -> EvaluationConfig:
        names = [held.name for held in self.sets]
        if len(set(names)) != len(names):
            raise ValueError(f"sets need names of their own, got {names}")
        wanted = self.captions.sets if self.captions is not None else None
        unknown = sorted(set(wanted or ()) - set(names))
        if unknown:
            raise ValueError(f"captions.sets names {unknown}; the sets are {names}")
        return self
