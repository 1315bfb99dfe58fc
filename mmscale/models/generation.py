"""Generation: continues packed prompts by one token per sequence and step, with cached keys and values.

prompts --one forward--> last rows --logits, ``choose_tokens``--> new tokens --one forward--> their rows --> ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.batch import MultimodalBatch, Segments
from mmscale.models.kv_cache import KVCache
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig, choose_tokens

TokenCallback = Callable[[int, list[int]], bool]
"""Called with the index of a document in the batch and its new tokens so far; returning True ends the sequence."""


@torch.no_grad()
def generate(
    model: MultimodalModel,
    batch: MultimodalBatch,
    max_new_tokens: int,
    eos_id: int,
    sampling: SamplingConfig = SamplingConfig(),
    *,
    stop_ids: Collection[int] = (),
    watch: TokenCallback | None = None,
    any_running: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continue every prompt of a batch.

    Args:
        model: A model in evaluation mode, as built or sharded by ZeRO-3 (then set ``any_running``).
        batch: Packed prompts (documents without their answers) on the model's device.
        max_new_tokens: Most new tokens per sequence.
        eos_id: Token that ends a sequence; not part of the result.
        sampling: Settings for choosing the next token.
        stop_ids: Further tokens that end a sequence and are not part of the result, for example the end of a turn.
        watch: Called after each new token that is part of the result; may end the sequence.
        any_running: Called after each token with whether a sequence of this batch is unfinished; returns whether to run
            another forward pass. For a sharded model, return whether any rank has an unfinished sequence, so that all
            ranks run equally many forward passes. All ranks must then call this function.

    Returns:
        New tokens of each document in order, without dummy documents.

    Raises:
        ValueError: a document has branches, or the longest prompt with its new tokens exceeds ``learned_positions``.
    """
    is_real = _real_documents(batch)
    rows: list[list[int]] = [[] for _ in is_real]
    if max_new_tokens < 1:
        return [row for row, keep in zip(rows, is_real, strict=True) if keep]
    ends = {eos_id, *stop_ids}
    cache = KVCache(capacity=batch.segments.longest + max_new_tokens)
    generator = sampling.generator(batch.token_ids.device)
    last = batch.segments.cu[1:].long() - 1
    hidden = model(batch, cache=cache).hidden.index_select(0, last)
    step = _first_step(batch, last)
    running = [number for number, keep in enumerate(is_real) if keep]
    seen: Bool[Tensor, "S V"] | None = None
    for number in range(max_new_tokens):
        logits = model.head(hidden)
        if sampling.repetition_penalty != 1:
            seen = _prompt_tokens(batch, logits) if seen is None else seen.scatter(1, step.token_ids[:, None], True)
        chosen = choose_tokens(logits, sampling, generator, seen)
        running = _append_tokens(rows, chosen.tolist(), running, ends, watch)
        if number + 1 == max_new_tokens or not any_running(bool(running)):
            break
        step = _with_tokens(step, chosen)
        hidden = model(step, cache=cache).hidden
    return [row for row, keep in zip(rows, is_real, strict=True) if keep]


def _append_tokens(
    rows: list[list[int]], chosen: list[int], running: list[int], ends: Collection[int], watch: TokenCallback | None
) -> list[int]:
    """Append the chosen tokens to the running sequences; return those that continue."""
    still_running = []
    for number in running:
        if chosen[number] in ends:
            continue
        rows[number].append(chosen[number])
        if watch is None or not watch(number, rows[number]):
            still_running.append(number)
    return still_running


def _prompt_tokens(batch: MultimodalBatch, like: Float[Tensor, "S V"]) -> Bool[Tensor, "S V"]:
    """Return a mask of the tokens in each sequence's prompt. Ids without a logit are left out."""
    counts = batch.segments.cu.diff().long()
    owner = torch.arange(len(counts), device=like.device).repeat_interleave(counts)
    seen = torch.zeros_like(like, dtype=torch.bool)
    has_logit = batch.token_ids < like.shape[1]
    seen[owner[has_logit], batch.token_ids[has_logit]] = True
    return seen


def _first_step(batch: MultimodalBatch, last: Tensor) -> MultimodalBatch:
    """Return a batch with one row per sequence, at the position of its last prompt token."""
    pieces = Segments.from_lengths([1] * batch.segments.num)
    segments = Segments(pieces.cu.to(last.device), pieces.bounds)
    position_ids = batch.position_ids.index_select(0, last)
    if position_ids.dim() == 2:  # New text continues at the largest position of all axes (Qwen2-VL, section 2.1).
        position_ids = position_ids.amax(1, keepdim=True).expand(-1, 3)
    ones = torch.ones(len(last), device=last.device)
    return MultimodalBatch(last, last, ones * 0, position_ids, segments, ones.bool())


def _with_tokens(step: MultimodalBatch, tokens: Tensor) -> MultimodalBatch:
    return MultimodalBatch(tokens, step.labels, step.loss_weights, step.position_ids + 1, step.segments, step.valid)


def _real_documents(batch: MultimodalBatch) -> list[bool]:
    """Return whether each document is real rather than a dummy document."""
    starts = batch.segments.cu[:-1].long()
    return batch.valid.index_select(0, starts).tolist()
