"""New tokens trained with a frozen table equal those of plain torch: one table with a masked gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from mmscale.objectives.next_token import NextToken
from mmscale.optim.schedule import schedule
from mmscale.optim.stages import StageConfig
from tests.engine.ranks import run_ranks
from tests.models.new_rows import LANES, NEW, OLD, SEED, STAGE, STEPS, lane, settings
from tests.models.tiny import VOCAB

pytestmark = pytest.mark.dist

CASES = [
    {"tied": False, "zero": 3, "recompute": True},
    {"tied": True, "zero": 3, "recompute": False},
    {"tied": True, "zero": 1, "recompute": False},
]


def whole_table(tied: bool) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Return losses, and the tables before and after training with AdamW and a gradient mask for the old rows.

    Weight decay would still change the old rows, so they are restored after each step.
    """
    split = settings(tied)
    decoder = split.decoder.model_copy(update={"vocab_size": VOCAB, "extra_tokens": None})
    values = dict(build_model(split, seed=SEED).state_dict())
    for name in [name for name in values if name.endswith("extra_weight")]:
        base = name.replace("extra_weight", "weight")
        values[base] = torch.cat([values[base], values.pop(name)])
    net = build_model(ModelConfig(decoder=decoder, vision=split.vision, connector=split.connector))
    net.load_state_dict(values)
    net.requires_grad_(False)
    tables = {name: p for name, p in net.named_parameters() if name in ("decoder.embed_tokens.weight", "head.weight")}
    for table in tables.values():
        table.requires_grad_()
    begun = {name: table.detach().clone() for name, table in tables.items()}
    stage, losses = StageConfig.model_validate(STAGE), []
    optimizer = torch.optim.AdamW(tables.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.5)
    for step in range(STEPS):
        batches = [lane(split, step, number) for number in range(LANES)]
        loss = torch.stack([NextToken()(net, batch).loss_sum for batch in batches]).sum()
        loss = loss / sum(batch.weight for batch in batches)
        optimizer.zero_grad()
        loss.backward()
        for table in tables.values():
            assert table.grad is not None
            table.grad[:OLD] = 0
        nn.utils.clip_grad_norm_(tables.values(), stage.whole_clip)
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule(stage, step, stage.warmup("extra_tokens"))
        optimizer.step()
        with torch.no_grad():
            for name, table in tables.items():
                table[:OLD] = begun[name][:OLD]
        losses.append(loss.item())
    return losses, begun, {name: table.detach() for name, table in tables.items()}


def test_new_rows_learn_as_in_one_table_and_nothing_else_moves() -> None:
    answers = run_ranks("tests.models.new_rows:train_cases", 2, {"cases": CASES})
    for number, case in enumerate(CASES):
        tied = bool(case["tied"])
        losses, begun, tables = whole_table(tied)
        answer: dict[str, Any] = answers[0][number]
        assert answer["losses"] == pytest.approx(losses, rel=1e-5)
        new = sorted(name.replace("weight", "extra_weight") for name in tables)
        assert answer["moments"] == new
        first = dict(build_model(settings(tied), seed=SEED).named_parameters())
        for name, values in answer["weights"].items():
            found = torch.tensor(values).view(first[name].shape)
            if name not in new:
                assert torch.equal(found, first[name]), name
                continue
            base = name.replace("extra_weight", "weight")
            assert found.shape[0] == NEW
            # Five steps of AdamW in float32: in the first steps the update depends mainly on the gradient's sign.
            torch.testing.assert_close(found, tables[base][OLD:], rtol=1e-4, atol=1e-5)
            assert (found - begun[base][OLD:]).abs().amax(1).min() > 1e-3
