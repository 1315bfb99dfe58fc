"""Import DeepSpeed checkpoints: an engine that resumes has the state that DeepSpeed's engine had when it saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mmscale.checkpoint import load_weights, read_manifest, verify
from mmscale.checkpoint.imports import IMPORTED, ImportReport, ImportTarget, import_checkpoint
from mmscale.errors import CheckpointError
from tests.engine.programs import stage
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToyModel

pytestmark = [pytest.mark.dist, pytest.mark.resume]

FROZEN = {"stage_changes": {"name": "part", "train": ["vision", "connector"]}}
CASES: dict[str, dict[str, Any]] = {
    "zero0-frozen": {"zero": 0, **FROZEN},
    "zero0-bf16": {"zero": 0, "precision": "bf16"},
    "zero1": {"zero": 1},
    "zero1-bf16-frozen": {"zero": 1, "precision": "bf16", "universal": True, **FROZEN},
    "zero2-frozen": {"zero": 2, "universal": True, **FROZEN},
    "zero2-bf16": {"zero": 2, "precision": "bf16"},
    "zero3": {"zero": 3, "persistent_parameter_elements": 100, "universal": True},
    "zero3-frozen": {"zero": 3, "universal": True, **FROZEN},
    "zero3-bf16-frozen": {"zero": 3, "precision": "bf16", "universal": True, **FROZEN},
    "excluded": {"zero": 3, "exclude": True, **FROZEN},
}
RESUMED = [name for name in CASES if name != "excluded"]
# These checkpoints are resumed with another ZeRO stage.
ELSEWHERE = {"zero0-bf16": 3, "zero1": 1, "zero2-frozen": 3, "zero3-bf16-frozen": 3, "zero3-frozen/universal": 1}
TRAINED = {"vision.weight", "vision.bias", "connector.gate", "connector.project.weight", "connector.project.bias"}


def import_target() -> ImportTarget:
    return ImportTarget(ToyModel(), [stage(), stage(**FROZEN["stage_changes"])])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the answer for every case, saved by DeepSpeed on two ranks."""
    folder = tmp_path_factory.mktemp("deepspeed")
    cases = [{"folder": str(folder / name), **case} for name, case in CASES.items()]
    arguments = {"cases": cases, "other": str(folder)}
    other, *answers = run_ranks("tests.checkpoint.import_programs:save_deepspeed", 2, arguments)[0]
    return {"other": {"path": str(folder / "other"), **other}, **dict(zip(CASES, answers, strict=True))}


@pytest.fixture(scope="module")
def imported(saved: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImportReport]:
    """Return the reports: ``NAME`` for DeepSpeed's own files, ``NAME/universal`` for the converted ones."""
    folder = tmp_path_factory.mktemp("imported")
    reports = {}
    for name in RESUMED:
        source = Path(saved[name]["path"])
        reports[name] = import_checkpoint(source, folder / name / "own", import_target())
        if CASES[name].get("universal"):
            target = folder / name / "universal"
            reports[f"{name}/universal"] = import_checkpoint(source.with_name("universal"), target, import_target())
    return reports


