"""The digest covers loss weights; with default weights it equals that of earlier versions."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.history.digest import step_digest
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec, Placement

PAIRS = MediaSpec(Placement.PAIR, patch_size=8, fixed_grid=(2, 2))


def without_weights(microbatches: list[MultimodalBatch]) -> str:
    """Return the digest as earlier versions computed it."""
    total = hashlib.sha256()
    for batch in sorted((batch for batch in microbatches if batch.lanes != (-1,)), key=lambda batch: batch.lanes):
        total.update(str(batch.lanes).encode())
        pixels = [block.values for _, block in sorted(batch.media.items())]
        for tensor in (batch.token_ids, batch.labels, *pixels):
            total.update(f"{tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def steps(config: DataConfig, spec: MediaSpec, count: int = 4) -> list[list[MultimodalBatch]]:
    with Loader(config, spec, seed=1) as loader:
        return [list(next(loader).microbatches) for _ in range(count)]


def captions(config: DataConfig, **template: Any) -> DataConfig:
    block = config.datasets[0].model_dump() | {"template": {"kind": "caption", **template}}
    return DataConfig.model_validate(config.model_dump() | {"datasets": [block]})


def test_default_weights_leave_the_digest_as_it_was_and_others_enter_it(
    mixture_config: DataConfig, hybrid_spec: MediaSpec
) -> None:
    pairs = steps(captions(mixture_config), PAIRS)
    for microbatches in [*steps(mixture_config, hybrid_spec), *pairs]:
        assert step_digest(microbatches) == without_weights(microbatches)
        for factor in (0.5, 2.0, 0.0):
            other = [replace(batch, loss_weights=batch.loss_weights * factor) for batch in microbatches]
            assert step_digest(other) != step_digest(microbatches)

    plain, shared = (steps(captions(mixture_config, loss_weight=rule), hybrid_spec) for rule in ("token", "sample"))
    for ours, theirs in zip(plain, shared, strict=True):
        assert torch.equal(ours[0].labels, theirs[0].labels)
        assert step_digest(ours) != step_digest(theirs)
