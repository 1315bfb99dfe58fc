"""``mmscale checkpoint import`` and ``export`` on a real run that two ranks saved with DeepSpeed and with mmscale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmscale.checkpoint import list_checkpoints, load_weights
from mmscale.checkpoint.export import export_weights
from mmscale.checkpoint.imports.layouts import MOMENTS
from mmscale.checkpoint.manifest import FORMAT, MANIFEST, Manifest, seal
from mmscale.checkpoint.reshard import CheckpointReader
from mmscale.checkpoint.share import RankShare, TensorPiece
from mmscale.cli.main import main
from mmscale.config import load
from mmscale.errors import CheckpointError
from mmscale.hf.read import INDEX
from mmscale.io.files import write_share
from mmscale.models.build import build_model
from mmscale.run.config import RunConfig
from tests.checkpoint.toy_checkpoint import rewrite
from tests.engine.ranks import ROOT, run_ranks

CONFIG = "tests/system/tiny.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save one engine as ``ours/step-2`` (mmscale) and ``theirs/global_step2`` (DeepSpeed)."""
    path = tmp_path_factory.mktemp("both")
    run_ranks("tests.checkpoint.import_programs:save_both", 2, {"config": CONFIG, "folder": str(path)})
    return path


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # Paths of the bundled data are relative to it.


