"""Read hand-made checkpoints without an engine: listing, verification, errors and loaded values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from data_pipeline.order.state import LoaderState
from mmscale.checkpoint import TrainState, choose, find_latest, load_weights, read_manifest, read_state, verify
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.load import fill_frozen
from mmscale.checkpoint.manifest import (
    MANIFEST,
    SavedState,
    best_step,
    checkpoints_of,
    list_checkpoints,
    manifest_checksum,
    model_config_of,
    newest_of,
)
from mmscale.checkpoint.reshard import CheckpointReader, verify_together
from mmscale.checkpoint.save import stale_checkpoints
from mmscale.checkpoint.share import TensorPiece
from mmscale.dist import World
from mmscale.errors import CheckpointError
from mmscale.io.files import finalize
from mmscale.io.writer_process import Writer
from tests.checkpoint.hand_made import whole_pieces, write_checkpoint
from tests.data_pipeline.lane_states import toy_lane
from tests.engine.toy import ToyModel, toy_model
from tests.models.tiny import config

ALONE = World(0, 1, 0, torch.device("cpu"))
TIED = {"head.weight": "decoder.embed.weight"}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def flip_bit(file: Path, index: int) -> None:
    data = bytearray(file.read_bytes())
    data[index] ^= 1
    file.write_bytes(data)


def toy_checkpoint(
    folder: Path,
    model: ToyModel,
    *,
    step: int = 3,
    kinds: Sequence[str] = KINDS,
    instead: dict[str, Tensor | None] | None = None,
    **manifest: Any,
) -> Path:
    """Write a checkpoint of a toy model as two ranks, with a frozen tower. Averages are the weights plus 3.

    ``instead`` replaces values of parameters; None omits a parameter.
    """
    named = {name: values.detach() for name, values in model.named_parameters()} | (instead or {})
    parameters = {name: values for name, values in named.items() if values is not None}
    frozen = [name for name in parameters if name.startswith("vision")]
    trained = {name: values for name, values in parameters.items() if name not in frozen}
    first = {name: values for number, (name, values) in enumerate(trained.items()) if number % 2}
    second = {name: values for name, values in trained.items() if name not in first}
    ranks = [whole_pieces(first, kinds), whole_pieces(second, kinds)]
    ranks[1] += whole_pieces({name: parameters[name] for name in frozen}, ("frozen",))
    ranks[0].append(TensorPiece("counts|buffer", 0, model.counts, whole=True))
    values = {
        "buffers": {"counts": tuple(model.counts.shape)},
        "tied": TIED,
        "ema": "ema" in kinds,
        "frozen": frozen,
        **manifest,
    }
    return write_checkpoint(folder, ranks, {n: tuple(v.shape) for n, v in parameters.items()}, step=step, **values)


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and update its checksum."""
    record = json.loads((path / MANIFEST).read_text())
    del record["crc32"]
    change(record)
    body = json.dumps(record).removeprefix("{")
    (path / MANIFEST).write_text(f'{{"crc32":"{crc32(body.encode()):08x}",\n{body}')


@pytest.mark.parametrize("ema", [False, True])
def test_weights_averages_and_buffers_are_loaded(tmp_path: Path, ema: bool) -> None:
    model = toy_model(1)
    model.counts.copy_(torch.tensor([5.0, -1.0, 2.0]))
    path = toy_checkpoint(tmp_path, model)
    assert verify(path) == []
    loaded, filled = toy_model(2), toy_model(2)
    load_weights(loaded, path, ema=ema)
    fill_frozen(filled, gather=None, path=path, zero_stage=2, world=ALONE, ema=ema)
    for found in (loaded, filled):
        assert found.counts.tolist() == [5.0, -1.0, 2.0]
        for name, values in model.named_parameters():
            moved = 3 if ema and not name.startswith("vision") else 0
            assert torch.equal(found.get_parameter(name), values + moved), name


