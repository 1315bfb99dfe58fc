"""Resume and warm start from hand-made checkpoints into plain tensors, with any two world sizes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.order.state import LoaderState
from mmscale.checkpoint import read_manifest, resume, warm_start
from mmscale.checkpoint.manifest import SavedState
from mmscale.checkpoint.share import TensorPiece, persistent_buffers
from mmscale.checkpoint.warm_start import LoadReport, Resampled, Resized, match
from mmscale.dist import World
from mmscale.engine.partition import shard_range
from mmscale.errors import CheckpointError
from mmscale.models.build import build_model
from mmscale.nn.patch_embed import resample_positions
from mmscale.optim.config import AdamWConfig
from tests.checkpoint.hand_made import write_checkpoint
from tests.checkpoint.plain_engine import plain_engine
from tests.checkpoint.warm_programs import settings
from tests.data_pipeline.lane_states import toy_lane
from tests.engine.toy import toy_model
from tests.models.tiny import MOE, config

KINDS = {"exp_avg": 1.0, "exp_avg_sq": 2.0, "ema": 3.0}
ROW = "decoder.norm.weight|exp_avg_sq_row"
TIED = {"head.weight": "decoder.embed.weight"}


def saved_by(folder: Path, model: nn.Module, ranks: int, **manifest: Any) -> Path:
    """Write a checkpoint of a model as ``ranks`` ranks. Moments and average are the weights plus a number per kind."""
    pieces: list[list[TensorPiece]] = []
    for rank in range(ranks):
        pieces.append([])
        for name, parameter in model.named_parameters():
            start, stop = shard_range(parameter.numel(), rank, ranks)
            values = parameter.detach().view(-1)[start:stop]
            kinds = {"master": 0.0, **KINDS} if parameter.requires_grad else {"frozen": 0.0}
            pieces[-1] += [
                TensorPiece(f"{name}|{kind}", start, values + more) for kind, more in kinds.items() if start < stop
            ]
    buffers = persistent_buffers(model)
    pieces[0] += [TensorPiece(f"{name}|buffer", 0, values, whole=True) for name, values in buffers.items()]
    pieces[0].append(TensorPiece(ROW, 0, torch.tensor([7.0, 8.0, 9.0]), whole=True))
    values = {
        "state": SavedState(step=9, stage_index=1, stage_step=4, tokens=90, samples=5, extra={"note": 1}),
        "loaders": [LoaderState("toy:1", 9, {rank: toy_lane(9)}).to_json() for rank in range(ranks)],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "buffers": {name: tuple(each.shape) for name, each in buffers.items()},
        "optimizer_steps": 6,
        "ema": True,
        "loss_scaler": {"scale": 64.0},
        **manifest,
    }
    return write_checkpoint(folder, pieces, {n: tuple(p.shape) for n, p in model.named_parameters()}, step=9, **values)


@pytest.mark.parametrize(("saved", "read"), [(1, 1), (3, 1), (1, 3), (5, 2), (2, 5)])
def test_every_value_comes_back_however_it_is_cut(tmp_path: Path, saved: int, read: int) -> None:
    source, model = toy_model(1), toy_model(2)
    source.counts.copy_(torch.tensor([4.0, 5.0, 6.0]))
    for each in (source, model):
        each.vision.requires_grad_(requires_grad=False)
    path = saved_by(tmp_path, source, saved, tied=TIED)
    next_draws = torch.rand(3)
    for rank in range(read):
        engine = plain_engine(model, rank, read)
        state = resume(engine, path)
        assert torch.equal(torch.rand(3), next_draws)
        for owned in engine.partition.owned(whole=True):
            truth = source.get_parameter(owned.name).detach().view(-1)[owned.start : owned.stop]
            for kind, values in owned.moments.items():
                assert torch.equal(values, truth + KINDS[kind]), (owned.name, kind)
        assert engine.partition.whole[ROW].tolist() == [7.0, 8.0, 9.0]
        assert (engine.partition.steps, engine.stage_step, engine.scaler) == (6, 4, {"scale": 64.0})
        assert engine.partition.calls == ["published"]
        assert (state.step, state.stage_index, state.stage_step, state.tokens, state.samples) == (9, 1, 4, 90, 5)
        assert state.extra == {"note": 1}
        assert state.loader == LoaderState("toy:1", 9, {rank: toy_lane(9) for rank in range(saved)})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), source.parameters(), strict=True))
    assert model.counts.tolist() == [4.0, 5.0, 6.0]


def test_the_generator_of_a_device_is_restored_on_that_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = saved_by(tmp_path, toy_model(1), 1, tied=TIED, random_state={"cuda": "00ff10ff" * 4}), toy_model(2)
    # torch without CUDA has no CUDA generator to check the state before it is restored.
    plain, checked = torch.Generator, SimpleNamespace(set_state=lambda state: None)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": checked if device == "cuda" else plain(device))
    given: list[tuple[list[int], torch.dtype, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: given.append((state.tolist(), state.dtype, str(device)))
    )
    resume(plain_engine(model), path)
    assert given == []
    engine = plain_engine(model)
    engine.world = World(0, 1, 0, torch.device("cuda", 3))
    resume(engine, path)
    assert given == [([0, 255, 16, 255] * 4, torch.uint8, "cuda:3")]
    resume(engine, saved_by(tmp_path / "cpu", toy_model(1), 1, tied=TIED))
    assert len(given) == 1


def test_a_resume_that_does_not_fit_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path, model = saved_by(tmp_path, toy_model(1), 2, tied=TIED), toy_model(2)

    def refused(engine: Any, *, verified: bool = False) -> str:
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(CheckpointError) as caught:
            resume(engine, path, verified=verified)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        return str(caught.value)

    engine = plain_engine(model)
    engine.stage.name = "other"
    assert "in stage 'all', this engine is in stage 'other' and trains the same parameters" in refused(engine)
    engine = plain_engine(model)
    engine.stage.ema = None
    assert "has the state of adamw and no average of the weights" in refused(engine)
    engine = plain_engine(model)
    engine.stage.optimizer = AdamWConfig(state_bits=8)
    assert "now has the state of adamw in 8 bits and an average" in refused(engine)
    model.vision.requires_grad_(requires_grad=False)
    assert "in stage 'all' and trains other parameters" in refused(plain_engine(model))
    model.vision.requires_grad_()
    other = toy_model(2, blocks=3)
    with pytest.raises(CheckpointError, match=r"decoder\.blocks\.2\.\S+ is only in the model.* and 2 more"):
        resume(plain_engine(other), path)
    damaged = path / "rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert "rank-00001.safetensors: has checksum" in refused(plain_engine(model))
    resume(plain_engine(model), path, verified=True)  # Skips the checksums.
    damaged.write_bytes(data[:-1])
    assert re.search(r"rank-00001\.safetensors: \S+ cannot be read", refused(plain_engine(model), verified=True))


def test_a_resume_names_what_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    saved, model = saved_by(tmp_path / "good", toy_model(1), 2, tied=TIED), toy_model(2)

    def refused(engine: Any, path: Path) -> str:
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(CheckpointError) as caught:
            resume(engine, path)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        return str(caught.value)

    needs = f"{saved} does not hold everything that stage 'all' needs to resume: "
    engine = plain_engine(model)
    engine.partition.moments["connector.gate"]["other"] = torch.zeros(1)
    assert refused(engine, saved) == f"{needs}connector.gate|other is missing"
    engine = plain_engine(model)
    engine.partition.whole = {ROW: torch.zeros(4), "decoder.norm.weight|row": torch.zeros(2, 3)}
    expected = f"{needs}decoder.norm.weight|exp_avg_sq_row is [3], expected [4]; decoder.norm.weight|row is missing, "
    assert refused(engine, saved) == expected + "expected [2, 3]"
    engine = plain_engine(model)
    engine.scaler = {"scale": 1.0, "steps": 2}
    assert refused(engine, saved) == f"{needs}the state of the loss scaler has ['scale'], expected ['scale', 'steps']"
    for number, state in enumerate(("zz", "00")):
        path = saved_by(tmp_path / str(number), toy_model(1), 1, tied=TIED, random_state={"cpu": state})
        expected = f"{path} is damaged: rank-00000.json: random_state.cpu is not the state of a torch generator: "
        assert refused(plain_engine(model), path).startswith(expected)


def moe(**decoder: Any) -> nn.Module:
    return build_model(config("embedding", mlp={**MOE, "bias_rate": 0.02}, **decoder), seed=1)


def drawn_anew(model: nn.Module) -> dict[str, Tensor]:
    """Fill the model with values that no checkpoint of these tests has; return a copy."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-5.0)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("components", [None, ["vision"], ["decoder"]])
