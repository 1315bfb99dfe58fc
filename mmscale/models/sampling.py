"""Which token comes next: from logits to a choice, greedy or drawn.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

The order and each rule are those of ``transformers``, so settings published with a model mean the same here.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.io.strict import StrictConfig


class SamplingConfig(StrictConfig):
    """How tokens are chosen; the default takes the likeliest one each time."""

    temperature: float = Field(default=0.0, ge=0)
    """Divides the logits; below 1 sharper, above 1 flatter. 0 draws nothing: the likeliest token is taken."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw from so many tokens, the likeliest; null from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this sum; 1 from all. Source: Holtzman et al. 2020, "The
    curious case of neural text degeneration", section 3.1."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw from tokens at least so likely, relative to the likeliest; 0 from all. Source: arXiv 2407.01082."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides positive logits of tokens that prompt or answer hold already, and multiplies negative ones; 1 does
    nothing. Source: CTRL (arXiv 1909.05858), section 4.1."""
    seed: int = 0
    """Of the draws."""

    @model_validator(mode="before")
    @classmethod
    def _read_kind(cls, values: Any) -> Any:
        """Configurations written before named one of two kinds, whose defaults these were."""
        if not isinstance(values, dict) or "kind" not in values:
            return values
        given = {key: value for key, value in values.items() if key != "kind"}
        if values["kind"] == "nucleus":
            return {"temperature": 1.0, "top_p": 0.9, **given}
        if values["kind"] != "greedy" or given:
            raise ValueError("kind: greedy takes no further key, nucleus draws; or leave kind out and set temperature")
        return given

    @property
    def draws(self) -> bool:
        """Whether chance takes part."""
        return self.temperature > 0

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What draws; None where nothing is drawn."""
        return torch.Generator(device).manual_seed(self.seed) if self.draws else None


def pick(
    logits: Float[Tensor, "S V"],
    sampling: SamplingConfig,
    generator: torch.Generator | None,
    seen: Bool[Tensor, "S V"] | None = None,
) -> Int[Tensor, " S"]:
    """The next token of each sequence; ``seen`` says which tokens each holds already, for the penalty."""
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not sampling.draws:
        return logits.argmax(-1)
    return torch.multinomial(allowed(logits, sampling).softmax(-1), 1, generator=generator).squeeze(1)


def allowed(logits: Float[Tensor, "S V"], sampling: SamplingConfig) -> Float[Tensor, "S V"]:
    """Logits over the temperature, minus infinity where a token may not be drawn; the likeliest always may."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, tokens = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # Of all likelier tokens: 0 for the first, so one always stays.
        dropped = (before >= sampling.top_p).gather(1, tokens.argsort(-1))  # Back into the order of the vocabulary.
        logits = logits.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
