"""Planted bugs: patches of real classes with which the ranks of a run would make different collectives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mmscale.check.check import check_run
from mmscale.config import load
from mmscale.engine.engine import Engine
from mmscale.models.connectors.cross_attention import CrossAttentionConnector
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.experts import Experts
from mmscale.objectives.next_token import NextToken
from mmscale.run.config import RunConfig

Patch = AbstractContextManager[Any]


def conditional_tower() -> list[Patch]:
    """Run the tower and the connector only if the batch has an image."""
    original = MultimodalModel.forward

    def forward(self: MultimodalModel, batch: Any, *rest: Any, **options: Any) -> Any:
        if batch.num_images:
            return original(self, batch, *rest, **options)
        with mock.patch.dict(self._modules, vision=None):
            return original(self, replace(batch, media={}), *rest, **options)

    return [mock.patch.object(MultimodalModel, "forward", forward)]


def if_images() -> list[Patch]:
    """Call the projector and the cross-attention blocks only if there are several images."""
    original = CrossAttentionConnector.connect

    def connect(self: Any, hidden: Tensor, features: Tensor, tags: Tensor, media: Any, *rest: Any) -> Any:
        if media.items.num > 1:
            return original(self, hidden, features, tags, media, *rest)
        return hidden, None

    return [mock.patch.object(CrossAttentionConnector, "connect", connect)]


def conditional_encoder() -> list[Patch]:
    """Run the image tokenizer only if the batch has an image without codes."""
    original = MultimodalModel.with_codes

    def with_codes(self: MultimodalModel, batch: Any, *rest: Any) -> Any:
        if batch.uncoded is None or batch.uncoded.grids:
            return original(self, batch, *rest)
        return replace(batch, uncoded=None)

    return [mock.patch.object(MultimodalModel, "with_codes", with_codes)]


class ListOfExperts(Experts):
    """Experts as a list of modules, of which a forward pass calls those that have rows."""

    def __init__(self, dim: int, num_experts: int, *rest: Any) -> None:
        nn.Module.__init__(self)
        self.each = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_experts))
        self.num_experts, self.experts_per_token, self.exchange = num_experts, rest[0], None

    def forward(self, rows: Tensor, weights: Tensor, counts: Tensor, dropout: Any = None) -> Tensor:
        parts = zip(self.each, rows.split(counts.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part)]) * weights[:, None]


def list_of_experts() -> list[Patch]:
    """Keep experts in a list, in blocks that are no units: a unit gathers all its parameters in any case."""
    return [
        mock.patch("mmscale.nn.moe.Experts", ListOfExperts),
        mock.patch.object(MultimodalModel, "checkpoint_units", return_value=[]),
    ]


def loss_of_rank() -> list[Patch]:
    """Compute one more term of the loss on the last rank."""
    original = NextToken.__call__

    def call(self: NextToken, model: Any, batch: Any) -> Any:
        output = original(self, model, batch)
        if os.environ["RANK"] == "1":
            again = model.head(model(batch).hidden, batch.labels, batch.loss_weights)
            return replace(output, loss_sum=output.loss_sum + again)
        return output

    return [mock.patch.object(NextToken, "__call__", call)]


def loss_of_rank_if_deep() -> list[Patch]:
    """Compute one more term of the loss on the last rank, if the model has more blocks than a smoke-test model."""
    original = NextToken.__call__

    def call(self: NextToken, model: Any, batch: Any) -> Any:
        output = original(self, model, batch)
        if os.environ["RANK"] == "1" and len(model.decoder.layers) > 4:
            again = model.head(model(batch).hidden, batch.labels, batch.loss_weights)
            return replace(output, loss_sum=output.loss_sum + again)
        return output

    return [mock.patch.object(NextToken, "__call__", call)]


def early_break() -> list[Patch]:
    """End the loop over the microbatches at the first one without tokens."""
    original = Engine._forward_backward

    def forward_backward(self: Engine, microbatches: Sequence[Any], scale: float) -> Any:
        full = [batch for batch in microbatches if batch.num_tokens]
        return original(self, full or microbatches[:1], scale)

    return [mock.patch.object(Engine, "_forward_backward", forward_backward)]


def early_break_in_evaluation() -> list[Patch]:
    """End an evaluation when this rank has scored its own chunks."""
    from mmscale.evaluate import pairs

    original = pairs.chunks_of_rank

    def own_chunks(*arguments: Any) -> Iterator[Any]:
        return (chunk for chunk in original(*arguments) if chunk[0])

    return [mock.patch.object(pairs, "chunks_of_rank", own_chunks)]


def save_on_one_rank() -> list[Patch]:
    """Let rank 0 alone ask for errors of a save."""
    save = import_module("mmscale.checkpoint.save")  # The package has a function of the same name.
    original = save.abort_on_any_rank

    def abort(world: Any, target: Any, complaint: str | None) -> None:
        if world.is_main:
            original(world, target, complaint)

    return [mock.patch.object(save, "abort_on_any_rank", abort)]


BUGS: dict[str, Callable[[], list[Patch]]] = {
    each.__name__: each
    for each in (
        conditional_tower,
        if_images,
        conditional_encoder,
        list_of_experts,
        loss_of_rank,
        loss_of_rank_if_deep,
        early_break,
        early_break_in_evaluation,
        save_on_one_rank,
    )
}


def check(result: str, cases: list[dict[str, Any]]) -> None:
    """Check runs, each with an optional planted bug, and write the reports as JSON to the file ``result``.

    A case has ``config`` (a path), and may have ``overrides``, ``bug`` and ``ranks``.
    """
    import contextlib
    import json
    from pathlib import Path

    reports = []
    for case in cases:
        config = load(Path(case["config"]), case.get("overrides", []), RunConfig).value
        with contextlib.ExitStack() as patches:
            for patch in BUGS[case["bug"]]() if "bug" in case else ():
                patches.enter_context(patch)
            reports.append(check_run(config, ranks=case.get("ranks")).to_json())
    Path(result).write_text(json.dumps(reports))
