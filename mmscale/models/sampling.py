"""Choice of the next token from logits, greedy or random.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

The rules and their order are those of ``transformers``, so settings published with a model have the same meaning here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.io.strict import StrictConfig


class SamplingConfig(StrictConfig):
    """Settings for choosing tokens. The default always takes the most likely token."""

    temperature: float = Field(default=0.0, ge=0)
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it. 0: always take the most likely token,
    whatever ``top_k``, ``top_p`` and ``min_p`` are."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw only from this many most likely tokens; null for no limit."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw only from the smallest set of most likely tokens whose probabilities sum to at least this; 1 for no limit.
    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw only from tokens with at least this probability relative to the most likely one; 0 for no limit. Source:
    arXiv 2407.01082."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Penalty on tokens that already occur in the prompt or the answer: divides their logit if positive, multiplies it
    if negative. 1 for no penalty. Source: CTRL (arXiv 1909.05858), section 4.1."""
    seed: int = 0
    """Seed of the random choice."""

    @model_validator(mode="before")
    @classmethod
    def _read_kind(cls, values: Any) -> Any:
        """Accept the older form with ``kind: greedy``, or ``kind: nucleus`` and its defaults."""
        if not isinstance(values, dict) or "kind" not in values:
            return values
        given = {key: value for key, value in values.items() if key != "kind"}
        if values["kind"] == "nucleus":
            return {"temperature": 1.0, "top_p": 0.9, **given}
        if values["kind"] != "greedy" or given:
            raise ValueError(
                "kind: must be greedy without further keys, or nucleus; better leave kind out and set temperature"
            )
        return given

    @property
    def is_random(self) -> bool:
        """Whether tokens are drawn at random rather than the most likely one taken."""
        return self.temperature > 0

    def for_sequence(self, number: int) -> SamplingConfig:
        """Return the settings with a seed of their own for the 0-based sequence ``number``."""
        return self.model_copy(update={"seed": self.seed + number})

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return a generator seeded with ``seed``, or None if the choice is not random."""
        return torch.Generator(device).manual_seed(self.seed) if self.is_random else None


def guided_logits(logits: Float[Tensor, "R V"], guidance: float) -> Float[Tensor, "S V"]:
    """Return ``u + guidance * (c - u)`` in float32: c is the first half of the rows, u the second.

    Logits and their log-softmax give the same distribution, because they differ by a constant in each row. With
    ``guidance == 1``, all rows are returned.
    """
    if guidance == 1:
        return logits.float()
    with_text, without = logits.float().chunk(2)
    return without + guidance * (with_text - without)


def choose_tokens(
    logits: Float[Tensor, "S V"],
    sampling: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seen: Bool[Tensor, "S V"] | None = None,
) -> Int[Tensor, " S"]:
    """Return the next token of each sequence.

    Args:
        logits: One row per sequence.
        sampling: Settings.
        generator: From ``sampling.generator``, or one for each row; not used if the choice is not random.
        seen: Tokens that each sequence already contains, for the repetition penalty; None for no penalty.
    """
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not sampling.is_random:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, sampling).softmax(-1)
    if not isinstance(generator, Sequence):
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    rows = zip(probabilities, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


def filter_logits(logits: Float[Tensor, "S V"], sampling: SamplingConfig) -> Float[Tensor, "S V"]:
    """Return the logits divided by the temperature, with minus infinity for tokens that must not be drawn.

    The temperature must be above 0. At least the most likely token of each row stays.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, tokens = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # Mass of the more likely tokens; 0 for the first, which stays.
        dropped = (before >= sampling.top_p).gather(1, tokens.argsort(-1))  # In vocabulary order.
        logits = logits.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
