"""Distillation on two ranks.

Whole runs: the first loss, the checkpoint, a resume, and rejected configurations. Engines at several ZeRO stages: every
number against plain torch with whole logits in one process.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.loader.loader import Loader
from mmscale.checkpoint import TrainState, list_checkpoints, load_weights, read_manifest, read_state
from mmscale.config import load
from mmscale.dist import World
from mmscale.errors import ConfigError
from mmscale.models.build import build_model, count_parameters
from mmscale.models.multimodal import MultimodalModel
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import check_teachers, record_teachers
from mmscale.shrink.run import shrink_run
from tests.engine.ranks import run_ranks
from tests.system.distil_engines import LANES, SHARES, STAGE, STEPS, lane, models
from tests.system.distil_programs import CONFIG, HEAT, SHARE, student_words

pytestmark = [pytest.mark.dist, pytest.mark.resume]

CASES = [("None", f"{zero}-fp32") for zero in (0, 2, 3)] + [("hybrid", "3-fp32")]
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distil")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks("tests.system.distil_programs:run", 2, {"folder": str(folder)})


def student(folder: Path, *words: str, teacher: Path | None = None) -> RunConfig:
    return load(CONFIG, [*student_words(teacher or folder / "teacher"), *words], RunConfig).value


def test_the_first_loss_is_that_of_plain_models_and_whole_logits(folder: Path, ranks: list[dict[str, Any]]) -> None:
    config = student(folder)
    path = list_checkpoints(folder / "teacher" / "checkpoints")[0]
    teacher = build_model(load(CONFIG, [], RunConfig).value.model, seed=None)
    load_weights(teacher, path, ema=True)
    learner = build_model(config.model, seed=config.seed)
    with Loader(config.data, config.media_spec, seed=config.seed) as loader, torch.no_grad():
        batches = next(loader).microbatches
        entropy = divergence = 0.0
        for batch in batches:
            ours, theirs = (net.head(net(batch).hidden) for net in (learner, teacher))
            losses = F.cross_entropy(ours, batch.labels, reduction="none", ignore_index=-100)
            entropy += float((losses * batch.loss_weights).sum())
            cold, wanted = ((each / HEAT).log_softmax(-1) for each in (ours, theirs))
            divergence += float(((wanted.exp() * (wanted - cold)).sum(-1) * batch.loss_weights).sum())
    weight = sum(batch.weight for batch in batches)
    first = ranks[0]["whole"][0]
    assert first["metric/cross_entropy"] == pytest.approx(entropy / weight, rel=1e-5)
    assert first["metric/distillation"] == pytest.approx(divergence / weight, rel=1e-5)
    total = (1 - SHARE) * entropy + SHARE * HEAT**2 * divergence
    assert first["loss"] == pytest.approx(total / weight, rel=1e-5)


def test_a_resume_is_bit_for_bit_with_the_checkpoint_that_the_stage_began_with(ranks: list[dict[str, Any]]) -> None:
    """The teacher's run continues in the meantime, and its newest checkpoint is another."""
    keys = ("step", "loss", "grad_norm", "lr", "metric/cross_entropy", "metric/distillation", "model_flops")
    whole, again = ([[line[key] for key in keys] for line in ranks[0][name]] for name in ("whole", "again"))
    assert [line[0] for line in whole] == [1, 2, 3, 4]
    assert again == whole