def command(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Run a command with --json, and return its parsed output."""
    assert main(["checkpoint", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def all_values(path: Path) -> dict[str, Tensor]:
    """Read every master and moment, unsharded."""
    found = {}
    with CheckpointReader(path) as reader:
        for name, entry in reader.manifest.parameters.items():
            for kind in ("master", *MOMENTS):
                found[f"{name}|{kind}"] = values = torch.empty(torch.Size(entry.shape).numel())
                reader.fill(values, name, kind, 0)
        for name in reader.manifest.buffers:
            found[name] = reader.buffer(name)
    return found


@pytest.mark.dist
def test_a_run_imported_by_command_equals_our_own_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    report = command(capsys, "import", folder / "theirs" / "global_step2", run, "--config", CONFIG)
    (path,) = list_checkpoints(run / "checkpoints")
    (own,) = list_checkpoints(folder / "ours")
    assert report["checkpoint"] == str(path)
    assert (report["step"], report["optimizer_steps"], report["checked_against_model"]) == (2, 2, True)
    mine, theirs = all_values(own), all_values(path)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert command(capsys, "verify", run) == {"checkpoints": {path.name: []}}
    for step in (1, 3):
        copy = shutil.copytree(path, tmp_path / "copy")
        rewrite(copy, manifest=lambda values, step=step: values["state"].update(step=step))
        cut = copy.rename(path.with_name(f"step-0000000{step}"))
    (cut / "rank-00001.json").unlink()
    first, second, third = command(capsys, "list", run)["checkpoints"]
    assert [row["newest_whole"] for row in (first, second, third)] == [False, True, False]
    assert (second["bytes"], second["whole"]) == (sum(f.stat().st_size for f in path.glob("rank-*")), True)
    assert 0 <= second["age_seconds"] < 600
    assert third["problem"] == "rank-00001.json is missing"
    # A run folder exports its newest complete checkpoint.
    exported = command(capsys, "export", run, tmp_path / "weights", "--shard-bytes", 100_000, "--format", "bf16")
    assert (exported["step"], exported["configured"], exported["checkpoint"]) == (2, True, str(path))


@pytest.mark.dist
def test_wrong_words_are_sentences(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder / "theirs" / "global_step2"
    (own,) = list_checkpoints(folder / "ours")
    for words, code, message in (
        (["import", source, tmp_path / "run", "--rename", "x"], 2, "--rename x: expected OLD=NEW"),
        (["import", source, tmp_path / "run", "--stage", "none", "--config", CONFIG], 1, "no stage 'none'"),
        (["import", own, tmp_path / "run"], 1, "give the folder of one DeepSpeed checkpoint"),
        (["export", own, tmp_path], 1, "already there"),
        (["export", own, tmp_path / "new", "--weights", "ema"], 1, "holds no averaged weights (EMA)"),
    ):
        assert main(["checkpoint", *map(str, words)]) == code
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
def test_exported_weights_are_those_of_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmscale.checkpoint.export._CHUNK_VALUES", 1000)  # Every matrix in several pieces.
    (own,) = list_checkpoints(folder / "ours")
    report = export_weights(own, tmp_path / "out", shard_bytes=100_000)
    model = build_model(load(CONFIG, [], RunConfig).value.model, attention="sdpa", seed=None)
    load_weights(model, own)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in report.files}
    assert len(files) > 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, INDEX, "config.json"}
    found = {key: values for tensors in files.values() for key, values in tensors.items()}
    assert {key: name for name, tensors in files.items() for key in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in found.values()) == report.bytes
    expected = {key: values for key, values in model.state_dict().items() if key not in index["metadata"]["tied"]}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == model.config.model_dump(mode="json")
    for name in report.files[:-1]:  # A tensor alone may be larger than a shard; together they never are.
        assert sum(v.numel() * v.element_size() for v in files[name].values()) <= 100_000 or len(files[name]) == 1
    low = export_weights(own, tmp_path / "low", number_format="bf16")
    assert low.files == ("model-00001-of-00001.safetensors",)
    for key, values in load_file(tmp_path / "low" / low.files[0]).items():
        assert torch.equal(values, expected[key].bfloat16() if key in dict(model.named_parameters()) else expected[key])


@pytest.mark.dist
def test_a_damaged_checkpoint_is_not_exported(folder: Path, tmp_path: Path) -> None:
    (own,) = list_checkpoints(folder / "ours")
    copy = shutil.copytree(own, tmp_path / own.name)
    file = copy / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged and was not exported: .*rank-00001\.safetensors"):
        export_weights(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [own.name]


def saved_by_two(path: Path, averaged: bool) -> Path:
    """A checkpoint of two ranks, cut in the middle of the trained parameter ``w``.

    Without ``averaged`` only another trained parameter has an average.
    """
    path.mkdir()
    weights, average = torch.arange(6.0), 100 + torch.arange(6.0)
    files = {}
    for rank, (start, stop) in enumerate(((0, 4), (4, 6))):
        pieces = [TensorPiece("w|master", start, weights[start:stop])]
        if averaged:
            pieces.append(TensorPiece("w|ema", start, average[start:stop]))
        elif rank == 0:
            pieces += [TensorPiece("x|master", 0, average), TensorPiece("x|ema", 0, average)]
        if rank == 0:
            pieces.append(TensorPiece("still|frozen", 0, torch.ones(3).bfloat16()))
            pieces.append(TensorPiece("count|buffer", 0, torch.tensor([7]), whole=True))
        share = RankShare.of(rank, pieces, None, {"cpu": bytes(torch.get_rng_state().tolist()).hex()})
        written = write_share(path, share.names, share.header, share.metadata, share.bytes_of())
        files |= {name: file._asdict() for name, file in zip(share.names, written, strict=True)}
    parameters: dict[str, Any] = {"w": {"shape": [2, 3], "trained": True}, "still": {"shape": [3], "trained": False}}
    if not averaged:
        parameters["x"] = {"shape": [6], "trained": True}
    manifest = Manifest.model_validate(
        {
            "format": FORMAT,
            "state": {"step": 1, "stage_index": 0, "stage_step": 1, "tokens": 0, "samples": 0, "extra": {}},
            "stage": "all",
            "world_size": 2,
            "zero_stage": 3,
            "precision": "bf16",
            "optimizer_steps": 1,
            "parameters": parameters,
            "buffers": {"count": (1,)},
            "tied": {},
            "model_config_values": None,
            "files": files,
            "versions": {},
        }
    )
    (path / MANIFEST).write_text(seal(manifest))
    return path


def test_averaged_weights_are_exported_where_there_are_any(tmp_path: Path) -> None:
    report = export_weights(saved_by_two(tmp_path / "step-00000001", averaged=True), tmp_path / "out", weights="ema")
    found = load_file(tmp_path / "out" / report.files[0])
    assert found["w"].tolist() == [[100, 101, 102], [103, 104, 105]]
    assert (found["still"].tolist(), found["count"].tolist()) == ([1, 1, 1], [7])
    assert not report.configured
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(CheckpointError, match="averaged weights, but none of w"):
        export_weights(saved_by_two(tmp_path / "without", averaged=False), tmp_path / "other", weights="ema")
