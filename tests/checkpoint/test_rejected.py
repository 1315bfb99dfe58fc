"""Checkpoints with right checksums but wrong content: ``verify`` and all loading functions reject them."""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint import load_weights, read_manifest, verify
from mmscale.checkpoint.contents import count_non_finite
from mmscale.checkpoint.export import export_weights
from mmscale.checkpoint.imports import import_checkpoint, import_folder
from mmscale.checkpoint.manifest import MANIFEST, read_rank_metadata
from mmscale.checkpoint.reshard import verify_together
from mmscale.checkpoint.share import TensorPiece
from mmscale.checkpoint.warm_start import match
from mmscale.cli.main import main
from mmscale.dist import World
from mmscale.errors import CheckpointError, DamagedError
from mmscale.hf.read import CONFIG
from tests.checkpoint.hand_made import write_checkpoint
from tests.checkpoint.test_import_files import model_states, optim_states, write
from tests.checkpoint.toy_checkpoint import ALONE, META, TENSORS, make_checkpoint, rewrite, set_value
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToyModel, toy_model
from tests.hf.test_folders import folder, tensors

pytestmark = pytest.mark.fault

WEIGHT = "decoder.blocks.0.up.weight|master"


def answers(path: Path) -> list[str]:
    """Return the problems that ``verify`` finds; require that all loading functions raise the first of them."""
    problems = verify(path)
    assert problems
    with pytest.raises(DamagedError) as together:
        verify_together(ALONE, path)
    assert str(together.value).endswith(problems[0])
    model = ToyModel()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with pytest.raises(CheckpointError) as loading:
        load_weights(model, path)
    assert str(loading.value).endswith(problems[0])
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    return problems


def swap(header: dict[str, Any]) -> None:
    """Exchange the offsets of two tensors of equal size."""
    first, second = header[WEIGHT], header[WEIGHT.replace("blocks.0", "blocks.1")]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def rename(tensors: dict[str, Any]) -> None:
    tensors["other|master"] = tensors.pop(WEIGHT)


