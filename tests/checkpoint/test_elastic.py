"""Resume with the same and with another world size: bit-identical state, and the losses of an uninterrupted run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mmscale.checkpoint import find_latest, load_weights, read_manifest, read_state, verify
from mmscale.cli.main import main
from mmscale.errors import CheckpointError
from tests.data_pipeline.lane_states import toy_lane
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToyModel, toy_batch, toy_model

pytestmark = [pytest.mark.dist, pytest.mark.resume]

FROZEN = {"stage_changes": {"train": ["vision", "connector"]}}
CASES: dict[str, dict[str, Any]] = {
    "zero3": {"zero": 3},
    "zero3-persistent": {"zero": 3, "persistent_parameter_elements": 100},
    "zero3-frozen": {"zero": 3, **FROZEN},
    "zero3-frozen-persistent": {"zero": 3, "persistent_parameter_elements": 100_000, **FROZEN},
    "zero2-frozen": {"zero": 2, **FROZEN},
    "zero1": {"zero": 1},
    "zero0-frozen": {"zero": 0, **FROZEN},
    "zero3-bf16-frozen": {"zero": 3, "precision": "bf16", **FROZEN},
    "zero2-bf16": {"zero": 2, "precision": "bf16"},
    "zero1-bf16": {"zero": 1, "precision": "bf16"},
    "zero0-bf16": {"zero": 0, "precision": "bf16"},
    "before-the-first-step": {"zero": 3, "steps": 0},
    "background": {"zero": 3, "background": True},
    "background-zero2-bf16-frozen": {"zero": 2, "precision": "bf16", "background": True, **FROZEN},
    "background-zero0": {"zero": 0, "background": True},
}
# With one rank, each case is resumed with another ZeRO stage.
FOUR_RANKS = ("zero3", "zero3-frozen-persistent", "zero1", "zero0-frozen", "zero3-bf16-frozen", "zero1-bf16")
OTHER_STAGE = {0: 3, 1: 2, 2: 1, 3: 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Save every case with two ranks; return its state and the losses of the following steps."""
    folder = tmp_path_factory.mktemp("saved")
    cases = [{"folder": str(folder / name), **case} for name, case in CASES.items()]
    answers = run_ranks("tests.checkpoint.programs:save_cases", 2, {"cases": cases})[0]
    return dict(zip(CASES, answers, strict=True))


