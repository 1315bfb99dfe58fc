"""Adapters under ZeRO-3: exact resume, small checkpoints that name their base, and a base that does not move."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint import load_weights, read_manifest, verify
from mmscale.checkpoint.export import export_weights
from mmscale.checkpoint.manifest import seal
from mmscale.checkpoint.reshard import CheckpointReader, whole_parameter
from mmscale.errors import CheckpointError
from mmscale.models.build import build_model
from mmscale.nn.adapters import ADAPTER_PARAMETERS
from tests.checkpoint.adapter_programs import lane, settings
from tests.engine.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.resume]
PROGRAM = "tests.checkpoint.adapter_programs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the checkpoint of the base and the loss of its next step."""
    folder = tmp_path_factory.mktemp("runs") / "base/checkpoints"
    (loss,) = run_ranks(f"{PROGRAM}:save_base", 1, {"folder": str(folder)})
    return folder / "step-00000002", loss


@pytest.fixture(scope="module", params=["dora", pytest.param("lora", marks=pytest.mark.slow)])
def tuned(request: pytest.FixtureRequest, base: tuple[Path, float]) -> dict[str, Any]:
    kind = request.param
    folder = base[0].parents[2] / kind / "checkpoints"
    arguments = {"kind": kind, "base": str(base[0]), "folder": str(folder)}
    return {"kind": kind, **run_ranks(f"{PROGRAM}:tune", 2, arguments)[0]}


def is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ADAPTER_PARAMETERS


def test_new_adapters_change_nothing_and_training_changes_them(base: tuple[Path, float], tuned: dict[str, Any]) -> None:
    if tuned["kind"] == "dora":  # The other case has dropout.
        assert tuned["losses"][0] == pytest.approx(base[1], rel=1e-6)
        magnitudes = [name for name in dict(build_model(settings("dora")).named_parameters()) if "magnitude" in name]
        assert tuned["derived"] == magnitudes
    assert tuned["losses"][-1] != tuned["losses"][0]


def test_a_resume_is_exact_with_as_many_ranks_and_close_with_others(tuned: dict[str, Any]) -> None:
    arguments = {"kind": tuned["kind"], "path": tuned["path"]}
    same = run_ranks(f"{PROGRAM}:resume_tuning", 2, {**arguments, "zero": 3})[0]
    assert same == {key: tuned[key] for key in ("saved", "after", "end")}
    (other,) = run_ranks(f"{PROGRAM}:resume_tuning", 1, {**arguments, "zero": 1})
    assert other["saved"] == tuned["saved"]
    assert other["after"] == pytest.approx(tuned["after"], rel=1e-5)


def test_the_base_does_not_move(base: tuple[Path, float], tuned: dict[str, Any]) -> None:
    """Bits of all weights but those of adapters, after training with weight decay, read from master and average."""
    first = build_model(settings(None))
    load_weights(first, base[0])
    frozen = dict(first.named_parameters())
    for ema in (False, True):
        model = build_model(settings(tuned["kind"]))
        load_weights(model, Path(tuned["path"]), ema=ema)
        kept = {name: values for name, values in model.named_parameters() if not is_adapter(name)}
        assert kept.keys() == frozen.keys()
        assert all(torch.equal(values, frozen[name]) for name, values in kept.items())
    assert any(values.abs().sum() > 0 for name, values in model.named_parameters() if name.endswith("lora_B"))


def test_a_checkpoint_holds_the_adapters_alone(base: tuple[Path, float], tuned: dict[str, Any]) -> None:
    path = Path(tuned["path"])
    with CheckpointReader(path) as reader:
        stored = {
            key.rpartition("|")[0]
            for rank in range(reader.manifest.world_size)
            for key in reader.rank_metadata(rank).tensors
        }
        trained = {name for name, entry in reader.manifest.parameters.items() if entry.trained}
    assert stored == trained
    assert all(map(is_adapter, stored))
    assert verify(path) == []
    # A stage that freezes the base names the same base. One that trains it stores it.
    (entry,) = read_manifest(path).bases
    again, whole = (path.parent.with_name(name) / "step-00000000" for name in ("again", "whole"))
    assert read_manifest(again).bases == (entry,)
    assert read_manifest(whole).bases == ()
    assert Path(entry.path) == base[0]


