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
from mmscale.models.vision import VisionConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.perceptual import PerceptualTower, shortened
from mmscale.objectives.reconstruction import Reconstruct, ReconstructionConfig
from mmscale.optim.stages import StageConfig
from tests.checkpoint.programs import digest
from tests.models.packs import image_document, pack

LANES = 4


GAME: dict[str, Any] = {"base_dim": 4, "halvings": 1, "norm_groups": 2}
"""A discriminator for images of 8 pixels."""


def tokenizer_config(discriminator: dict[str, Any] | None = None, **changes: Any) -> TokenizerConfig:
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
    return TokenizerConfig.model_validate({"image_tokenizer": block, "image_size": 8, "discriminator": discriminator})


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
    tower: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return losses, metrics, the codes and the buffers after the last step, and a digest of the saved or loaded state.

    ``save_at`` equal to the step that is resumed saves the loaded state again.
    """
    model_config = tokenizer_config(**config)
    engine_config = EngineConfig(zero_stage=zero, device="cpu", precision=precision, timeout_seconds=60)  # type: ignore[arg-type]
    averaged = model_config.image_tokenizer.codebook_update == "ema"
    parts = [part for part in model_config.components if not (averaged and part == "codebook")]
    rates = {part: 1e-2 if part == "discriminator" else 3e-3 for part in parts}
    block = {"name": "all", "steps": 40, "train": parts, "learning_rate": rates, "schedule": "constant"}
    stage = StageConfig.model_validate(block)

    def initialise(model: Any, *, gather: Any) -> None:
        initialise_(model, 5, gather)

    model = construct(lambda: build_unset(model_config), engine_config, world, initialise)
    loss = ReconstructionConfig.model_validate(losses)
    towers = []
    if tower is not None and loss.perceptual is not None:
        vision = shortened(VisionConfig.model_validate(tower), loss.perceptual.layers)
        alone = construct(lambda: build_unset(vision), engine_config, world, initialise)
        towers.append(PerceptualTower(alone, model_config.image_size))
    objective = Reconstruct(loss, model_config, towers)
    engine = Engine(model, objective, stage, engine_config, world)
    first = 0 if resume_from is None else resume(engine, Path(resume_from)).step
    curve: list[list[float]] = []
    state = "" if resume_from is None else digest(engine, world)
    if save_at == first:
        save(engine, TrainState(first, 0, first), Path(folder))
    for step in range(first, steps):
        lanes = range(world.rank, LANES, world.world_size)
        # Lane 3 of every second step has no image.
        report = engine.train_step([lane_batch(model_config, step, n, dummy=n == 3 and step % 2 == 1) for n in lanes])
        curve.append([report.loss, report.grad_norm, *(report.metrics[name] for name in sorted(report.metrics))])
        if step + 1 == save_at:
            save(engine, TrainState(step + 1, 0, step + 1), Path(folder))
            state = digest(engine, world)
    buffers = {name: values.tolist() for name, values in model.named_buffers()}
    names = sorted(report.metrics) if curve else []
    answer = {"curve": curve, "codes": codes(engine, model), "buffers": buffers, "names": names, "state": state}
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