def test_ranges_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    part = [TensorPiece("w|master", 0, torch.ones(3)), TensorPiece("w|exp_avg", 0, torch.ones(4))]
    path = write_checkpoint(tmp_path, [part], {"w": (4,)})
    message = f"{path} is damaged: w|master: the ranks' ranges do not cover its 4 values exactly once"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        verify_together(ALONE, path)
    (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        verify_together(ALONE, path)
    assert verify(path) == [f"{path} is no checkpoint: manifest.json cannot be read (No such file or directory)"]


def test_a_buffer_of_one_value_has_no_dimension(tmp_path: Path) -> None:
    scale = TensorPiece("scale|buffer", 0, torch.tensor(2.5), whole=True)
    path = write_checkpoint(
        tmp_path, [[*whole_pieces({"w": torch.ones(4)}), scale]], {"w": (4,)}, buffers={"scale": ()}
    )
    with CheckpointReader(path) as reader:
        assert torch.equal(reader.buffer("scale"), torch.tensor(2.5))


def test_a_buffer_of_another_shape_is_refused(tmp_path: Path) -> None:
    other = toy_model(1)
    other.counts = torch.arange(4.0)
    path, model = toy_checkpoint(tmp_path, other), toy_model(2)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the buffer counts is \[4\] in the checkpoint, \[3\] here"):
        load_weights(model, path)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_differences_are_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    model, old = toy_model(2), torch.ones(2)

    def refused(name: str, ema: bool = False, **changes: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_weights(model, toy_checkpoint(tmp_path / name, toy_model(1), **changes), ema=ema)
        return str(caught.value)

    message = refused("shape", instead={"connector.gate": torch.ones(2)})
    assert message.endswith("is a checkpoint of another model: connector.gate is [2] in the checkpoint, [1] here")
    message = refused("less", instead={"connector.gate": None})
    assert message.endswith("of another model: connector.gate is only in the model")
    assert "tied parameters are {} in the checkpoint" in refused("tied", tied={})
    assert "holds no average of the weights" in refused("average", ema=True, kinds=KINDS[:-1])
    for count, words in ((5, "; and 2 more differences"), (4, "; and 1 more differences"), (3, "")):
        message = refused(str(count), instead={f"old.{number}": old for number in range(count)})
        assert message.endswith("; ".join(f"old.{number} is only in the checkpoint" for number in range(3)) + words)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), toy_model(2).parameters(), strict=True))


def test_configurations_of_the_model_are_compared_where_both_have_a_value(tmp_path: Path) -> None:
    model = toy_model(1)
    settings = config("embedding")
    model.config = settings  # type: ignore[assignment]
    values = settings.model_dump(mode="json")
    load_weights(model, toy_checkpoint(tmp_path / "same", model, model_config_values=values))
    load_weights(model, toy_checkpoint(tmp_path / "none", model, model_config_values=None))
    older = {**values, "decoder": {key: value for key, value in values["decoder"].items() if key != "hidden_dim"}}
    load_weights(model, toy_checkpoint(tmp_path / "older", model, model_config_values=older))
    other = {**values, "decoder": {**values["decoder"], "hidden_dim": 999}}
    path = toy_checkpoint(tmp_path / "other", model, model_config_values=other)
    with pytest.raises(CheckpointError, match=r"model\.decoder\.hidden_dim is 999 in the checkpoint, 32 here"):
        load_weights(model, path)
    text = config(None)
    model.config = text  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"model\.vision is \{.*\} in the checkpoint, None here"):
        load_weights(model, tmp_path / "same" / "step-00000003")
    model.config = settings  # type: ignore[assignment]
    bare = toy_checkpoint(tmp_path / "text", model, model_config_values=text.model_dump(mode="json"))
    with pytest.raises(CheckpointError, match=r"model\.vision is None in the checkpoint, \{.*\} here"):
        load_weights(model, bare)
    assert model_config_of(read_manifest(tmp_path / "same" / "step-00000003"), path) == settings
    with pytest.raises(CheckpointError, match="does not store its model's configuration"):
        model_config_of(read_manifest(tmp_path / "none" / "step-00000003"), path)
    with pytest.raises(CheckpointError, match="its model's configuration is not valid"):
        model_config_of(read_manifest(path).model_copy(update={"model_config_values": {"decoder": 3}}), path)


