"""Generation: continues packed prompts by one token per sequence and step, with cached keys and values.

prompts --one forward--> last rows --logits, ``choose_tokens``--> new tokens --one forward--> their rows --> ...

``generate`` writes text. ``draw`` draws images: it chooses among codes only, and writes the ends of rows itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.batch import MultimodalBatch, Segments
from mmscale.models.kv_cache import KVCache
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig, choose_tokens, guided_logits
from mmscale.nn.host import to_device

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
    running = [number for number, keep in enumerate(is_real) if keep]
    continued = running or [0]  # A rank without prompts runs the passes of a sharded model with a dummy document.
    step, hidden = _prefill(model, batch, cache, continued)
    seen: Bool[Tensor, "S V"] | None = None
    for number in range(max_new_tokens):
        logits = model.head(hidden)
        if sampling.repetition_penalty != 1:
            if seen is None:
                seen = _prompt_tokens(batch, continued, logits)
            else:
                seen = seen.scatter(1, step.token_ids[:, None], True)
        chosen = choose_tokens(logits, sampling, generator, seen)
        running = _append_tokens(rows, dict(zip(continued, chosen.tolist(), strict=True)), running, ends, watch)
        if number + 1 == max_new_tokens or not any_running(bool(running)):
            break
        step = _with_tokens(step, chosen)
        hidden = model(step, cache=cache).hidden
    return [row for row, keep in zip(rows, is_real, strict=True) if keep]


@dataclass(frozen=True)
class ImageGrid:
    """The tokens of an image to draw: its codes row by row, each row with its end.

    Attributes:
        rows: Rows of codes, at least 1.
        columns: Columns of codes, at least 1.
        row_end: Token id after each row (Emu3); None if rows follow each other directly (Janus).
    """

    rows: int
    columns: int
    row_end: int | None = None

    @property
    def num_steps(self) -> int:
        """Number of tokens up to the last code. The end of the last row is not among them."""
        return self.code_steps[-1] + 1

    @property
    def code_steps(self) -> list[int]:
        """The 0-based steps whose token is a code, in reading order."""
        width = self.columns + (self.row_end is not None)
        return [row * width + column for row in range(self.rows) for column in range(self.columns)]

    def forced_token(self, step: int) -> int | None:
        """Return the token of a step without a choice: the end of a row, or 0 after the last code; None for a code."""
        if step >= self.num_steps:
            return 0
        return None if self.row_end is None or (step + 1) % (self.columns + 1) else self.row_end


@torch.no_grad()
def draw(
    model: MultimodalModel,
    batch: MultimodalBatch,
    grids: Sequence[ImageGrid],
    sampling: SamplingConfig = SamplingConfig(temperature=1.0),
    *,
    guidance: float = 1.0,
) -> list[Int[Tensor, "rows columns"]]:
    """Draw one image for each prompt.

    Each image has a random generator of its own, seeded with ``sampling.seed`` plus its number. An image therefore does
    not depend on how many others are drawn with it, except for rounding.

    Args:
        model: A model in evaluation mode whose ``decoder.image_tokens`` is set. If ZeRO-3 shards it, all ranks must
            call with the same largest ``num_steps`` of their grids.
        batch: Packed prompts on the model's device; a code follows the last token of each. With ``guidance``, the N
            prompts come first, and then N documents with the same end but without the text to draw, in the same order.
        grids: Rows and columns of each of the N images.
        sampling: Settings for choosing codes. ``repetition_penalty`` must be 1: images repeat codes.
        guidance: Scale s of classifier-free guidance: codes are chosen from ``u + s (c - u)`` with the logits c of the
            prompt and u of the document without text. 1 for no guidance.

    Returns:
        The codes of each image, from 0, int64.

    Raises:
        ValueError: the model draws no images, a grid is empty, the batch has another number of documents, a document
            has branches, or a setting is out of range.

    Source: Ho and Salimans 2022, "Classifier-free diffusion guidance"; Janus (arXiv 2410.13848), section 3.3.
    """
    device, copies = batch.token_ids.device, 1 if guidance == 1 else 2
    prompts = [number for number, keep in enumerate(_real_documents(batch)) if keep]
    _check_drawing(model, grids, sampling, guidance, len(prompts))
    ids, num_steps = model.config.decoder.image_ids, max(grid.num_steps for grid in grids)
    cache = KVCache(capacity=batch.segments.longest + num_steps)
    generators = [
        own for number in range(len(grids)) if (own := sampling.for_sequence(number).generator(device)) is not None
    ]
    step, hidden = _prefill(model, batch, cache, prompts)
    drawn: list[Tensor] = []
    for number in range(num_steps):
        logits = guided_logits(_code_logits(model, hidden), guidance)
        forced = [grid.forced_token(number) for grid in grids]
        # Choose for all images in one call; the generator of an image whose token is forced must not advance.
        free = [index for index, token in enumerate(forced) if token is None]
        drawn.append(to_device(torch.tensor([token or 0 for token in forced]), device))
        if free:
            random = [generators[index] for index in free] if generators else None
            index = to_device(torch.tensor(free), device)
            chosen = choose_tokens(logits.index_select(0, index), sampling, random)
            drawn[-1].index_copy_(0, index, chosen + ids.start)
        if number + 1 == num_steps:
            break
        step = _with_tokens(step, drawn[-1].repeat(copies))
        hidden = model(step, cache=cache).hidden
    codes = torch.stack(drawn) - ids.start
    return [codes[grid.code_steps, number].view(grid.rows, grid.columns) for number, grid in enumerate(grids)]


def _check_drawing(
    model: MultimodalModel,
    grids: Sequence[ImageGrid],
    sampling: SamplingConfig,
    guidance: float,
    documents: int,
) -> None:
    """Raise ``ValueError`` if ``draw`` cannot use its arguments."""
    if not model.config.decoder.image_ids:
        raise ValueError("the model draws no images: its decoder.image_tokens is null")
    if not grids or min(min(grid.rows, grid.columns) for grid in grids) < 1:
        raise ValueError(f"grids={list(grids)}: at least one image, and at least one row and one column")
    if guidance < 1:
        raise ValueError(f"guidance={guidance:g}: must be at least 1, which is no guidance")
    if sampling.repetition_penalty != 1:
        raise ValueError(f"repetition_penalty={sampling.repetition_penalty:g}: images repeat codes; set it to 1")
    if documents != len(grids) * (1 if guidance == 1 else 2):
        without = " and as many without text, for guidance" if guidance != 1 else ""
        raise ValueError(f"the batch has {documents} documents; {len(grids)} images need {len(grids)} prompts{without}")


def _code_logits(model: MultimodalModel, hidden: Float[Tensor, "S D"]) -> Float[Tensor, "S C"]:
    """Return the logits of codes only."""
    if model.head.image is not None:
        logits: Tensor = model.head.image(hidden)
        return logits
    ids = model.config.decoder.image_ids
    return model.head(hidden)[:, ids.start : ids.stop]


def _append_tokens(
    rows: list[list[int]],
    chosen: Mapping[int, int],
    running: list[int],
    ends: Collection[int],
    watch: TokenCallback | None,
) -> list[int]:
    """Append the chosen tokens, by document, to the running sequences; return those that continue."""
    still_running = []
    for number in running:
        if chosen[number] in ends:
            continue
        rows[number].append(chosen[number])
        if watch is None or not watch(number, rows[number]):
            still_running.append(number)
    return still_running


def _prompt_tokens(batch: MultimodalBatch, documents: list[int], like: Float[Tensor, "S V"]) -> Bool[Tensor, "S V"]:
    """Return a mask of the tokens in the prompts of S documents. Ids without a logit are left out."""
    counts = batch.segments.cu.diff().long()
    owner = torch.arange(len(counts), device=like.device).repeat_interleave(counts)
    seen = like.new_zeros(len(counts), like.shape[1], dtype=torch.bool)
    has_logit = batch.token_ids < like.shape[1]
    seen[owner[has_logit], batch.token_ids[has_logit]] = True
    return seen[documents]


def _prefill(
    model: MultimodalModel, batch: MultimodalBatch, cache: KVCache, documents: list[int]
) -> tuple[MultimodalBatch, Float[Tensor, "S D"]]:
    """Fill the cache. Return a batch with the last token of each of S documents, and their hidden rows.

    The cache keeps these documents only.
    """
    last = (batch.segments.cu[1:].long() - 1)[documents]
    hidden = model(batch, cache=cache).hidden.index_select(0, last)
    cache.keep(documents)
    pieces = Segments.from_lengths([1] * len(documents))
    segments = Segments(to_device(pieces.cu, last.device), pieces.bounds)
    position_ids = batch.position_ids.index_select(0, last)
    if position_ids.dim() == 2:  # New text continues at the largest position on all axes (Qwen2-VL, section 2.1).
        bounds = batch.segments.bounds
        prompts = [batch.position_ids[bounds[number] : bounds[number + 1]] for number in documents]
        position_ids = torch.stack([prompt.max() for prompt in prompts])[:, None].expand(-1, 3)
    ones = torch.ones(len(last), device=last.device)
    tokens = batch.token_ids.index_select(0, last)
    step = MultimodalBatch(tokens, tokens, ones * 0, position_ids, segments, ones.bool(), num_tokens=len(documents))
    return step, hidden


def _with_tokens(step: MultimodalBatch, tokens: Tensor) -> MultimodalBatch:
    return replace(step, token_ids=tokens, position_ids=step.position_ids + 1)


def _real_documents(batch: MultimodalBatch) -> list[bool]:
    """Return whether each document is real rather than a dummy document."""
    starts = batch.segments.cu[:-1].long()
    return batch.valid.index_select(0, starts).tolist()