def test_a_run_does_not_go_on_with_another_teacher(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "stages.0.distill.0.checkpoint=" in found["complaint"]
        assert "this stage began with the teacher" in found["complaint"]
        assert "step-00000002" in found["complaint"]


def test_checkpoints_hold_nothing_of_the_teacher_but_which_it_was(folder: Path, ranks: list[dict[str, Any]]) -> None:
    for path in list_checkpoints(folder / "whole" / "checkpoints"):
        manifest = read_manifest(path)
        assert manifest.parameters.keys() == dict(build_model(student(folder).model).named_parameters()).keys()
        ((source, (begun, _)),) = read_state(path).extra["teachers"].items()
        assert (source, Path(begun).name) == (str(folder / "teacher"), "step-00000002")


def refusal(config: RunConfig, state: TrainState | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_teachers(config, ALONE, state or TrainState())
    assert str(caught.value).startswith("stages.0.distill.0.checkpoint=")
    return str(caught.value)


def test_teachers_are_checked_before_training_and_while_they_are_needed(
    folder: Path, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    check_teachers(student(folder), ALONE, TrainState())
    check_teachers(
        student(folder, teacher=list_checkpoints(folder / "teacher" / "checkpoints")[0]), ALONE, TrainState()
    )
    absent = student(folder, teacher=tmp_path / "absent")
    assert "has no checkpoints" in refusal(absent)
    assert "has no checkpoints" in refusal(absent, TrainState(3, 0, 3))
    check_teachers(absent, ALONE, TrainState(4, 0, 4))
    assert "logits for 2048 token ids and the student for 2050" in refusal(
        student(folder, "model.decoder.vocab_size=2050")
    )
    vision = load(CONFIG.with_name("tiny.yaml"), student_words(folder / "teacher")[-1:], RunConfig).value
    assert "do not take images alike: placement is" in refusal(vision)
    damaged = tmp_path / "damaged"
    shutil.copytree(list_checkpoints(folder / "teacher" / "checkpoints")[-1], damaged)
    (damaged / "rank-00001.safetensors").unlink()
    assert "rank-00001.safetensors is missing" in refusal(student(folder, teacher=damaged))


def test_a_teacher_that_was_written_anew_is_another(folder: Path, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = list_checkpoints(folder / "teacher" / "checkpoints")[:2]
    shutil.copytree(first, tmp_path / "teacher")
    config = student(folder, teacher=tmp_path / "teacher")
    state = record_teachers(config, ALONE, TrainState(3, 0, 3))
    check_teachers(config, ALONE, state)
    shutil.rmtree(tmp_path / "teacher")
    shutil.copytree(second, tmp_path / "teacher")
    assert "which is gone or has changed" in refusal(config, state)


def test_shares_of_one_loss(folder: Path) -> None:
    teachers = ", ".join(f"{{checkpoint: somewhere, weight: {weight}}}" for weight in (0.7, 0.4))
    with pytest.raises(ConfigError, match=r"distill: the weights \[0\.7, 0\.4\] are shares of one loss"):
        load(CONFIG, [f"stages.0.distill=[{teachers}]"], RunConfig)


def test_a_smoke_test_run_has_no_teacher(folder: Path) -> None:
    assert [stage.distill for stage in shrink_run(student(folder)).stages] == [()]


@pytest.fixture(scope="module")
def plain(ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Return the reference: all lanes in one process, losses from whole logits, torch's AdamW."""
    return {
        kind: _plain_steps(None if kind == "None" else kind, ranks[0]["engines"][kind]["teachers"])
        for kind in ranks[0]["engines"]
    }


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
    """fp32 with sums in another order: the worst relative difference of any number is 2.3e-7."""
    for found in ranks:
        for mine, theirs in zip(found["engines"][kind][case]["steps"], plain[kind], strict=True):
            assert {name: mine[name] for name in theirs} == pytest.approx(theirs, rel=2e-6)


def test_bf16_stays_near(ranks: list[dict[str, Any]], plain: dict[str, list[dict[str, float]]]) -> None:
    """Eight bits of mantissa: the worst relative difference of a loss is 3e-3."""
    losses = [step["loss"] for step in ranks[0]["engines"]["None"]["3-bf16"]["steps"]]
    assert losses == pytest.approx([step["loss"] for step in plain["None"]], rel=2e-2)


def test_no_rank_holds_a_whole_teacher_under_stage_3(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["engines"]["None"]["3-fp32"]["whole"] == found["engines"]["hybrid"]["3-fp32"]["whole"] == 0
        assert found["engines"]["None"]["0-fp32"]["whole"] > 0


def test_the_checkpoint_and_the_counts_are_the_students_alone(ranks: list[dict[str, Any]]) -> None:
    for kind in ranks[0]["engines"]:
        settings = models(None if kind == "None" else kind)[0]
        student = build_model(settings, seed=None)
        for case in ranks[0]["engines"][kind].keys() - {"teachers"}:
            found = ranks[0]["engines"][kind][case]
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
        assert found["engines"]["None"]["3-fp32"]["steps"][0]["flops"] == [alone + taught] * 2
        assert taught > 0
