"""Preference pairs for tests: documents, a reference loss from separate sequences, and training steps on real ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import IGNORE, Document
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document, plain_document
from data_pipeline.sample import Provenance
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.init import initialise_
from mmscale.objectives.preference import Preference
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import PreferenceConfig, StageConfig
from tests.models.tiny import MOE, VOCAB, config

IMAGE_ID = 3
Pair = tuple[list[int], list[int], list[int]]
"""Token ids of a prompt, a chosen answer and a rejected answer."""


def pair(number: int) -> Pair:
    """Return a pair whose lengths depend on its number. The prompt has at least two tokens."""
    rng = np.random.default_rng(number)
    lengths = 2 + number % 5, 1 + number % 4, 1 + (number * 3) % 5
    prompt, chosen, rejected = (rng.integers(4, VOCAB, length).tolist() for length in lengths)
    return prompt, chosen, rejected


def pair_document(spec: MediaSpec, number: int, tokens: Pair | None = None) -> Document:
    """Return one document of the pair, after an image if the model takes one."""
    prompt, chosen, rejected = tokens or pair(number)
    grids = [] if not (spec.needs_embedded or spec.needs_unembedded) else [(1, 2, 2)]
    document = plain_document(spec, prompt, IMAGE_ID, grids, Provenance("d", "s", str(number), number))
    shared = document.num_tokens - 1
    branches = [[prompt[-1], *answer] for answer in (chosen, rejected)]
    starts = (shared, shared + len(branches[0]))
    ids = [*document.token_ids[:shared].tolist(), *branches[0], *branches[1]]
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    for start, answer in zip(starts, (chosen, rejected), strict=True):
        labels[start : start + len(answer)] = answer
    positions = np.r_[0:shared, shared : shared + len(branches[0]), shared : shared + len(branches[1])]
    items = tuple(
        replace(item, values=np.random.default_rng(number).integers(0, 256, item.values.shape, dtype=np.uint8))
        for item in document.items
    )
    return replace(
        document,
        token_ids=np.array(ids, dtype=np.int32),
        labels=labels,
        loss_weights=(labels != IGNORE).astype(np.float32),
        position_ids=positions.astype(np.int32),
        items=items,
        branches=starts,
    )


def answer_document(document: Document, answer: int) -> Document:
    """Return prompt and answer 0 or 1 of a pair as a document without branches."""
    starts = [*document.branches, document.num_tokens]
    rows = np.r_[0 : starts[0], starts[answer] : starts[answer + 1]]
    columns = ("token_ids", "labels", "loss_weights", "position_ids")
    return replace(document, branches=(), **{name: getattr(document, name)[rows] for name in columns})


def batch_of(spec: MediaSpec, numbers: list[int]) -> MultimodalBatch:
    """Return a batch of these pairs, followed by a dummy document."""
    documents = [pair_document(spec, number) for number in numbers]
    return collate([Pack((*documents, dummy_document(spec, 0)), 0)], spec)


def answer_log_prob(model: MultimodalModel, document: Document) -> Tensor:
    """Return the log-probability of the learned tokens of a document without branches, from whole logits.

    Each token counts with its loss weight. The logits of image tokens with a head of their own are computed apart.
    """
    batch = collate([Pack((document,), 0)], media_spec(model.config))
    hidden = model(batch).hidden
    logits, labels = model.head(hidden), batch.labels
    rows = F.cross_entropy(
        logits, labels.where(labels < logits.shape[1], IGNORE), reduction="none", ignore_index=IGNORE
    )
    if model.head.image is not None:
        codes = labels - model.head.first_image_id
        rows = rows + F.cross_entropy(
            model.head.image(hidden), codes.where(codes >= 0, IGNORE), reduction="none", ignore_index=IGNORE
        )
    return -(rows * batch.loss_weights).sum()


def written_out(
    loss: PreferenceConfig, model: MultimodalModel, reference: MultimodalModel | None, documents: list[Document]
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of each pair and the metrics, from one forward pass for each prompt with one answer."""
    return written_out_of(
        loss, model, reference, [[answer_document(document, number) for number in (0, 1)] for document in documents]
    )


def written_out_of(
    loss: PreferenceConfig, model: MultimodalModel, reference: MultimodalModel | None, pairs: list[list[Document]]
) -> tuple[Tensor, dict[str, float]]:
    """As ``written_out``, for prompts with their chosen and their rejected answer as two documents."""
    losses, metrics = [], []
    for answers in pairs:
        own = [answer_log_prob(model, answer) for answer in answers]
        with torch.no_grad():
            other = [0.0 if reference is None else answer_log_prob(reference, answer) for answer in answers]
        lengths = [float(answer.loss_weights.sum()) for answer in answers]
        divisors = lengths if loss.length_normalised else [1.0, 1.0]
        chosen, rejected = ((a - b) / n for a, b, n in zip(own, other, divisors, strict=True))
        if loss.loss == "ipo":
            value = (chosen - rejected - 1 / (2 * loss.beta)) ** 2
        else:
            margin, p = loss.beta * (chosen - rejected), loss.label_smoothing
            value = -(1 - p) * torch.log(torch.sigmoid(margin)) - p * torch.log(torch.sigmoid(-margin))
        plain, entropy = value, -own[0] / lengths[0]
        losses.append(value + loss.next_token * entropy)
        metrics.append(
            {
                "preference": plain,
                **({"next_token": entropy} if loss.next_token else {}),
                "reward_chosen": loss.beta * chosen,
                "reward_rejected": loss.beta * rejected,
                "reward_margin": loss.beta * (chosen - rejected),
                "reward_accuracy": torch.tensor(float(chosen > rejected)),
                "log_prob_chosen": -entropy,
                "log_prob_rejected": own[1] / lengths[1],
            }
        )
    return torch.stack(losses), {name: sum(float(each[name].detach()) for each in metrics) for name in metrics[0]}


def train(world: World, cases: list[dict[str, Any]]) -> list[Any]:
    """Run several engines in one set of processes; return the step reports of each."""
    return [_train(world, **case) for case in cases]


def _train(world: World, steps: list[list[list[list[int]]]], kind: str | None, zero: int, moe: bool) -> Any:
    """Train; ``steps[n][rank]`` contains the pairs of each microbatch."""
    settings = config(kind, **({"mlp": MOE} if moe else {}))
    options = EngineConfig(zero_stage=zero, device="cpu", precision="fp32", timeout_seconds=60)  # type: ignore[arg-type]

    def construct_model(seed: int) -> Any:
        build = lambda: build_model(settings, attention="sdpa", seed=None)  # noqa: E731
        return construct(build, options, world, lambda model, *, gather: initialise_(model, seed, gather))

    reference = Teacher(construct_model(4), 1.0, 1.0)
    stage = StageConfig(name="dpo", steps=9, learning_rate={"default": 1e-2}, schedule="constant", clip=0.0)
    objective = Preference(PreferenceConfig(beta=0.5, next_token=0.2), [reference], world)
    engine = Engine(construct_model(3), objective, stage, options, world)
    spec, reports = media_spec(settings), []
    for step in steps:
        report = engine.train_step([batch_of(spec, numbers) for numbers in step[world.rank]], component_norms=True)
        documents = [part[: len(n)] for part, n in zip(report.document_losses, step[world.rank], strict=True)]
        reports.append(
            {
                "loss": report.loss,
                "weight": report.weight,
                "norm": report.grad_norm,
                "norms": report.component_grad_norms,
                "metrics": report.metrics,
                "documents": documents,
            }
        )
    engine.close()
    return reports
