"""Save from plain tensors: the written files, existing checkpoints, and the state after a failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from data_pipeline.order.state import LoaderState
from mmscale.checkpoint import TrainState, list_checkpoints, read_manifest, resume, save, verify
from mmscale.checkpoint import save as _save_function
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.manifest import FileEntry
from mmscale.checkpoint.share import LazyTensor, RankShare, TensorPiece, persistent_buffers, share_of
from mmscale.dist import World
from mmscale.engine.optimizers.eight_bit import QuantisedMoment, QuantisedRange
from mmscale.errors import CheckpointError
from mmscale.io.files import WrittenFile
from tests.checkpoint.plain_engine import plain_engine
from tests.data_pipeline.lane_states import toy_lane
from tests.engine.toy import toy_model
from tests.models.tiny import config

saving = sys.modules[_save_function.__module__]  # The package has a function of this name.
STATE = TrainState(7, 1, 3, 70, 9, LoaderState("toy:1", 7, {0: toy_lane(7)}), {"note": 1})


@pytest.fixture(autouse=True)
def deepspeed() -> Iterator[None]:
    """Replace DeepSpeed: a save only needs its version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="1.2.3"))
        yield


def engine_of(seed: int) -> Any:
    torch.manual_seed(0)
    model = toy_model(seed)
    model.vision.requires_grad_(requires_grad=False)
    model.counts.add_(seed)
    engine = plain_engine(model)
    engine.partition.steps, engine.stage_step, engine.scaler = 5, 3, {"scale": 8.0}
    for name, kinds in engine.partition.moments.items():
        for number, values in enumerate(kinds.values()):
            values.copy_(model.get_parameter(name).detach().view(-1) + number + seed)
    engine.partition.whole["decoder.norm.weight|exp_avg_sq_row"].fill_(seed)
    return engine


def test_what_was_saved_is_resumed_and_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    engine, other = engine_of(1), engine_of(2)
    engine.model.config = config(None)
    torch.manual_seed(5)
    path = save(engine, STATE, tmp_path / "a" / "checkpoints")
    drawn = torch.rand(3)
    assert (path, verify(path)) == (tmp_path / "a" / "checkpoints" / "step-00000007", [])
    manifest = read_manifest(path)
    assert (manifest.stage, manifest.world_size, manifest.zero_stage, manifest.precision) == ("all", 1, 1, "fp32")
    assert (manifest.optimizer, manifest.ema, manifest.optimizer_steps) == ("adamw", True, 5)
    assert manifest.buffers == {"counts": (3,)}
    assert manifest.tied == {"head.weight": "decoder.embed.weight"}
    assert manifest.model_config_values == config(None).model_dump(mode="json")
    assert manifest.versions == {"torch": torch.__version__, "deepspeed": "1.2.3"}
    assert not manifest.parameters["vision.weight"].trained
    assert resume(other, path) == STATE
    assert torch.equal(torch.rand(3), drawn)
    assert (other.partition.steps, other.scaler) == (5, {"scale": 8.0})
    assert all(torch.equal(p, q) for p, q in zip(other.model.parameters(), engine.model.parameters(), strict=True))
    assert other.model.counts.tolist() == [1.0, 2.0, 3.0]
    assert other.partition.whole["decoder.norm.weight|exp_avg_sq_row"].tolist() == [1.0, 1.0, 1.0]
    for name, kinds in engine.partition.moments.items():
        assert all(torch.equal(other.partition.moments[name][kind], values) for kind, values in kinds.items())
    engine.stage.ema = None
    assert not read_manifest(save(engine, STATE, tmp_path / "b")).ema


def test_an_existing_checkpoint_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = save(engine_of(1), STATE, tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert save(engine_of(2), STATE, tmp_path) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    for stage_index, stage_step in ((0, 3), (1, 2)):
        with pytest.raises(CheckpointError, match="is a checkpoint of another stage at the same step"):
            save(engine_of(1), TrainState(7, stage_index, stage_step), tmp_path)
    (path / "rank-00000.json").write_text("cut")
    (tmp_path / "step-00000005.partial").mkdir()
    (tmp_path / "notes.partial").mkdir()
    assert save(engine_of(1), STATE, tmp_path) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "notes.partial",
        "step-00000007",
        "step-00000007.damaged",
    ]