def test_a_manifest_with_impossible_bases_is_damaged(tuned: dict[str, Any], tmp_path: Path) -> None:
    path = Path(tuned["path"])
    manifest = read_manifest(path)
    (entry,) = manifest.bases
    trained = next(name for name, each in manifest.parameters.items() if each.trained)
    for bases in ((entry, entry), (entry.model_copy(update={"parameters": (trained,)}),)):
        copy = tmp_path / str(len(bases)) / path.name
        shutil.copytree(path, copy)
        (copy / "manifest.json").write_text(seal(manifest.model_copy(update={"bases": bases})))
        with pytest.raises(CheckpointError, match="damaged: bases do not list different frozen parameters"):
            read_manifest(copy)


def test_a_base_that_is_gone_or_another_one_is_named(
    base: tuple[Path, float], tuned: dict[str, Any], tmp_path: Path
) -> None:
    path, model = Path(tuned["path"]), build_model(settings(tuned["kind"]))
    folder = tmp_path / "run/checkpoints"
    shutil.copytree(path.parent, folder)
    copy, moved = folder / path.name, base[0].with_name("moved")
    base[0].rename(moved)
    try:
        for act in (lambda: load_weights(model, copy), lambda: export_weights(copy, tmp_path / "out")):
            with pytest.raises(CheckpointError, match=r"does not store its frozen weights.*put that checkpoint back"):
                act()
        assert "does not exist" in verify(copy)[0]
        # The checkpoint itself is good, so it keeps its name.
        assert "does not exist" in run_ranks(f"{PROGRAM}:choice", 1, {"folder": str(folder)})[0]
        assert copy.is_dir()
        # The runs were moved together.
        shutil.copytree(moved, tmp_path / "base/checkpoints" / base[0].name)
        load_weights(model, copy)
        shutil.copytree(folder / path.name, base[0])
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(CheckpointError, match=f"but {base[0]} has checksum"):
            load_weights(model, copy)
    finally:
        shutil.rmtree(base[0], ignore_errors=True)
        moved.rename(base[0])


def test_damage_of_the_base_is_found(base: tuple[Path, float], tuned: dict[str, Any], tmp_path: Path) -> None:
    path = Path(tuned["path"])
    shutil.copytree(path.parent, tmp_path / "run/checkpoints")
    shutil.copytree(base[0], tmp_path / "base/checkpoints" / base[0].name)
    copy = tmp_path / "run/checkpoints" / path.name
    moved = base[0].with_name("moved")
    base[0].rename(moved)
    try:
        assert verify(copy) == []
        file = tmp_path / "base/checkpoints" / base[0].name / "rank-00000.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert "rank-00000.safetensors: has checksum" in verify(copy)[0]
        answer = run_ranks(f"{PROGRAM}:choice", 2, {"folder": str(copy.parent)})[0]
        assert "needs the frozen weights of another checkpoint, which is damaged" in answer
        assert copy.is_dir()
    finally:
        moved.rename(base[0])


def test_a_merged_export_computes_the_same(tuned: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = Path(tuned["path"])
    model, plain = build_model(settings(tuned["kind"])).eval(), build_model(settings(None)).eval()
    load_weights(model, path, ema=True)
    report = export_weights(path, tmp_path / "merged", weights="ema")
    tensors = load_file(tmp_path / "merged" / report.files[0])
    plain.load_state_dict({**tensors, **{second: tensors[first] for second, first in report.tied.items()}})

    with torch.no_grad():
        hidden, merged = model(lane(0, 0)).hidden, plain(lane(0, 0)).hidden  # type: ignore[union-attr]
    torch.testing.assert_close(merged, hidden, rtol=1e-4, atol=1e-5)
    kept = export_weights(path, tmp_path / "kept", merge=False)
    assert kept.merged == 0
    with CheckpointReader(path) as reader:
        for name, values in load_file(tmp_path / "kept" / kept.files[0]).items():
            assert torch.equal(values, whole_parameter(reader, name))
