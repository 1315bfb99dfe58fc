"""Tiny image tokenizers, batches of random images, and training steps on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from mmscale.checkpoint import TrainState, resume, save
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_unset, media_spec
from mmscale.models.config import TokenizerConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.reconstruction import Reconstruct, ReconstructionConfig
from mmscale.optim.stages import StageConfig
from tests.models.packs import image_document, pack

LANES = 4


def tokenizer_config(**changes: Any) -> TokenizerConfig:
    block: dict[str, Any] = {
        "kind": "vqgan",
        "base_dim": 8,
        "multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_levels": [1],
        "latent_dim": 8,
        "codebook_size": 24,
        "code_dim": 4,
        "norm_groups": 4,
        "normalized_codes": "never",
        "idle_counts": True,
        **changes,
    }
    return TokenizerConfig.model_validate({"image_tokenizer": block, "image_size": 8})


def lane_batch(config: TokenizerConfig, step: int, lane: int, *, dummy: bool = False) -> MultimodalBatch:
    """Return the batch of one lane: two images, or a single dummy image."""
    spec = media_spec(config)
    numbers = [0] if dummy else [0, 1]
    grid = spec.fixed_grid
    assert grid is not None
    documents = [image_document(spec, 100 * step + 10 * lane + n, 2, [grid], 40, dummy=dummy) for n in numbers]
    return pack(documents, spec)


def train(
    world: World,
    config: dict[str, Any],
    losses: dict[str, Any],
    zero: int = 3,
    steps: int = 5,
    save_at: int | None = None,
    resume_from: str | None = None,
    folder: str = "",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Return losses, metrics, the codes and the buffers after the last step."""
    model_config = tokenizer_config(**config)
    engine_config = EngineConfig(zero_stage=zero, device="cpu", precision=precision, timeout_seconds=60)  # type: ignore[arg-type]
    parts = ["encoder", "decoder"] if model_config.image_tokenizer.codebook_update == "ema" else ["all"]
    stage = StageConfig.model_validate(
        {"name": "all", "steps": 40, "train": parts, "learning_rate": 3e-3, "schedule": "constant"}
    )

    def initialise(model: Any, *, gather: Any) -> None:
        initialise_(model, 5, gather)

    model = construct(lambda: build_unset(model_config), engine_config, world, initialise)
    objective = Reconstruct(ReconstructionConfig.model_validate(losses), model_config)
    engine = Engine(model, objective, stage, engine_config, world)
    first = 0 if resume_from is None else resume(engine, Path(resume_from)).step
    curve = []
    for step in range(first, steps):
        lanes = range(world.rank, LANES, world.world_size)
        # Lane 3 of every second step has no image.
        report = engine.train_step([lane_batch(model_config, step, n, dummy=n == 3 and step % 2 == 1) for n in lanes])
        curve.append([report.loss, report.grad_norm, *(report.metrics[name] for name in sorted(report.metrics))])
        if step + 1 == save_at:
            save(engine, TrainState(step + 1, 0, step + 1), Path(folder))
    buffers = {name: values.tolist() for name, values in model.named_buffers()}
    answer = {"curve": curve, "codes": codes(engine, model), "buffers": buffers, "names": sorted(report.metrics)}
    engine.close()
    return answer


def codes(engine: Engine, model: Any) -> list[list[float]]:
    """Return the whole codebook. All ranks must call."""
    tokenizer = model.image_tokenizer
    with engine.inference():
        found: Tensor = tokenizer.codebook(None, torch.arange(tokenizer.codebook_size)).codes
    rows: list[list[float]] = found.float().tolist()
    return rows


def train_cases(world: World, cases: list[dict[str, Any]]) -> list[Any]:
    """Run several engines in the same ranks, since starting ranks takes longer than training."""
    return [train(world, **case) for case in cases]
