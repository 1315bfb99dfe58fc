"""Students that follow teachers: two ranks, every ZeRO stage, against plain torch with whole logits in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.checkpoint import load_weights, read_manifest
from mmscale.models.build import build_model, count_parameters
from mmscale.models.multimodal import MultimodalModel
from tests.engine.ranks import run_ranks
from tests.objectives.distil_programs import LANES, SHARES, STAGE, STEPS, lane, models

pytestmark = pytest.mark.dist

CASES = [("None", f"{zero}-fp32") for zero in (0, 2, 3)] + [("hybrid", "3-fp32")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw."""
    return run_ranks("tests.objectives.distil_programs:run", 2, {"folder": str(tmp_path_factory.mktemp("distil"))})


@pytest.fixture(scope="module")
def plain(ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """The same steps by torch alone: all lanes in one process, losses from whole logits, torch's AdamW."""
    return {kind: _plain_steps(None if kind == "None" else kind, ranks[0][kind]["teachers"]) for kind in ranks[0]}


def _plain_steps(kind: str | None, paths: list[str]) -> list[dict[str, float]]:
    settings, wanted = models(kind)
    student, teachers = build_model(settings, seed=3), [build_model(each, seed=None).eval() for each in wanted]
    for teacher, path in zip(teachers, paths, strict=True):
        load_weights(teacher, Path(path))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for step in range(STEPS):
        batches = [lane(kind, step, number) for number in range(LANES)]
        total = sum(batch.weight for batch in batches)
        parts = [_plain_loss(student, teachers, batch) for batch in batches]
        means = {name: torch.stack([part[name] for part in parts]).sum() / total for name in parts[0]}
        optimizer.zero_grad()
        means["loss"].backward()  # type: ignore[no-untyped-call]
        norm = torch.stack([p.grad.square().sum() for p in student.parameters() if p.grad is not None]).sum().sqrt()
        optimizer.step()
        steps.append({name: value.item() for name, value in means.items()} | {"norm": norm.item()})
    return steps


def _plain_loss(student: MultimodalModel, teachers: list[MultimodalModel], batch: Any) -> dict[str, Tensor]:
    output, scale = student(batch), batch.loss_weights
    logits = student.head(output.hidden)
    entropy = (F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=-100) * scale).sum()
    square = (logits.logsumexp(-1).square() * scale).sum()
    shares = SHARES[: len(teachers)]
    loss = (1 - sum(share for share, _ in shares)) * entropy + STAGE["z_loss"] * square
    found = {"cross_entropy": entropy, "softmax_z": square}
    for number, (teacher, (share, heat)) in enumerate(zip(teachers, shares, strict=True)):
        with torch.no_grad():
            theirs = teacher.head(teacher(batch).hidden)
        wanted, ours = ((each / heat).log_softmax(-1) for each in (theirs, logits))
        divergence = ((wanted.exp() * (wanted - ours)).sum(-1) * scale).sum()
        found["distillation" if len(teachers) == 1 else f"distillation_{number}"] = divergence
        loss = loss + share * heat**2 * divergence
    return {**found, "loss": loss}


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_every_stage_takes_the_steps_of_plain_torch(
    ranks: list[dict[str, Any]], plain: dict[str, list[dict[str, float]]], kind: str, case: str
) -> None:
    """fp32, sums in other orders: the worst relative difference of any figure in three steps is 2.3e-7."""
    for found in ranks:
        for mine, theirs in zip(found[kind][case]["steps"], plain[kind], strict=True):
            assert {name: mine[name] for name in theirs} == pytest.approx(theirs, rel=2e-6)


def test_bf16_stays_near(ranks: list[dict[str, Any]], plain: dict[str, list[dict[str, float]]]) -> None:
    """Eight bits of mantissa: the worst relative difference of a loss is 3e-3."""
    losses = [step["loss"] for step in ranks[0]["None"]["3-bf16"]["steps"]]
    assert losses == pytest.approx([step["loss"] for step in plain["None"]], rel=2e-2)


def test_no_rank_holds_a_whole_teacher_under_stage_3(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["None"]["3-fp32"]["whole"] == found["hybrid"]["3-fp32"]["whole"] == 0
        assert found["None"]["0-fp32"]["whole"] > 0


def test_the_checkpoint_and_the_counts_are_the_students_alone(ranks: list[dict[str, Any]]) -> None:
    for kind in ranks[0]:
        settings = models(None if kind == "None" else kind)[0]
        student = build_model(settings, seed=None)
        for case in ranks[0][kind].keys() - {"teachers"}:
            found = ranks[0][kind][case]
            manifest = read_manifest(Path(found["path"]))
            assert manifest.parameters.keys() == dict(student.named_parameters()).keys()
            assert found["counted"] == count_parameters(settings).total
            load_weights(student, Path(found["path"]))


def test_the_teachers_forward_passes_are_counted(ranks: list[dict[str, Any]]) -> None:
    settings, wanted = models(None)
    student, teachers = (build_model(settings), [build_model(each) for each in wanted])
    for rank, found in enumerate(ranks):
        mine = [lane(None, 0, number) for number in range(rank, LANES, 2)]
        taught = sum(teacher.training_flops(batch, ()).forward for teacher in teachers for batch in mine)
        alone = sum(student.training_flops(batch, ("decoder", "extra_tokens")).model for batch in mine)
        assert found["None"]["3-fp32"]["steps"][0]["flops"] == [alone + taught] * 2
        assert taught > 0
