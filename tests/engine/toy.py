"""A small replacement of the multimodal model with the engine's whole interface, tied weights, a gate and a buffer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.engine.construct import Gather

VOCABULARY, WIDTH, PATCH = 37, 12, 10


@dataclass(frozen=True)
class ToyBatch:
    token_ids: Tensor
    labels: Tensor
    pixels: Tensor
    loss_weights: Tensor

    @property
    def weight(self) -> float:
        return float(self.loss_weights.double().sum())

    def to(self, device: torch.device, non_blocking: bool = False) -> ToyBatch:
        del non_blocking
        return replace(self, token_ids=self.token_ids.to(device), pixels=self.pixels.to(device))


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


class ToyDecoder(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)


class ToyConnector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(self.gate) * self.project(features)


class ToyModel(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.vision = nn.Linear(PATCH, WIDTH)
        self.connector = ToyConnector()
        self.decoder = ToyDecoder(blocks)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.decoder.embed.weight
        self.register_buffer("counts", torch.arange(3.0))

    def components(self) -> dict[str, list[nn.Parameter]]:
        return {
            "vision": list(self.vision.parameters()),
            "connector": list(self.connector.parameters()),
            "embedding": [self.head.weight],
            "decoder": [*self.decoder.blocks.parameters(), *self.decoder.norm.parameters()],
        }

    def checkpoint_units(self) -> list[nn.Module]:
        return list(self.decoder.blocks)

    def forward(self, batch: ToyBatch) -> Tensor:
        hidden = self.decoder.embed(batch.token_ids)
        hidden = hidden + self.connector(self.vision(batch.pixels.to(self.vision.weight.dtype))).mean(0)
        for block in self.decoder.blocks:
            hidden = block(hidden)
        return self.decoder.norm(hidden)


@dataclass(frozen=True)
class ToyOutput:
    loss_sum: Tensor
    metrics: dict[str, Tensor]
    document_losses: Tensor
    router: None = None
    statistics: tuple[()] = ()
    parts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class ToyObjective:
    teachers = ()

    def weight(self, batch: ToyBatch) -> float:
        return batch.weight

    def __call__(self, model: nn.Module, batch: ToyBatch) -> ToyOutput:
        logits = model.head(model(batch))
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none") * batch.loss_weights
        hits = (logits.argmax(-1) == batch.labels) * batch.loss_weights
        return ToyOutput(losses.sum(), {"accuracy": hits.sum()}, losses.sum().reshape(1))


def initialise_(model: nn.Module, gather: Gather, seed: int = 0) -> None:
    """Return the values by name."""
    for name, parameter in model.named_parameters():
        with gather([parameter]), torch.no_grad():
            generator = torch.Generator().manual_seed(seed + sum(name.encode()) * 7919)
            start = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(start + 0.2 * torch.randn(parameter.shape, generator=generator))


def toy_model(seed: int = 0, blocks: int = 2) -> ToyModel:
    model = ToyModel(blocks)
    initialise_(model, nullcontext, seed)
    return model


def toy_batch(step: int, lane: int, *, empty: bool = False) -> ToyBatch:
    """Return lane ``lane`` of the global batch at ``step``, with a length of its own; a dummy pack if ``empty``."""
    generator = torch.Generator().manual_seed(1000 * step + lane)
    tokens = 1 + int(torch.randint(3, 19, (1,), generator=generator))
    ids = torch.randint(0, VOCABULARY, (tokens + 1,), generator=generator)
    weights = (torch.rand(tokens, generator=generator) > 0.2).float() * (0.0 if empty else 1.0)
    return ToyBatch(ids[:-1], ids[1:], torch.randn(1 + lane % 3, PATCH, generator=generator), weights)