def resumed(saved: dict[str, Any], world_size: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    listed = [{**case, "path": saved[name]["path"]} for name, case in cases.items()]
    answers = run_ranks("tests.checkpoint.programs:resume_cases", world_size, {"cases": listed})[0]
    return dict(zip(cases, answers, strict=True))


def test_the_same_number_of_ranks_continues_bit_for_bit(saved: dict[str, Any]) -> None:
    for name, answer in resumed(saved, 2, CASES).items():
        assert answer["restored"] == saved[name]["saved"], name
        assert answer["after"] == saved[name]["after"], name
        assert answer["end"] == saved[name]["end"], name
        assert answer["lanes"] == {str(lane): [CASES[name].get("steps", 3), lane] for lane in range(4)}


@pytest.mark.parametrize("world_size", [1, 4])
def test_another_number_of_ranks_and_another_stage(saved: dict[str, Any], world_size: int) -> None:
    cases = {
        name: {**case, "zero": OTHER_STAGE[case["zero"]] if world_size == 1 else case["zero"]}
        for name, case in CASES.items()
        if world_size == 1 or name in FOUR_RANKS
    }
    for name, answer in resumed(saved, world_size, cases).items():
        assert answer["restored"] == saved[name]["saved"], name
        # Another number of ranks rounds sums in another order, which changes the third digit in bf16.
        tolerance = 5e-3 if "bf16" in name else 2e-6
        for mine, theirs in zip(answer["after"], saved[name]["after"], strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance), name


def test_an_engine_that_has_stepped_takes_over_everything(saved: dict[str, Any]) -> None:
    cases = {name: {**CASES[name], "stepped": True} for name in ("zero3-persistent", "zero2-frozen", "zero0-frozen")}
    for name, answer in resumed(saved, 2, cases).items():
        assert (answer["restored"], answer["after"]) == (saved[name]["saved"], saved[name]["after"]), name


def test_four_ranks_to_two(tmp_path: Path) -> None:
    names = ("zero3-frozen", "zero2-frozen")
    cases = [{"folder": str(tmp_path / name), **CASES[name]} for name in names]
    answers = run_ranks("tests.checkpoint.programs:save_cases", 4, {"cases": cases})[0]
    written = dict(zip(names, answers, strict=True))
    for name, answer in resumed(written, 2, {name: CASES[name] for name in names}).items():
        assert answer["restored"] == written[name]["saved"], name


def test_weights_load_into_a_plain_module(saved: dict[str, Any]) -> None:
    path = Path(saved["zero3-frozen"]["path"])
    model = ToyModel()
    with torch.no_grad():
        model.counts.fill_(-1)
    load_weights(model, path)
    first = toy_model()
    assert torch.equal(model.counts, torch.arange(3.0))
    assert torch.equal(model.decoder.blocks[1].up.weight, first.decoder.blocks[1].up.weight)
    assert not torch.equal(model.vision.weight, first.vision.weight)
    assert model.head.weight is model.decoder.embed.weight
    # A checkpoint of another ZeRO stage after the same steps holds the same model.
    other = ToyModel()
    load_weights(other, Path(saved["zero0-frozen"]["path"]))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_files_are_plain_safetensors_with_documented_names(saved: dict[str, Any]) -> None:
    path = Path(saved["zero3-frozen"]["path"])
    with safe_open(path / "rank-00001.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"vision.weight|master", "vision.weight|exp_avg", "vision.weight|exp_avg_sq"} <= names
    assert "decoder.embed.weight|frozen" in names
    assert not any(name.startswith("head.") for name in names)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["tied"] == {"head.weight": "decoder.embed.weight"}
    assert manifest["state"]["extra"] == {"note": "x"}


def test_damage_is_found_and_named(saved: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    good = Path(saved["zero3"]["path"])
    assert verify(good) == []
    copy = tmp_path / good.name
    shutil.copytree(good, copy)
    file = copy / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with safe_open(file, "pt") as names:
        last = list(names.offset_keys())[-1]
    assert f"damaged: {last}" in verify(copy)[0]
    file.write_bytes(data[:-1])
    assert "bytes" in verify(copy)[0]
    assert find_latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="rank-00001"):
        load_weights(ToyModel(), copy)
    file.unlink()
    assert verify(copy)
    text = (good / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"stage_step": 3', '"stage_step": 4'))
    with pytest.raises(CheckpointError, match="damaged: its checksum"):
        read_manifest(copy)
    (copy / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        read_manifest(copy)


def test_the_command_lists_and_verifies(
    saved: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(saved["zero3"]["path"], run / "checkpoints" / "step-00000003")
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["step"], row["world_size"], row["zero_stage"], row["whole"]) == (3, 2, 3, True)
    assert main(["checkpoint", "verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoints": {"step-00000003": []}}
    file = run / "checkpoints" / "step-00000003" / "rank-00000.json"
    file.write_bytes(file.read_bytes().replace(b"toy", b"toi"))
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "damaged" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path / "none")]) == 1
    assert "has no checkpoints" in capsys.readouterr().err


def test_state_of_all_lanes_is_merged(saved: dict[str, Any]) -> None:
    state = read_state(Path(saved["zero1"]["path"]))
    assert (state.step, state.stage_step, state.tokens, state.samples) == (3, 3, 30, 3)
    assert state.loader is not None
    assert state.loader.lanes == {lane: toy_lane(3, lane) for lane in range(4)}


def test_another_model_and_another_stage_are_refused(saved: dict[str, Any]) -> None:
    path = saved["zero3"]["path"]
    with pytest.raises(CheckpointError, match=r"another model: decoder\.blocks\.2\.down\.weight is only in the model"):
        load_weights(ToyModel(blocks=3), Path(path))
    arguments = {"case": {"zero": 3, **FROZEN}, "path": path, "action": "resume"}
    message = run_ranks("tests.checkpoint.programs:complaints", 2, arguments)
    assert message[0] == message[1]
    assert "load the weights in a new stage" in message[0]


def test_warm_start_takes_weights_only(saved: dict[str, Any]) -> None:
    case = {
        "zero": 2,
        "stage_changes": {"name": "later", "train": ["decoder", "embedding"], "learning_rate": {"default": 1e-2}},
    }
    arguments = {"case": case, "path": saved["zero3-frozen"]["path"]}
    ranks = run_ranks("tests.checkpoint.programs:warm_start_case", 2, arguments)
    plain = ToyModel()
    load_weights(plain, Path(saved["zero3-frozen"]["path"]))
    weights = {name: parameter.detach().view(-1).tolist() for name, parameter in plain.named_parameters()}
    for rank in ranks:
        loaded, missing, unused, mismatched = rank["report"]
        assert sorted(loaded) == sorted(weights)
        assert missing == unused == mismatched == []
        assert rank["steps"] == 0
        for key, values in rank["weights"].items():
            name, _, start = key.rpartition(":")
            assert values == weights[name][int(start) : int(start) + len(values)]
    # The first step of a new engine computes the loss of the loaded weights.
    from tests.engine.toy import ToyObjective

    batches = [toy_batch(0, lane) for lane in range(4)]
    total = sum(ToyObjective()(plain, batch).loss_sum.item() for batch in batches)
    assert ranks[0]["after"][0][0] == pytest.approx(total / sum(batch.weight for batch in batches), rel=1e-5)
