"""Continues prompts, one token a sequence and step, with cached keys and values.

prompts --one forward--> last rows --logits, drawn from as ``sampling`` says--> tokens --one forward--> rows ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.batch import MultimodalBatch, Segments
from mmscale.models.kv_cache import KVCache
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig, pick

Watch = Callable[[int, list[int]], bool]
"""Called with the number of a sequence and its new tokens so far; True ends the sequence."""


@torch.no_grad()
def generate(
    model: MultimodalModel,
    batch: MultimodalBatch,
    max_new_tokens: int,
    eos_id: int,
    sampling: SamplingConfig = SamplingConfig(),
    *,
    stop_ids: Collection[int] = (),
    watch: Watch | None = None,
    lockstep: bool = False,
) -> list[list[int]]:
    """Continues every prompt of a batch.

    Args:
        model: As built, or sharded by ZeRO-3 (then see ``lockstep``).
        batch: Prompts, on the model's device: documents without their answers, packed.
        max_new_tokens: At most so many each.
        eos_id: Ends a sequence; not part of the result.
        sampling: How the next token is chosen.
        stop_ids: Further tokens that end a sequence, as ``eos_id`` does: what closes a turn, say.
        watch: Sees each sequence grow, after each of its tokens, and may end it there.
        lockstep: Make exactly ``max_new_tokens`` forwards, so that all ranks of a sharded model make equally many
            calls. All ranks must call together then. Otherwise it stops when every sequence has ended.

    Returns:
        New tokens of each document in order; null documents are left out.
    """
    wanted = _wanted(batch)
    rows: list[list[int]] = [[] for _ in wanted]
    if max_new_tokens < 1:
        return [row for row, keep in zip(rows, wanted, strict=True) if keep]
    ends = {eos_id, *stop_ids}
    cache = KVCache(capacity=batch.segments.longest + max_new_tokens)
    generator = sampling.generator(batch.token_ids.device)
    last = batch.segments.cu[1:].long() - 1
    hidden = model(batch, cache=cache).hidden.index_select(0, last)
    step = _first_step(batch, last)
    running = [number for number, keep in enumerate(wanted) if keep]
    seen: Bool[Tensor, "S V"] | None = None
    for number in range(max_new_tokens):
        logits = model.head(hidden)
        if sampling.repetition_penalty != 1:
            seen = _prompt_tokens(batch, logits) if seen is None else seen.scatter(1, step.token_ids[:, None], True)
        chosen = pick(logits, sampling, generator, seen)
        running = _grown(rows, chosen.tolist(), running, ends, watch)
        if number + 1 == max_new_tokens or (not lockstep and not running):
            break
        step = _with_tokens(step, chosen)
        hidden = model(step, cache=cache).hidden
    return [row for row, keep in zip(rows, wanted, strict=True) if keep]


def _grown(
    rows: list[list[int]], chosen: list[int], running: list[int], ends: Collection[int], watch: Watch | None
) -> list[int]:
    """Appends the chosen tokens to the sequences that run; those that run on."""
    going = []
    for number in running:
        if chosen[number] in ends:
            continue
        rows[number].append(chosen[number])
        if watch is None or not watch(number, rows[number]):
            going.append(number)
    return going


def _prompt_tokens(batch: MultimodalBatch, like: Float[Tensor, "S V"]) -> Bool[Tensor, "S V"]:
    """Which tokens the prompt of each sequence holds, of those that have a logit: some ids are read alone."""
    counts = batch.segments.cu.diff().long()
    owner = torch.arange(len(counts), device=like.device).repeat_interleave(counts)
    seen = torch.zeros_like(like, dtype=torch.bool)
    sayable = batch.token_ids < like.shape[1]
    seen[owner[sayable], batch.token_ids[sayable]] = True
    return seen


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