def resumed(imported: dict[str, ImportReport], world_size: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    listed = [{**case, "path": imported[name].checkpoint} for name, case in cases.items()]
    answers = run_ranks("tests.checkpoint.import_programs:resume_imported", world_size, {"cases": listed})[0]
    return dict(zip(cases, answers, strict=True))


def test_the_same_ranks_continue_bit_for_bit(saved: dict[str, Any], imported: dict[str, ImportReport]) -> None:
    cases = {name: CASES[name.partition("/")[0]] for name in imported}
    for name, answer in resumed(imported, 2, cases).items():
        before = saved[name.partition("/")[0]]
        assert answer["restored"] == before["saved"], name
        assert answer["after"] == before["after"], name


def test_another_number_of_ranks_and_another_stage(saved: dict[str, Any], imported: dict[str, ImportReport]) -> None:
    cases = {name: {**CASES[name.partition("/")[0]], "zero": zero} for name, zero in ELSEWHERE.items()}
    for name, answer in resumed(imported, 1, cases).items():
        before = saved[name.partition("/")[0]]
        assert answer["restored"] == before["saved"], name
        tolerance = 5e-3 if "bf16" in name else 2e-6
        for mine, theirs in zip(answer["after"], before["after"], strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance), name


def test_the_report_lists_the_imported_state(imported: dict[str, ImportReport]) -> None:
    report = imported["zero1-bf16-frozen"]
    # The first stage has 40 steps; three steps of the second are done.
    assert (report.stage, report.stage_step, report.step, report.optimizer_steps) == ("part", 3, 43, 3)
    assert (report.trained, report.frozen, report.buffers, report.world_size) == (5, 13, 1, 2)
    assert (report.layout, report.renamed, report.checked_against_model) == ("zero-1", {"model.": ""}, True)
    assert report.tied == {"head.weight": "decoder.embed.weight"}
    assert {"position in the data", "random state"} <= set(report.not_taken_over)
    assert imported["zero0-bf16"].world_size == imported["zero2-frozen/universal"].world_size == 1
    for each in imported.values():
        assert verify(Path(each.checkpoint)) == []


def test_the_universal_format_of_stage_3_omits_frozen_parameters(
    saved: dict[str, Any], imported: dict[str, ImportReport], tmp_path: Path
) -> None:
    frozen = {name for name, _ in ToyModel().named_parameters()} - TRAINED
    for name in ("zero3-frozen", "zero3-bf16-frozen"):
        universal = Path(saved[name]["path"]).with_name("universal")
        kept = {path.name.removeprefix("model.") for path in (universal / "zero").iterdir() if path.is_dir()}
        assert kept == TRAINED  # The universal format has no frozen parameter.
        # The import restores them; test_the_same_ranks_continue_bit_for_bit compares their values.
        assert set(imported[f"{name}/universal"].repaired) == frozen
    # Below stage 3 this version of DeepSpeed writes them (in fp32), so the import repairs nothing.
    universal = Path(saved["zero2-frozen"]["path"]).with_name("universal")
    assert frozen <= {path.name.removeprefix("model.") for path in (universal / "zero").iterdir()}
    assert imported["zero2-frozen/universal"].repaired == ()
    # The import needs the model states of every rank.
    broken = shutil.copytree(Path(saved["zero3-frozen"]["path"]).with_name("universal"), tmp_path / "broken")
    (broken / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"frozen parameters .*model\.decoder\.norm\.weight.* rank 1 .*universal"):
        import_checkpoint(broken, tmp_path / "run")


def test_frozen_parameters_that_were_not_saved_are_named(saved: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"frozen parameters decoder\..*exclude_frozen_parameters"):
        import_checkpoint(Path(saved["excluded"]["path"]), tmp_path, import_target())
    assert list(tmp_path.iterdir()) == []


def test_without_a_configuration_weights_can_be_used(
    saved: dict[str, Any], imported: dict[str, ImportReport], tmp_path: Path
) -> None:
    report = import_checkpoint(Path(saved["zero1"]["path"]).parent, tmp_path)  # Its only checkpoint.
    assert (report.stage, report.checked_against_model) == (IMPORTED, False)
    assert "stage and model configuration" in report.not_taken_over
    mine, theirs = ToyModel(), ToyModel()
    load_weights(mine, Path(report.checkpoint))
    load_weights(theirs, Path(imported["zero1"].checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match=r"stage 0, which stores the optimizer state without parameter names"):
        import_checkpoint(Path(saved["zero0-frozen"]["path"]), tmp_path / "other")
    with pytest.raises(CheckpointError, match="already exists"):
        import_checkpoint(Path(saved["zero1"]["path"]), tmp_path)


def test_another_programs_checkpoint_is_renamed(saved: dict[str, Any], tmp_path: Path) -> None:
    answer, source = saved["other"], Path(saved["other"]["path"])
    assert answer["groups"] > 1
    renames = {"net.eyes.": "vision.", "net.": "x."}
    report = import_checkpoint(source, tmp_path / "run", renames=renames)
    assert {"lr_scheduler", "epoch"} <= set(report.not_taken_over)
    path = Path(report.checkpoint)
    assert verify(path) == []
    assert set(read_manifest(path).parameters) == {
        f"{part}.{kind}" for part in ("vision", "x.rest", "x.still") for kind in ("weight", "bias")
    }
    ranks = [safe_open(path / f"rank-0000{rank}.safetensors", "pt") for rank in range(2)]
    for key, values in answer["values"].items():
        name, _, kind = key.partition("|")
        new = name.replace("net.eyes.", "vision.").replace("net.", "x.")
        parts = [file.get_tensor(f"{new}|{kind}") for file in ranks if f"{new}|{kind}" in set(file.keys())]
        assert torch.cat(parts).tolist() == values, key
    complaints = {
        "no rename matches net.rest.weight": {"net.eyes.": "vision.", "net.still.": "x."},
        r"renames of \['nett.'\] apply to no name": {"": "", "nett.": "x."},
        "several parameters have the name": {"net.eyes.": "x.", "net.rest.": "x.", "net.still.": "y."},
    }
    for message, rules in complaints.items():
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(source, tmp_path / "run", renames=rules)
    with pytest.raises(CheckpointError, match=r"the model has no net\.eyes\.bias.*rename"):
        import_checkpoint(source, tmp_path / "run", import_target())


def test_stages_that_train_the_same_must_be_named(saved: dict[str, Any], tmp_path: Path) -> None:
    source = Path(saved["zero1"]["path"])
    twice = ImportTarget(ToyModel(), [stage(name="first"), stage(name="second")])
    with pytest.raises(CheckpointError, match=r"\['first', 'second'\] train the same parameters"):
        import_checkpoint(source, tmp_path, twice)
    with pytest.raises(CheckpointError, match="no stage 'third'"):
        import_checkpoint(source, tmp_path, twice, stage="third")
    assert import_checkpoint(source, tmp_path, twice, stage="second").step == 43
    short = ImportTarget(
        ToyModel(), [stage(name="short", steps=3, warmup_steps=0), stage(name="tiny", steps=2, warmup_steps=0)]
    )
    with pytest.raises(CheckpointError, match="after 3 steps; stage tiny has only 2"):
        import_checkpoint(source, tmp_path, short, stage="tiny")
    with pytest.raises(CheckpointError, match=r"trained connector\.gate.*; none of the stages \['part'\] does"):
        import_checkpoint(source, tmp_path, ImportTarget(ToyModel(), [stage(**FROZEN["stage_changes"])]))
    with pytest.raises(CheckpointError, match=r"another model|none of"):
        import_checkpoint(source, tmp_path, ImportTarget(ToyModel(blocks=3), [stage()]))