def test_a_warm_start_takes_the_components_and_their_buffers(
    tmp_path: Path, ema: bool, components: list[str] | None
) -> None:
    source, model = moe(), moe()
    biases = {name: values for name, values in source.named_buffers() if name.endswith("bias_steps")}
    assert biases
    for values in biases.values():
        values.copy_(torch.arange(6))
    path, before = saved_by(tmp_path, source, 2), drawn_anew(model)
    for rank in range(2):
        engine = plain_engine(model, rank, 2)
        report = warm_start(engine, path, components, ema=ema)
        assert engine.partition.calls == ["average begun", "published"]
    asked = ("vision.", "connector.", "decoder.", "head.") if components is None else (f"{components[0]}.",)
    for name, values in model.named_parameters():
        taken = name in report.loaded
        assert taken == (name.startswith(asked) or (components == ["decoder"] and name.startswith("head.")))
        assert torch.equal(values, source.get_parameter(name) + 3.0 * ema if taken else before[name]), name
    for name in biases:
        assert model.get_buffer(name).tolist() == ([*range(6)] if components != ["vision"] else [0] * 6)


def test_a_tied_checkpoint_gives_both_of_its_names(tmp_path: Path) -> None:
    source, model = moe(tie_embeddings=True), moe()
    path = saved_by(tmp_path, source, 2, tied={"head.weight": "decoder.embed_tokens.weight"})
    before = drawn_anew(model)
    report = warm_start(plain_engine(model), path)
    assert {"head.weight", "decoder.embed_tokens.weight"} <= set(report.loaded)
    assert report.complete
    assert torch.equal(model.get_parameter("head.weight"), source.get_parameter("decoder.embed_tokens.weight"))
    assert all(not torch.equal(values, before[name]) for name, values in model.named_parameters())