CHANGES: dict[str, tuple[dict[str, Callable[[dict[str, Any]], object]], str]] = {
    "number format": (
        {"header": lambda h: h[WEIGHT].update(dtype="I32")},
        "format I32 in the header, F32 in the metadata",
    ),
    "shape": ({"header": lambda h: h[WEIGHT].update(shape=[36, 12])}, r"shape \[36, 12\] in the header, \[432\] by"),
    "place": ({"header": swap}, "bytes .* in the header; by the metadata it has 432 values from byte"),
    "name": (
        {"header": rename},
        rf"{re.escape(WEIGHT)} is only in the metadata\n.*: other\|master is only in the header",
    ),
    "range": (
        {"metadata": lambda n: n["tensors"][WEIGHT].update(start=1, stop=433)},
        r"has the range 1:433, which is not inside its parameter of shape \[36, 12\]",
    ),
    "position": ({"metadata": lambda n: n.update(loader="{}")}, "the data position is damaged"),
    "both names": ({"header": rename, "metadata": lambda n: rename(n["tensors"])}, "lists no such parameter"),
    "rank": ({"metadata": lambda n: n.update(rank=1)}, "metadata of rank 1"),
    "no buffers": ({"manifest": lambda m: m["buffers"].clear()}, "lists no such buffer"),
    "one more buffer": ({"manifest": lambda m: m["buffers"].update(more=(2,))}, r"more\|buffer is missing"),
    "shape of a buffer": ({"manifest": lambda m: m["buffers"].update(counts=(1, 3))}, r"\[3\] in the header, \[1, 3\]"),
    "averages": ({"manifest": lambda m: m.update(ema=True)}, r"\|ema: the ranks' ranges do not cover"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_header_metadata_and_manifest_must_agree(tmp_path: Path, change: str) -> None:
    path = make_checkpoint(tmp_path)
    assert verify(path) == []
    changes, message = CHANGES[change]
    rewrite(path, **changes)
    problems = answers(path)
    assert re.search(message, "\n".join(problems)), problems


def test_the_shape_of_an_unsharded_tensor_must_match_its_metadata(tmp_path: Path) -> None:
    pieces = [TensorPiece("gate|master", 0, torch.ones(2)), TensorPiece("gate|row", 0, torch.ones(2, 3), whole=True)]
    path = write_checkpoint(tmp_path, [pieces], {"gate": (2,)})
    assert verify(path) == []
    rewrite(path, header=lambda header: header["gate|row"].update(shape=[2, 4]))
    assert verify(path) == ["rank-00000.safetensors: gate|row has the shape [2, 4] in the header"]


def test_damage_of_a_file_without_tensors_is_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, [[TensorPiece("gate|master", 0, torch.ones(2))], []], {"gate": (2,)})
    assert verify(path) == []
    file = path / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (problem,) = verify(path)
    assert problem.startswith("rank-00001.safetensors: has checksum ")
    assert problem.endswith("damaged: not a tensor")


@pytest.mark.parametrize(("rank", "damaged"), [(0, True), (1, False)])
def test_a_manifest_is_gone_if_rank_0_does_not_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, damaged: bool
) -> None:
    monkeypatch.setattr("mmscale.checkpoint.reshard.lowest_rank_error", lambda world, complaint: complaint)
    monkeypatch.setattr("mmscale.checkpoint.reshard.all_reduce_max", lambda world, verdict: verdict)
    path, world = make_checkpoint(tmp_path), World(rank, 2, rank, torch.device("cpu"))
    (path / MANIFEST).write_text("{}")
    with pytest.raises(DamagedError, match="its checksum does not match its text"):
        verify_together(world, path)
    (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read") as caught:
        verify_together(world, path)
    assert isinstance(caught.value, DamagedError) == damaged


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [WEIGHT, WEIGHT.replace("master", "exp_avg_sq"), "counts|buffer"])
def test_values_that_are_not_finite_are_named_and_counted(tmp_path: Path, key: str, value: float) -> None:
    path = make_checkpoint(tmp_path)
    for index in (0, 2):
        set_value(path, key, index, value)
    (problem,) = answers(path)
    assert f"{key}: 2 of " in problem
    assert "values are NaN or infinite" in problem
    with pytest.raises(CheckpointError, match=r"was not exported: .*: 2 of \d+ values"):
        export_weights(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_finite_values_are_counted_in_every_format(dtype: torch.dtype) -> None:
    values = torch.zeros(3, 4, dtype=dtype)
    assert count_non_finite(values) == 0
    assert count_non_finite(torch.full_like(values, torch.finfo(dtype).max)) == 0
    values[0, 0], values[2, 3], values[1, 1] = math.nan, math.inf, -math.inf
    assert count_non_finite(values.T) == 3
    assert count_non_finite(values[:0]) == count_non_finite(torch.zeros((), dtype=torch.int64)) == 0


def test_an_import_finds_values_that_are_not_finite(tmp_path: Path) -> None:
    values = tensors()
    values["model.norm.weight"][3] = math.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinite: decoder\.norm\.weight\|frozen \(1 of 8\)"):
        import_folder(folder(tmp_path / "hf", values), tmp_path / "run")
    weight = OrderedDict(weight=torch.arange(6.0).view(2, 3))
    state = optim_states()
    state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"][2] = math.inf
    source = write(tmp_path / "deepspeed", model_states(module=weight), state)
    with pytest.raises(CheckpointError, match=r"NaN or infinite: weight\|exp_avg \(1 of 6\)"):
        import_checkpoint(source, tmp_path / "run")
    assert list(tmp_path.glob("run/*")) == []


def test_buffers_must_be_those_of_the_model(tmp_path: Path) -> None:
    """The checkpoint is consistent, but lacks a buffer of the model (a router's bias), or has an additional one."""
    model = toy_model()
    del model._buffers["counts"]
    without = make_checkpoint(tmp_path, model=model)
    assert verify(without) == []
    with pytest.raises(CheckpointError, match="another model: the buffer counts is only in the model"):
        load_weights(ToyModel(), without)
    whole = make_checkpoint(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="another model: the buffer counts is only in the checkpoint"):
        load_weights(model, whole)
    # A warm start loads the buffers that fit, and reports the others.
    report = match(ToyModel(), read_manifest(without))
    assert (report.missing, report.unused, report.complete) == (("counts",), (), False)
    assert str(report).endswith("not in the checkpoint, unchanged: counts")
    report = match(model, read_manifest(whole))
    assert (report.missing, report.unused, report.complete) == ((), ("counts",), False)
    assert match(ToyModel(), read_manifest(whole)).complete


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # The path of a socket may have at most 108 bytes.
        made.bind(path.name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", [fifo, device, unix_socket, Path.mkdir])
def test_a_member_that_is_no_file_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    good = make_checkpoint(tmp_path)
    for name in (TENSORS, META, MANIFEST):
        path = shutil.copytree(good, tmp_path / name.replace(".", "-"))
        (path / name).unlink()
        place(path / name)
        assert re.search("not a regular file|a folder, expected a file", answers(path)[0])
        assert name in answers(path)[0]
        assert main(["checkpoint", "verify", str(path)]) == 1
    assert re.search("not a regular file|a folder, expected a file", "".join(capsys.readouterr().out.split("\n")))


@pytest.mark.timeout(60)
def test_an_import_does_not_block_on_a_fifo(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    (source / CONFIG).unlink()
    os.mkfifo(source / CONFIG)
    with pytest.raises(CheckpointError, match="not a regular file"):
        import_folder(source, tmp_path / "run")
    source = write(tmp_path / "deepspeed", model_states(), optim_states())
    (file,) = source.glob("*_optim_states.pt")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        import_checkpoint(source, tmp_path / "run")


def test_a_link_to_a_regular_file_is_one(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / TENSORS).rename(tmp_path / "elsewhere")
    (path / TENSORS).symlink_to(tmp_path / "elsewhere")
    assert verify(path) == []


@pytest.mark.dist
def test_an_engine_is_left_alone_by_a_checkpoint_that_lacks_something(tmp_path: Path) -> None:
    """A resume compares everything with the engine before it changes a value, and all ranks raise the same error."""
    for rank in run_ranks("tests.checkpoint.rejected_programs:resume_rejected", 2, {"folder": str(tmp_path)}):
        messages = rank["messages"]
        assert rank["changed"] == []
        assert "decoder.blocks.0.up.weight|exp_avg is missing" in messages["moments"]
        assert "the buffer counts is only in the model" in messages["buffers"]
        assert "rank-00001.json: random_state.cpu is not the state of a torch generator" in messages["random state"]
        assert "data position is damaged" in messages["loader"]


@pytest.mark.parametrize(
    ("name", "read"), [(MANIFEST, read_manifest), (META, lambda path: read_rank_metadata(path, 0))]
)
def test_json_of_a_checkpoint_has_a_largest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[Path], object]
) -> None:
    path = make_checkpoint(tmp_path)
    size = (path / name).stat().st_size
    monkeypatch.setattr("mmscale.checkpoint.manifest._MAX_JSON_BYTES", size)
    read(path)
    with (path / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(CheckpointError, match=f"{name}: larger than {size} bytes"):
        read(path)
