"""Contrastive models and batches for tests, a reference loss, and training steps on real ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import Document, ImageExtent, MediaItem, Span
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Provenance
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.contrastive import Contrastive
from mmscale.optim.stages import StageConfig
from tests.models.tiny import DECODER, LEARNED, VISION, VOCAB

SOFTMAX = {"kind": "contrastive", "dim": 12}
SIGMOID = {"kind": "contrastive", "dim": 12, "pool": "mean", "loss": "sigmoid", "bias_init": -1.0}
CAPPED = {"kind": "contrastive", "dim": 12, "scale_init": 20.0, "max_scale": 20.0}
SCALE_PAST_ITS_LIMIT = 0.25


def model_config(connector: dict[str, Any]) -> ModelConfig:
    pooled = connector.get("pool") == "mean"
    vision = VISION if pooled else {**LEARNED, "class_feature": True}
    return ModelConfig.model_validate({"decoder": DECODER, "vision": vision, "connector": connector})


def pair_document(spec: MediaSpec, number: int) -> Document:
    """Return a document of one image and some text tokens. Crops have several sizes if the tower accepts them."""
    generator = torch.Generator().manual_seed(number)
    length = 3 + number % 4
    ids = torch.randint(4, VOCAB, (length,), generator=generator).int().numpy()
    height, width = spec.fixed_grid or (1 + number % 3, 2)
    values = torch.randint(0, 256, (height * width, spec.patch_dim), dtype=torch.uint8, generator=generator).numpy()
    return Document(
        token_ids=ids,
        labels=ids,
        loss_weights=torch.ones(length).numpy(),
        position_ids=torch.arange(length).int().numpy(),
        items=(MediaItem(values, (1, height, width), embedded=False),),
        scatter_index=ids[:0],
        spans=(Span(0, ()),),
        provenance=Provenance("d", "s", str(number), number),
        images=(ImageExtent(1, 0, 1),),
    )


def batch_of(spec: MediaSpec, numbers: list[int]) -> MultimodalBatch:
    """Return a batch of these pairs, followed by a dummy document."""
    documents = [pair_document(spec, number) for number in numbers]
    return collate([Pack((*documents, dummy_document(spec, 0)), 0)], spec)


def written_out(config: ModelConfig, vectors: Any) -> tuple[Tensor, Tensor]:
    """Return the mean loss of all pairs and each pair's term, from the whole matrix of similarities."""
    scale = vectors.log_scale.clamp(max=torch.tensor(config.connector.max_scale).log()).exp()  # type: ignore[union-attr]
    logits = scale * vectors.images @ vectors.texts.T
    n = len(logits)
    if vectors.bias is None:
        own = torch.arange(n)
        rows = F.cross_entropy(logits, own, reduction="none")
        shares = (rows + F.cross_entropy(logits.T, own, reduction="none")) / 2
    else:
        losses = -F.logsigmoid((2 * torch.eye(n) - 1) * (logits + vectors.bias))
        shares = (losses.sum(0) + losses.sum(1)) / 2
    return shares.sum() / n, shares


def make_engine(world: World, connector: dict[str, Any], zero: int, past: float = 0.0, **config: Any) -> Engine:
    """Return an engine that trains by AdamW; ``past`` is added to the initial logarithm of the scale."""
    settings = model_config(connector)
    options = EngineConfig(zero_stage=zero, device="cpu", precision="fp32", timeout_seconds=60, **config)  # type: ignore[arg-type]

    def first_values(model: Any, *, gather: Any) -> None:
        model.connector.constant_init["logit_scale"] += past
        initialise_(model, 3, gather)

    model = construct(lambda: build_model(settings, attention="sdpa", seed=None), options, world, first_values)
    stage = StageConfig(name="contrast", steps=9, learning_rate={"default": 1e-2}, schedule="constant", clip=0.0)
    objective = Contrastive(settings.connector, world)  # type: ignore[arg-type]
    return Engine(model, objective, stage, options, world)


def train(world: World, cases: list[dict[str, Any]]) -> list[Any]:
    """Run several engines in one set of processes; return the step reports of each."""
    return [_train(world, **case) for case in cases]


def _train(world: World, steps: list[list[list[list[int]]]], **options: Any) -> Any:
    """Train; ``steps[n][rank]`` contains the pairs of each microbatch."""
    engine = make_engine(world, **options)
    spec = media_spec(engine.model.config)  # type: ignore[arg-type]
    reports = []
    for step in steps:
        mine = step[world.rank]
        report = engine.train_step([batch_of(spec, numbers) for numbers in mine], component_norms=True)
        reports.append(
            {
                "loss": report.loss,
                "weight": report.weight,
                "norms": report.component_grad_norms,
                "metrics": report.metrics,
                "documents": [
                    losses[: len(numbers)] for losses, numbers in zip(report.document_losses, mine, strict=True)
                ],
            }
        )
    engine.close()
    return {"reports": reports}