def test_rows_are_taken_by_every_rank_that_holds_some_of_them(tmp_path: Path) -> None:
    source = moe()
    path = saved_by(tmp_path, source, 3)
    for rows in (71, 50):
        model = moe(vocab_size=rows)
        drawn_anew(model)
        for rank in range(4):
            report = warm_start(plain_engine(model, rank, 4), path)
        assert [table.name for table in report.resized] == ["decoder.embed_tokens.weight", "head.weight"]
        for table in report.resized:
            found, truth = model.get_parameter(table.name), source.get_parameter(table.name)
            both = min(rows, 61)
            assert (table.taken, table.before, table.now) == (both, 61, rows)
            assert torch.equal(found[:both], truth[:both])
            assert (found[both:] == -5.0).all()


def test_a_warm_start_that_can_take_nothing_is_refused(tmp_path: Path) -> None:
    source, model = moe(), moe()
    path = saved_by(tmp_path, source, 1)
    with pytest.raises(CheckpointError, match=r"no component \['audio'\]; it has \['connector', 'decoder', 'vision'\]"):
        warm_start(plain_engine(model), path, ["audio", "vision"])
    wide = moe(hidden_dim=64)
    report = match(wide, read_manifest(path))
    decoder = {name for name, _ in wide.named_parameters() if name.startswith(("decoder.", "head."))}
    assert decoder <= set(report.mismatched)
    assert {*report.mismatched, *report.loaded} == {name for name, _ in wide.named_parameters()}
    with pytest.raises(CheckpointError, match=r"holds no parameter of decoder in a shape that fits"):
        warm_start(plain_engine(wide), path, ["decoder"])
    bare = saved_by(tmp_path / "bare", source, 1, ema=False)
    with pytest.raises(CheckpointError, match="holds no average of the weights"):
        warm_start(plain_engine(model), bare, ema=True)