def test_a_damaged_byte_is_attributed_to_its_tensor(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path, toy_model(1))
    with CheckpointReader(path) as reader:
        entries = reader.rank_metadata(1).tensors
    keys = list(entries)
    file = path / "rank-00001.safetensors"
    for key in (keys[0], keys[5], keys[-1]):
        for index in {entries[key].offset, entries[key].offset + 3}:
            flip_bit(file, index)
            (problem,) = verify(path)
            assert re.fullmatch(
                rf"rank-00001.safetensors: has checksum \w{{8}}, expected \w{{8}}; damaged: {re.escape(key)}", problem
            )
            with pytest.raises(CheckpointError, match="is damaged: rank-00001"):
                verify_together(ALONE, path)
            flip_bit(file, index)
    flip_bit(file, 20)
    assert verify(path)[0].endswith("damaged: not a tensor")
    flip_bit(path / "rank-00001.json", 20)
    assert len(verify(path)) == 2
    flip_bit(file, 20)
    assert verify(path)[0].endswith("damaged: not a tensor")
    (path / "rank-00001.json").write_bytes(b"x")
    assert "1 bytes," in verify(path)[0]
    (path / "rank-00001.json").unlink()
    assert verify(path) == ["rank-00001.json: No such file or directory"]
    with pytest.raises(CheckpointError, match=r"rank-00001.json is missing; `mmscale checkpoint verify`"):
        CheckpointReader(path)


