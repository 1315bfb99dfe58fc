"""A checksum of the global batch of each step, to show that it does not depend on ranks, workers and resumes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import torch

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.document import IGNORE
from data_pipeline.errors import DataConfigError
from data_pipeline.loader.loader import Loader, LoaderState
from data_pipeline.media_spec import MediaSpec


def digest(
    config: DataConfig,
    spec: MediaSpec,
    seed: int,
    steps: range,
    world_size: int = 1,
    workers: int = 0,
    resume_at: int | None = None,
    resume_world_size: int | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (step, sha256) of each global batch.

    The hash covers, for every lane in order, its number, token ids, labels and pixel bytes. It covers the loss weights
    of a lane only if they are not the default: 1 for each learned token, or 1 for each pair.

    Args:
        config: The data block.
        spec: The model's inputs.
        seed: Seed of the run.
        steps: Steps to report. All earlier steps are loaded too, because a pack depends on them.
        world_size: Number of ranks to simulate, one after the other in this process.
        workers: Number of worker processes of each rank.
        resume_at: Before this step, save the state and continue with new loaders; None: no resume.
        resume_world_size: Number of ranks after the resume; None: ``world_size``.

    Raises:
        DataConfigError: ``steps`` has a negative start or a step other than 1.
    """
    if steps.step != 1 or steps.start < 0:
        raise DataConfigError(f"steps {steps}: expected A:B with 0 <= A <= B")
    config = config.model_copy(update={"workers": workers})
    loaders = _open(config, spec, seed, world_size, None)
    try:
        states: list[LoaderState] = []
        for step in range(steps.stop):
            if step == resume_at:
                loaders = _reopen(loaders, states, config, spec, seed, resume_world_size or world_size)
            batches = [next(loader) for loader in loaders]
            states = [batch.state for batch in batches]
            if step >= steps.start:
                yield step, step_digest([micro for batch in batches for micro in batch.microbatches])
    finally:
        for loader in loaders:
            loader.close()


def _open(config: DataConfig, spec: MediaSpec, seed: int, world_size: int, state: LoaderState | None) -> list[Loader]:
    ranks = range(world_size)
    return [Loader(config, spec, seed=seed, rank=rank, world_size=world_size, state=state) for rank in ranks]


def _reopen(
    loaders: list[Loader],
    states: list[LoaderState],
    config: DataConfig,
    spec: MediaSpec,
    seed: int,
    world_size: int,
) -> list[Loader]:
    """Return new loaders from the merged state, after a round trip through its JSON form."""
    for loader in loaders:
        loader.close()
    saved = LoaderState.merge([LoaderState.from_json(state.to_json()) for state in states]) if states else None
    return _open(config, spec, seed, world_size, saved)


def step_digest(microbatches: list[MultimodalBatch]) -> str:
    """Return the sha256 of microbatches of one lane each, in any order; dummy packs are ignored."""
    total = hashlib.sha256()
    for batch in sorted((batch for batch in microbatches if batch.lanes != (-1,)), key=lambda batch: batch.lanes):
        total.update(str(batch.lanes).encode())
        blocks = [block for _, block in sorted(batch.media.items())]
        pixels = [block.values for block in blocks] + [block.later_values for block in blocks if len(block.later_index)]
        pixels += [] if batch.uncoded is None else [batch.uncoded.values]
        weights = [] if _has_default_weights(batch) else [batch.loss_weights]
        for tensor in (batch.token_ids, batch.labels, *pixels, *weights):
            total.update(f"{tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def _has_default_weights(batch: MultimodalBatch) -> bool:
    """Return whether labels and segments determine the weights, so that the digest can omit them."""
    if torch.equal(batch.loss_weights, (batch.labels != IGNORE).to(batch.loss_weights.dtype)):
        return True
    of_pairs = torch.zeros_like(batch.loss_weights)
    for (start, end), origin in zip(itertools.pairwise(batch.segments.bounds), batch.provenance, strict=True):
        if origin is not None and end - start > 1:
            of_pairs[end - 2] = 1
    return torch.equal(batch.loss_weights, of_pairs)