TABLE = "vision.positions.position_embedding"
CLASS = "vision.positions.class_embedding"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"grid": (3, 6)}, {"resampled": (Resampled(TABLE, (2, 4), (3, 6)),)}),
        ({"grid": (4, 2)}, {"resampled": (Resampled(TABLE, (2, 4), (4, 2)),)}),
        ({"class_token": False}, {"mismatched": (TABLE,), "unused": (CLASS,)}),
        ({"class_token": False, "grid": (3, 3)}, {"mismatched": (TABLE,), "unused": (CLASS,)}),
        (
            {"extra_tokens": {"rows": 5}},
            {"missing": ("decoder.embed_tokens.extra_weight", "head.extra_weight")},
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_resampled_or_left_alone(
    tmp_path: Path, change: dict[str, Any], expected: dict[str, Any]
) -> None:
    source, model = build_model(settings(), seed=1), build_model(settings(**change), seed=1)
    values = settings().model_dump(mode="json")
    path, before = saved_by(tmp_path, source, 2, model_config_values=values), drawn_anew(model)
    reports = [warm_start(plain_engine(model, rank, 3), path) for rank in range(3)]
    assert reports[0] == reports[1] == reports[2]
    lists = {name: getattr(reports[0], name) for name in LoadReport.__dataclass_fields__}
    loaded = lists.pop("loaded")
    assert lists == {name: expected.get(name, ()) for name in lists}
    assert reports[0].complete == (not expected)
    others = {entry if isinstance(entry, str) else entry.name for entries in lists.values() for entry in entries}
    assert set(loaded) == set(before) - others
    for name, parameter in model.named_parameters():
        truth = source.get_parameter(name) if name in loaded else before[name]
        if name == TABLE and "resampled" in expected:
            truth = resample_positions(source.get_parameter(TABLE), (2, 4), change["grid"])
        assert torch.equal(parameter, truth), name


def test_a_position_table_without_a_class_token_is_resampled_too(tmp_path: Path) -> None:
    plain = settings(class_token=False)
    path = saved_by(tmp_path, build_model(plain), 1, model_config_values=plain.model_dump(mode="json"))
    report = match(build_model(settings(class_token=False, grid=(3, 6))), read_manifest(path))
    assert report.resampled == (Resampled(TABLE, (2, 4), (3, 6)),)
    assert report.mismatched == report.missing == report.unused == ()


OTHER_GRIDS = [[1, 8], [8, 1]]
NO_GRIDS = [[2, 4], [2, "4"], ["2", "4"], [0, 4], [-2, -4], [True, 8], [8], 8, None]


@pytest.mark.parametrize(("saved", "counts"), [*((g, True) for g in OTHER_GRIDS), *((g, False) for g in NO_GRIDS)])
def test_a_saved_grid_counts_if_it_is_two_numbers_from_1_up(tmp_path: Path, saved: Any, counts: bool) -> None:
    model, values = build_model(settings()), settings().model_dump(mode="json")
    values["vision"]["positions"]["grid"] = saved
    report = match(model, read_manifest(saved_by(tmp_path, model, 1, model_config_values=values)))
    expected = (Resampled(TABLE, tuple(saved), (2, 4)),) if counts else ()
    assert (report.resampled, report.complete) == (expected, not counts)


def test_buffers_that_were_not_copied_are_named(tmp_path: Path) -> None:
    source, model = moe(), moe()
    for name, here, there in (("both", 3, 3), ("shape", 3, 2), ("new", 3, None), ("old", None, 3)):
        for each, size, value in ((model, here, 1.0), (source, there, 2.0)):
            if size is not None:
                each.decoder.register_buffer(name, torch.full((size,), value))
    path = saved_by(tmp_path, source, 1)
    assert match(model, read_manifest(path), ["vision"]).missing == ()
    report = warm_start(plain_engine(model), path)
    assert (report.missing, report.mismatched, report.unused) == (
        ("decoder.new",),
        ("decoder.shape",),
        ("decoder.old",),
    )
    assert model.decoder.both.tolist() == [2.0, 2.0, 2.0]
    assert model.decoder.shape.tolist() == model.decoder.new.tolist() == [1.0, 1.0, 1.0]
    text = str(report)
    assert "; not in the checkpoint, unchanged: decoder.new; another shape, unchanged: decoder.shape; " in text
    assert text.endswith("only in the checkpoint, not used: decoder.old")


def test_a_report_is_complete_if_nothing_but_whole_parameters_was_taken() -> None:
    plain = LoadReport(("a", "b"), (), (), ())
    assert plain.complete
    assert str(plain) == "loaded all 2 parameters"
    for name in ("missing", "unused", "mismatched", "left"):
        report = replace(plain, **{name: ("x.y",)})
        assert not report.complete
        assert str(report).startswith("loaded: a, b; ")
    table, grid = Resized("t", 3, 5, 3), Resampled("p", (1, 2), (3, 4))
    assert str(replace(plain, resized=(table,))).endswith("; t: loaded 3 of the checkpoint's 5 rows")
    assert str(replace(plain, resampled=(grid,))).endswith("; p: resampled from 1x2 to 3x4 positions")
    assert replace(plain, resized=(table,), resampled=(grid,)).taken == ("a", "b", "t", "p")