def test_the_newest_whole_checkpoint_is_found_and_the_newest_of_all_is_checked(tmp_path: Path) -> None:
    paths = [toy_checkpoint(tmp_path / "checkpoints", toy_model(1), step=step) for step in (9, 10, 100_000_000)]
    folder = paths[0].parent
    stop, previous = CheckpointConfig(), CheckpointConfig(on_damage="previous")
    assert list_checkpoints(folder) == paths
    assert find_latest(folder) == choose(ALONE, folder, stop) == paths[2]
    assert choose(ALONE, folder, stop, passes=lambda path: path != paths[2]) == paths[1]
    assert choose(ALONE, folder, stop, passes=lambda path: False) is None
    assert choose(ALONE, tmp_path / "none", stop) is None
    for given in (tmp_path, folder):
        assert checkpoints_of(given) == paths
        assert newest_of(given) == paths[2]
    (folder / "step-00000007").write_text("no folder")
    assert list_checkpoints(folder) == paths
    alone = toy_checkpoint(tmp_path / "alone", toy_model(1))
    assert newest_of(alone.parent) == alone
    assert checkpoints_of(paths[0]) == [paths[0]]
    assert newest_of(paths[0]) == paths[0]
    flip_bit(paths[2] / "rank-00000.safetensors", -1)  # The size is right; only the checksum is wrong.
    assert find_latest(folder) == paths[2]
    notes: list[str] = []
    with pytest.raises(CheckpointError, match=r"step-100000000 is damaged: .*set checkpoint.on_damage=previous"):
        choose(ALONE, folder, stop, notes.append)
    assert notes == []
    assert choose(ALONE, folder, previous, notes.append) == paths[1]
    assert [note.partition(":")[0] for note in notes[:1]] == ["skipped"]
    assert len(notes) == 2
    assert "step-100000000 is set aside as step-100000000.damaged" in notes[1]
    assert newest_of(folder) == find_latest(folder) == paths[1]
    (paths[1] / MANIFEST).write_text("{}")
    assert newest_of(folder) == paths[0]
    (paths[0] / MANIFEST).unlink()
    assert find_latest(folder) is None
    with pytest.raises(CheckpointError, match="no checkpoint is complete"):
        newest_of(tmp_path)
    assert newest_of(paths[0]) == paths[0], "a checkpoint that is given by name is returned unchecked"
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        checkpoints_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(format=3), "has format 3, this version reads 2"),
        (lambda r: r.update(world_size=3), "its 4 files are not those of 3 ranks"),
        (lambda r: r.update(world_size=1), "its 4 files are not those of 1 ranks"),
        (lambda r: r["files"].update({"rank-00002.json": r["files"].pop("rank-00001.json")}), "files are not those"),
        (lambda r: r["state"].update(step=-1), "damaged: state.step: must be at least 0"),
        (lambda r: r.update(parameters=3), "damaged: parameters: expected a mapping"),
        (lambda r: r.update(more=3), "damaged: more: unknown key"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = toy_checkpoint(tmp_path, toy_model(1))
    reseal(path, lambda record: None)
    assert verify(path) == []
    reseal(path, change)
    with pytest.raises(CheckpointError, match=words):
        read_manifest(path)
    assert find_latest(tmp_path) is None


def test_the_checksum_of_a_manifest_covers_all_of_it(tmp_path: Path) -> None:
    path = toy_checkpoint(tmp_path, toy_model(1))
    text = (path / MANIFEST).read_bytes()
    assert manifest_checksum(path) == text[10:18].decode()
    assert crc32(text[text.index(b"\n") + 1 :]) == int(manifest_checksum(path), 16)
    for index in range(0, len(text), 7):
        flip_bit(path / MANIFEST, index)
        with pytest.raises(CheckpointError):
            read_manifest(path)
        (path / MANIFEST).write_bytes(text)
    (path / MANIFEST).write_bytes(b"x" + text)
    with pytest.raises(CheckpointError, match="does not begin with its checksum"):
        manifest_checksum(path)
    (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
        manifest_checksum(path)


def test_the_state_holds_the_lanes_of_all_ranks(tmp_path: Path) -> None:
    model = toy_model(1)
    saved = SavedState(step=3, stage_index=1, stage_step=2, tokens=30, samples=8, extra={"note": [1]})
    lanes = [{0: toy_lane(3, 0), 2: toy_lane(3, 2)}, {1: toy_lane(3, 1)}]
    texts = [LoaderState("toy:1", 3, each).to_json() for each in lanes]
    path = toy_checkpoint(tmp_path / "a", model, state=saved, loaders=texts)
    assert read_state(path) == TrainState(
        3, 1, 2, 30, 8, LoaderState("toy:1", 3, {**lanes[0], **lanes[1]}), {"note": [1]}
    )
    path = toy_checkpoint(tmp_path / "b", model, state=saved, loaders=[texts[1], None])
    with pytest.raises(CheckpointError, match=r"rank-00001.json: loader: the data position is damaged: null, expected"):
        read_state(path)
    unseen = saved.model_copy(update={"samples": 0})
    assert read_state(toy_checkpoint(tmp_path / "c", model, state=unseen)).loader is None
    path = toy_checkpoint(tmp_path / "d", model, state=saved, loaders=[texts[0], texts[0]])
    with pytest.raises(CheckpointError, match="the data position is damaged: two ranks hold lane 0"):
        read_state(path)


def test_missing_values_are_named(tmp_path: Path) -> None:
    model = toy_model(1)
    model.vision.bfloat16()
    path = toy_checkpoint(tmp_path, model)
    with CheckpointReader(path) as reader:
        assert reader.weights_kind("vision.weight") == reader.weights_kind("vision.weight", ema=True) == "frozen"
        assert reader.weights_kind("connector.gate") == "master"
        assert reader.weights_kind("connector.gate", ema=True) == "ema"
        assert reader.dtype("connector.gate", "ema") is torch.float32
        assert reader.dtype("vision.weight", "frozen") is torch.bfloat16
        with pytest.raises(CheckpointError, match=r"does not hold connector.gate\|old"):
            reader.dtype("connector.gate", "old")
        with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: other\|buffer cannot be read"):
            reader.buffer("other")
        assert reader.buffer("counts").tolist() == [0.0, 1.0, 2.0]


def test_a_checkpoint_kept_for_its_step_does_not_count_as_one_of_the_newest(tmp_path: Path) -> None:
    paths = [toy_checkpoint(tmp_path, toy_model(1), step=step) for step in (4, 6, 8, 9)]
    newest = tmp_path / "step-00000010"

    def removed(**keep: int) -> list[int]:
        return [int(path.name[5:]) for path in stale_checkpoints(newest, CheckpointConfig(**keep))]  # type: ignore[arg-type]

    assert stale_checkpoints(newest, None) == []
    assert removed(keep_last=1) == [4, 6, 8, 9]
    assert removed(keep_last=2) == [4, 6, 8]
    assert removed(keep_last=2, keep_every=4) == [6]
    assert removed(keep_last=4) == [4]
    assert removed(keep_last=5) == removed(keep_last=99) == []
    assert stale_checkpoints(paths[3], CheckpointConfig(keep_last=1)) == paths[:3], "the newest is there already"
    later = toy_checkpoint(tmp_path, toy_model(1), step=12)
    assert later not in stale_checkpoints(newest, CheckpointConfig(keep_last=1)), (
        "a later step is kept: the run resumed earlier"
    )


def test_the_best_checkpoint_of_each_kept_one_is_kept(tmp_path: Path) -> None:
    def save(step: int, best: int | None) -> None:
        path = toy_checkpoint(tmp_path, toy_model(1), step=step)
        reseal(path, lambda record: record["state"]["extra"].update(best=best and {"step": best}))

    def removed(newest: int, best: int | None, keep_last: int) -> list[int]:
        keep = CheckpointConfig(keep_last=keep_last)
        return [int(path.name[5:]) for path in stale_checkpoints(tmp_path / f"step-{newest:08d}", keep, best)]

    for step, best in ((2, None), (4, 4), (6, 4), (8, 8), (10, 8)):
        save(step, best)
    assert removed(12, 8, keep_last=1) == [2, 4, 6, 10]
    assert removed(12, 8, keep_last=2) == [2, 4, 6], "10 names 8 as its best"
    assert removed(12, 12, keep_last=2) == [2, 4, 6], "a run that goes back to 10 needs 8"
    assert removed(12, 12, keep_last=4) == [2], "a run that goes back to 6 needs 4"
    assert removed(12, None, keep_last=1) == [2, 4, 6, 8, 10]
    for wrong in ({"step": -1}, {"step": True}, {"step": "4"}, [4], 4):
        assert best_step({"best": wrong}) is None


@pytest.mark.parametrize("background", [True, False])
def test_the_link_to_the_best_checkpoint_follows_it(tmp_path: Path, background: bool) -> None:
    folder, keep = tmp_path / "checkpoints", CheckpointConfig(keep_last=1, background=background)
    for step in (1, 2, 3):
        partial = folder / f"step-{step:08d}.partial"
        partial.mkdir(parents=True)
        stale = [folder / "step-00000001"] if step == 3 else []
        best = folder / f"step-{min(step, 2):08d}"
        if keep.background:
            writer = Writer(1)
            arguments = {"partial": str(partial), "final": str(partial.with_suffix("")), "name": "x", "text": "x"}
            writer.send("publish", **arguments, stale=[str(path) for path in stale], best=str(best))
            assert writer.result(None) is True
            writer.close()
        else:
            finalize(partial, partial.with_suffix(""), ("x", "x"), stale, best)
        assert (folder / "best").readlink() == Path(best.name)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-00000002", "step-00000003"]