def test_older_checkpoints_are_removed_after_the_new_one_is_complete(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(engine_of(step), TrainState(step), tmp_path, CheckpointConfig(keep_last=2, keep_every=3))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004", "step-00000005"]
    save(engine_of(6), TrainState(6), tmp_path)
    assert len(list_checkpoints(tmp_path)) == 4


@pytest.mark.parametrize("part", ["write_share", "finalize", "missing_or_truncated", "_prepare"])
def test_a_save_that_fails_says_so_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    old = save(engine_of(1), TrainState(3), tmp_path)

    def fails(*arguments: object) -> str:
        if part == "missing_or_truncated":
            return "rank-00000.json is missing"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, part, fails)
        words = "is missing; do all ranks see" if part == "missing_or_truncated" else "No space left on device"
        with pytest.raises(CheckpointError, match=f"cannot write step-00000007 into {tmp_path}: .*{words}"):
            save(engine_of(2), STATE, tmp_path, CheckpointConfig(keep_last=1))
    assert [*tmp_path.iterdir()] == [old]
    assert verify(old) == []


def test_a_defect_is_not_called_a_failure_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(saving, "write_share", fails)
    with pytest.raises(ValueError, match="a defect"):
        save(engine_of(2), STATE, tmp_path)


def test_only_rank_0_makes_and_publishes_the_folder_and_every_rank_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run two ranks one after the other. The patched collectives report that the other rank agrees."""
    monkeypatch.setattr(saving, "all_reduce_sum_list", lambda world, values: values)
    monkeypatch.setattr(saving, "lowest_rank_error", lambda world, complaint: complaint)
    engines = [engine_of(1), engine_of(1)]
    for rank, engine in enumerate(engines):
        engine.world = World(rank, 2, rank, torch.device("cpu"))
    folder = tmp_path / "checkpoints"
    assert saving.begin(engines[1], STATE, folder) is not None
    assert not folder.exists()
    target = saving.begin(engines[0], STATE, folder)
    assert target is not None
    assert [path.name for path in folder.iterdir()] == ["step-00000007.partial"]
    save(engines[1], STATE, folder)
    assert list(folder.iterdir()) == [target.partial]
    assert sorted(path.name for path in target.partial.iterdir()) == ["rank-00001.json", "rank-00001.safetensors"]


def test_every_rank_learns_the_files_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    written = [[WrittenFile(10 * rank + 1, 2**32 - rank - 1), WrittenFile(10 * rank + 2, rank)] for rank in range(3)]
    worlds = [World(rank, 3, rank, torch.device("cpu")) for rank in range(3)]
    given: list[list[float]] = []
    monkeypatch.setattr(saving, "all_reduce_sum_list", lambda world, values: given.append(values) or values)
    for world, mine in zip(worlds, written, strict=True):
        saving.gather_files(world, mine)
    monkeypatch.setattr(
        saving, "all_reduce_sum_list", lambda world, values: [sum(each) for each in zip(*given, strict=True)]
    )
    expected = {
        f"rank-{rank:05d}.{ending}": FileEntry(bytes=entry.bytes, crc32=entry.crc32)
        for rank, mine in enumerate(written)
        for ending, entry in zip(("safetensors", "json"), mine, strict=True)
    }
    for world, mine in zip(worlds, written, strict=True):
        assert saving.gather_files(world, mine) == expected


def test_metadata_and_manifest_are_plain_json(tmp_path: Path) -> None:
    path = save(engine_of(1), STATE, tmp_path)
    metadata = json.loads((path / "rank-00000.json").read_text())
    assert metadata["rank"] == 0
    assert json.loads(metadata["loader"])["lanes"] == {"0": [0, 0, 0, 0, 7]}
    kinds = {key.rpartition("|")[2] for key in metadata["tensors"]}
    assert kinds == {"master", "frozen", "exp_avg", "exp_avg_sq", "ema", "buffer", "exp_avg_sq_row"}
    whole = {key for key, entry in metadata["tensors"].items() if entry["whole"]}
    assert whole == {"counts|buffer", "decoder.norm.weight|exp_avg_sq_row"}
    assert json.loads((path / "manifest.json").read_text())["state"]["extra"] == {"note": 1}


def test_the_generator_of_a_device_is_saved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = engine_of(1), list[str]()
    engine.world = World(0, 1, 0, torch.device("cuda", 2))
    monkeypatch.setattr(
        torch.cuda,
        "get_rng_state",
        lambda device: asked.append(str(device)) or torch.tensor([1, 2, 255], dtype=torch.uint8),
    )
    metadata = json.loads((save(engine, STATE, tmp_path) / "rank-00000.json").read_text())
    assert (metadata["random_state"]["cuda"], asked) == ("0102ff", ["cuda:2"])


def test_a_share_is_a_safetensors_file_and_its_metadata_lists_every_tensor() -> None:
    """Values of every kind: a non-contiguous view, 8-bit moments, lazy tensors."""
    values = torch.arange(12.0).view(3, 4)
    moment = QuantisedRange(QuantisedMoment(5, 11, signed=True, device=torch.device("cpu")), 0, 6)
    moment.copy_(torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, -1.0]))
    made = LazyTensor((2, 3), torch.bfloat16, lambda: values[:2, :3].bfloat16())
    pieces = [
        TensorPiece("a|master", 4, values.T),
        TensorPiece("a|exp_avg", 5, moment),
        TensorPiece("b|frozen", 0, made),
        TensorPiece("c|buffer", 0, made, whole=True),
    ]
    share = RankShare.of(3, pieces, "where", {"cpu": "00"})
    chunks = [bytes(chunk) for chunk in share.bytes_of()]
    assert share.lengths == [len(chunk) for chunk in chunks] == [48, 24, 12, 12]
    expected = {
        "a|master": values.T.reshape(-1),
        "a|exp_avg": moment.float(),
        "b|frozen": made.make().view(-1),
        "c|buffer": made.make(),
    }
    data = share.header + b"".join(chunks)
    found = safetensors.torch.load(data)
    assert found.keys() == expected.keys() == share.metadata["tensors"].keys()
    for (key, start, _, whole), chunk in zip(pieces, chunks, strict=True):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
        entry = share.metadata["tensors"][key]
        assert (entry["start"], entry["stop"]) == (start, start + expected[key].numel())
        assert data[entry["offset"] :][: len(chunk)] == chunk
        assert entry["whole"] == whole
    assert (share.metadata["rank"], share.metadata["loader"], share.metadata["random_state"]) == (
        3,
        "where",
        {"cpu": "00"},
    )


def test_only_rank_0_saves_unsharded_tensors() -> None:
    engine = engine_of(1)
    keys = {*share_of(engine, STATE).metadata["tensors"]}
    whole = {key: entry for key, entry in share_of(engine, STATE).metadata["tensors"].items() if entry["whole"]}
    assert {key: (entry["start"], entry["stop"]) for key, entry in whole.items()} == {
        "counts|buffer": (0, 3),
        "decoder.norm.weight|exp_avg_sq_row": (0, 3),
    }
    engine.world = World(1, 2, 1, torch.device("cpu"))
    assert {*share_of(engine, STATE).metadata["tensors"]} == keys - whole.keys()


def test_persistent_buffers_are_those_of_the_state_dict() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    for module in (model, model[0], model[1][0]):
        module.register_buffer("made_anew", torch.ones(2), persistent=False)
        module.register_buffer("kept", torch.ones(2))
    parameters = dict(model.named_parameters())
    expected = {name: values for name, values in model.state_dict(keep_vars=True).items() if name not in parameters}
    found = persistent_buffers(model)
    assert found.keys() == expected.keys()
    assert all(values is expected[name] for name, values in found.items())
