"""Continues prompts, one token a sequence and step, with cached keys and values."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from data_pipeline.batch import MultimodalBatch, Segments
from data_pipeline.strict import StrictConfig
from mmscale.models.kv_cache import KVCache
from mmscale.models.multimodal import MultimodalModel


class GreedyConfig(StrictConfig):
    """Always the likeliest token."""

    kind: Literal["greedy"] = "greedy"


class NucleusConfig(StrictConfig):
    """A draw among the likeliest tokens.

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.
    """

    kind: Literal["nucleus"] = "nucleus"
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits; below 1 sharper, above 1 flatter."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Of the draws."""


SamplingConfig = Annotated[GreedyConfig | NucleusConfig, Field(discriminator="kind")]


@torch.no_grad()
def generate(
    model: MultimodalModel,
    batch: MultimodalBatch,
    max_new_tokens: int,
    eos_id: int,
    sampling: GreedyConfig | NucleusConfig = GreedyConfig(),
    *,
    lockstep: bool = False,
) -> list[list[int]]:
    """Continues every prompt of a batch.

    Args:
        model: As built, or sharded by ZeRO-3 (then see ``lockstep``).
        batch: Prompts, on the model's device: documents without their answers, packed.
        max_new_tokens: At most so many each.
        eos_id: Ends a sequence; not part of the result.
        sampling: How the next token is chosen.
        lockstep: Make exactly ``max_new_tokens`` forwards, so that all ranks of a sharded model make equally many
            calls. All ranks must call together then. Otherwise it stops when every sequence has ended.

    Returns:
        New tokens of each document in order; null documents are left out.
    """
    if max_new_tokens < 1:
        return [[] for keep in _wanted(batch) if keep]
    cache = KVCache(capacity=batch.segments.longest + max_new_tokens)
    generator = None
    if isinstance(sampling, NucleusConfig):
        generator = torch.Generator(batch.token_ids.device).manual_seed(sampling.seed)
    last = batch.segments.cu[1:].long() - 1
    hidden = model(batch, cache=cache).hidden.index_select(0, last)
    step = _first_step(batch, last)
    tokens, ended = [], torch.zeros(step.segments.num, dtype=torch.bool, device=last.device)
    for number in range(max_new_tokens):
        chosen = pick(model.head(hidden), sampling, generator)
        tokens.append(torch.where(ended, eos_id, chosen))
        ended = ended | (chosen == eos_id)
        if number + 1 == max_new_tokens or (not lockstep and bool(ended.all())):
            break
        step = _with_tokens(step, chosen)
        hidden = model(step, cache=cache).hidden
    return _until_end(torch.stack(tokens, dim=1).tolist(), eos_id, _wanted(batch))


def pick(
    logits: Float[Tensor, "S V"], sampling: GreedyConfig | NucleusConfig, generator: torch.Generator | None
) -> Int[Tensor, " S"]:
    """The next token of each sequence."""
    if isinstance(sampling, GreedyConfig):
        return logits.argmax(-1)
    ordered, tokens = (logits.float() / sampling.temperature).softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # Probability of all likelier tokens: 0 for the first, so one always stays.
    kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
    place = torch.multinomial(kept, 1, generator=generator)
    return tokens.gather(1, place).squeeze(1)


def _first_step(batch: MultimodalBatch, last: Tensor) -> MultimodalBatch:
    """One row a sequence, at the position of its last prompt token."""
    pieces = Segments.from_lengths([1] * batch.segments.num)
    segments = Segments(pieces.cu.to(last.device), pieces.bounds)
    position_ids = batch.position_ids.index_select(0, last)
    if position_ids.dim() == 2:  # Text follows the furthest axis of what came before (Qwen2-VL, section 2.1).
        position_ids = position_ids.amax(1, keepdim=True).expand(-1, 3)
    ones = torch.ones(len(last), device=last.device)
    return MultimodalBatch(last, last, ones * 0, position_ids, segments, ones.bool())


def _with_tokens(step: MultimodalBatch, tokens: Tensor) -> MultimodalBatch:
    return MultimodalBatch(tokens, step.labels, step.loss_weights, step.position_ids + 1, step.segments, step.valid)


def _wanted(batch: MultimodalBatch) -> list[bool]:
    """Whether each document is no null document."""
    starts = batch.segments.cu[:-1].long()
    return batch.valid.index_select(0, starts).tolist()


def _until_end(rows: list[list[int]], eos_id: int, wanted: list[bool]) -> list[list[int]]:
    lengths = [row.index(eos_id) if eos_id in row else len(row) for row in rows]
    return [row[:length] for row, length, keep in zip(rows, lengths, wanted, strict=True) if keep]
