"""``mmscale check`` finds planted bugs, and finds nothing in the shipped architectures.

The simulated ranks are forked from a process that patches the real classes, so each rank has the bug.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.check.check import CheckReport, check_run
from mmscale.check.program import make_few_steps, make_steps
from mmscale.check.ranks import Difference
from mmscale.check.recorder import Call
from mmscale.cli.main import main
from mmscale.config import load
from mmscale.errors import EngineError
from mmscale.run.config import RunConfig
from tests.engine.fork_server import fork_server

TINY = "tests/system/tiny.yaml"
MOE = ["model.decoder.mlp={kind: moe, num_experts: 4, experts_per_token: 1, expert_dim: 16}"]
HYBRID = "model.connector={kind: hybrid, every: 2, mlp: {hidden_dim: 64}, projector: {kind: mlp, merge: 2}}"
ENCODING = [
    "model.decoder.image_tokens={kind: separate, codes: 64, code_dim: 4}",
    "model.image_tokenizer={kind: vqgan, base_dim: 8, multipliers: [1, 1], blocks_per_level: 1, attention_levels: [], "
    "latent_dim: 8, codebook_size: 64, code_dim: 4, norm_groups: 4}",
    "data.image_tokens={codebook_size: 64, first_id: 1064, encoded: in_step}",
]
SHALLOW = ["model.decoder.num_layers=4", "model.vision.num_layers=1"]


def checked(folder: Path, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the report of each case; see ``planted.check``."""
    result, log = folder / "reports.json", folder / "log.txt"
    child = fork_server(0).fork("tests.check.planted:check", [str(result), list(cases)], {}, log)
    assert child.wait(600) == 0, log.read_text()
    reports: list[dict[str, Any]] = json.loads(result.read_text())
    return reports


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return for each bug that shows in the first steps the two calls that differ."""
    overrides = {"list_of_experts": MOE, "conditional_encoder": ENCODING}
    bugs = ["conditional_tower", "if_images", "list_of_experts", "loss_of_rank", "early_break", "conditional_encoder"]
    cases = [{"config": TINY, "overrides": [*SHALLOW, *overrides.get(bug, [])], "bug": bug} for bug in bugs]
    reports = checked(tmp_path_factory.mktemp("planted"), *cases)
    assert not any(report["ok"] for report in reports)
    return {bug: report["difference"] for bug, report in zip(bugs, reports, strict=True)}


@pytest.mark.dist
def test_a_tower_that_runs_only_with_images_is_named(differences: dict[str, Any]) -> None:
    first, second = differences["conditional_tower"]
    assert first["call"]["parameters"].startswith("vision.patch_embed")
    assert first["call"]["where"].endswith("step 1, batch: text and image")
    assert second["call"]["where"].endswith("step 1, batch: no image")


@pytest.mark.dist
def test_a_connector_that_runs_only_with_images_is_named(differences: dict[str, Any]) -> None:
    calls = [side["call"] for side in differences["if_images"]]
    (connector,) = [call for call in calls if call["place"].startswith("connector.projector")]
    assert "images only" in connector["where"]


@pytest.mark.dist
def test_a_tokenizer_that_runs_only_with_images_is_named(differences: dict[str, Any]) -> None:
    calls = [side["call"] for side in differences["conditional_encoder"]]
    (encoder,) = [call for call in calls if call["place"] == "image_tokenizer"]
    assert encoder["where"].endswith("step 1, batch: text and image")


@pytest.mark.dist
def test_a_list_of_experts_is_named(differences: dict[str, Any]) -> None:
    places = [side["call"]["place"] for side in differences["list_of_experts"]]
    assert any(".mlp.experts.each." in place for place in places)
    assert places[0] != places[1]


@pytest.mark.dist
def test_a_term_of_the_loss_on_one_rank_is_found(differences: dict[str, Any]) -> None:
    first, second = differences["loss_of_rank"]
    assert [first["rank"], second["rank"]] == [0, 1]
    assert second["call"]["place"] == "decoder.embed_tokens"  # The second forward pass of rank 1.


@pytest.mark.dist
def test_a_loop_over_microbatches_that_ends_early_is_found(differences: dict[str, Any]) -> None:
    short = next(side["call"] for side in differences["early_break"] if "dummy packs only" in side["call"]["where"])
    assert short["name"] == "all_reduce"  # The step's sums, while the other rank runs its second microbatch.
    assert short["place"] == "engine/engine.py, _global_means"


@pytest.mark.slow
@pytest.mark.dist
def test_differences_of_evaluations_and_saves_are_found(tmp_path: Path) -> None:
    bugs = ["early_break_in_evaluation", "save_on_one_rank"]
    reports = checked(tmp_path, *({"config": TINY, "overrides": SHALLOW, "bug": bug} for bug in bugs))
    evaluation, save = ([side["call"] for side in report["difference"]] for report in reports)
    assert all("evaluation after step" in call["where"] for call in evaluation)
    assert all("checkpoint of step" in call["where"] for call in save)
    assert save[0]["place"] == "checkpoint/save.py, abort_on_any_rank"


@pytest.mark.slow
@pytest.mark.dist
def test_a_difference_that_only_a_deep_model_has_is_found(tmp_path: Path) -> None:
    deep = ["model.decoder.num_layers=34", "model.vision.num_layers=1"]
    bug = {"config": TINY, "overrides": deep, "bug": "loss_of_rank_if_deep"}
    (report,) = checked(tmp_path, bug)
    for side in report["difference"]:
        assert side["call"]["where"].startswith("stage pretrain at full depth, step 1")
    assert report["collectives"] > 100  # The pass with few blocks is equal on all ranks.


ARCHITECTURES = {
    "cross attention, stage 1": (TINY, [*SHALLOW, "engine.zero_stage=1"]),
    "embedding, stage 2": (TINY, [*SHALLOW, "engine.zero_stage=2", "model.connector={kind: embedding}"]),
    "hybrid": (TINY, [*SHALLOW, "model.vision.positions={kind: rotary_2d}", HYBRID]),
    "stages": ("configs/recipes/emoji-stages.yaml", []),
    "contrastive": ("configs/recipes/emoji-contrast.yaml", []),
    "image tokenizer": ("configs/recipes/emoji-vq.yaml", []),
    "images encoded in the step": (TINY, [*SHALLOW, *ENCODING]),
    "preferences": ("tests/system/preference.yaml", []),
    "experts on two ranks": (TINY, [*SHALLOW, *MOE, "engine.expert_parallel=2"]),
    "distillation": (
        "tests/system/distil.yaml",
        ["stages.0.distill=[{checkpoint: runs/none, weight: 0.5, temperature: 2.0}]"],
    ),
}
"""A small configuration of each architecture."""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_pass(name: str, tmp_path: Path) -> None:
    config, overrides = ARCHITECTURES[name]
    (report,) = checked(tmp_path, {"config": config, "overrides": overrides})
    assert report["ok"], report["difference"]
    assert report["ranks"] == (4 if "two ranks" in name else 2)
    assert report["collectives"] > 100


def test_every_kind_of_batch_meets_the_next_one() -> None:
    kinds = ("a", "b", "c", "d")
    met = set()
    for step in make_steps(kinds, 3):
        assert len({len(own) for own in step.kinds}) == 1  # Equally many microbatches.
        met |= {pair for ranks in itertools.pairwise(step.kinds) for pair in zip(*ranks, strict=True)}
    assert {("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")} <= met


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("num_kinds", [2, 4, 7])
def test_every_kind_of_batch_occurs_in_the_few_steps_of_a_deep_model(num_kinds: int, world_size: int) -> None:
    kinds = tuple("abcdefg"[:num_kinds])
    steps = list(make_few_steps(kinds, world_size))
    assert len(steps) == 2
    for step in steps:
        assert len({len(own) for own in step.kinds}) == 1  # Equally many microbatches.
        assert all(len(set(ranks)) > 1 for ranks in zip(*step.kinds, strict=True))
    assert {kind for step in steps for own in step.kinds for kind in own} == set(kinds)


def test_more_ranks_than_reduce_in_a_ring_are_rejected() -> None:
    with pytest.raises(EngineError, match="at most 64 ranks"):
        check_run(load(Path(TINY), [], RunConfig).value, ranks=65)


def test_the_command_prints_a_difference_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Call("all_gather", "all ranks", "float32 (3,)", "vision.norm.weight", "vision.norm", "stage a, step 1")
    report = CheckReport(2, ("a",), 7, Difference(7, (0, 1), (call, None), ("", "ValueError: no image")))
    monkeypatch.setattr("mmscale.check.check.check_run", lambda config, ranks: report)
    assert main(["check", TINY]) == 1
    error = capsys.readouterr().err
    assert "collective 8 differs" in error
    assert "rank 0 calls all_gather of vision.norm.weight (float32 (3,); all ranks) in vision.norm" in error
    assert "rank 1 makes no further collective; it raised ValueError: no image" in error
    assert main(["check", TINY, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [side["rank"] for side in found["difference"]] == [0, 1]
    assert found["difference"][1] == {"rank": 1, "call": None, "error": "ValueError: no image"}
