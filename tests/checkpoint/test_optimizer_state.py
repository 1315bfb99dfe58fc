"""Optimizer state and weight averages: bit-identical with the same world size, equal within rounding with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint import load_weights, read_manifest, resume
from mmscale.checkpoint.reshard import CheckpointReader
from mmscale.dist import World
from mmscale.errors import CheckpointError
from tests.checkpoint.programs import Case, complaints, resume_cases, save_cases, train_on, warm_start_case
from tests.engine.programs import gathered, make_engine
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToyModel

pytestmark = [
    pytest.mark.dist,
    pytest.mark.resume,
    pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9"),
]

ADAFACTOR = {"optimizer": {"kind": "adafactor"}}
MUON = {"optimizer": {"kind": "muon"}}
EMA = {"ema": {"decay": 0.5}}
EIGHT = {"optimizer": {"kind": "adamw", "state_bits": 8}}
CASES: dict[str, Case] = {
    "zero3-adafactor": {"zero": 3, "stage_changes": ADAFACTOR},
    "zero1-adafactor-frozen": {"zero": 1, "stage_changes": {**ADAFACTOR, "train": ["vision", "connector"]}},
    "zero3-muon": {"zero": 3, "stage_changes": MUON},
    "zero2-muon-ema": {"zero": 2, "stage_changes": MUON | EMA},
    "zero0-muon": {"zero": 0, "stage_changes": MUON},
    "zero3-ema": {"zero": 3, "stage_changes": EMA},
    "zero1-bf16-ema": {"zero": 1, "precision": "bf16", "stage_changes": EMA},
    "zero3-offload": {"zero": 3, "offload": "optimizer_and_weights"},
    "zero2-offload": {"zero": 2, "offload": "optimizer"},
    "zero0-8bit": {"zero": 0, "stage_changes": EIGHT},
    "zero1-8bit-frozen": {"zero": 1, "stage_changes": {**EIGHT, "train": ["vision", "connector"]}},
    "zero2-8bit-ema": {"zero": 2, "stage_changes": EIGHT | EMA},
    "zero3-8bit": {"zero": 3, "stage_changes": EIGHT, "background": True, "stepped": True},
    "zero3-8bit-offload": {"zero": 3, "offload": "optimizer_and_weights", "stage_changes": EIGHT},
    "zero0-bf16-8bit": {"zero": 0, "precision": "bf16", "stage_changes": EIGHT},
}
FOUR_RANKS = ["zero3-adafactor", "zero3-muon", "zero2-muon-ema", "zero1-bf16-ema", "zero3-offload"]
OTHER: dict[int, Case] = {1: {"zero": 2}, 2: {"zero": 3}, 3: {"zero": 1, "offload": "none"}}


def save_all(world: World, cases: list[Case]) -> Any:
    """Save every case. Also return the averaged weights of one, as an evaluation uses them."""
    answers = save_cases(world, cases)
    engine = make_engine(world, **CASES["zero3-ema"])
    train_on(engine, world, 0, 3)
    with engine.inference(ema=True):
        averages = gathered(engine, world)
    engine.close()
    return answers, averages


def resume_all(world: World, cases: list[Case], other: Case, path: str) -> Any:
    """Resume every case. Also return the error of a resume with another optimizer, and a warm start with averages."""
    return resume_cases(world, cases), complaints(world, other, path, "resume"), warm_start_case(world, other, path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saved")
    cases = [{"folder": str(folder / name), **case} for name, case in CASES.items()]
    answers, averages = run_ranks(f"{__name__}:save_all", 2, {"cases": cases}, timeout=240)[0]
    return dict(zip(CASES, answers, strict=True)) | {"averages": averages}


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_continues(saved: dict[str, Any], world_size: int) -> None:
    same = world_size == 2
    names = list(CASES) if same else FOUR_RANKS
    cases = [
        CASES[name] | ({} if same else OTHER[CASES[name]["zero"]]) | {"path": saved[name]["path"]} for name in names
    ]
    arguments = {"cases": cases, "other": CASES["zero2-muon-ema"], "path": saved["zero3-adafactor"]["path"]}
    answers, message, warm = run_ranks(f"{__name__}:resume_all", world_size, arguments, timeout=240)[0]
    for name, answer in zip(names, answers, strict=True):
        assert answer["restored"] == saved[name]["saved"], name
        if same:
            assert (answer["after"], answer["end"]) == (saved[name]["after"], saved[name]["end"]), name
        tolerance = 5e-3 if "bf16" in name else 1e-4 if "muon" in name else 2e-6
        for mine, theirs in zip(answer["after"], saved[name]["after"], strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance), name
    assert "state of adafactor and no average" in message
    assert "now has the state of muon and an average" in message
    assert warm["steps"] == 0


def moments_after(world: World, path: str, zero: int, bits_32: Case | None = None) -> Any:
    """Resume a case with 8-bit moments. Return the moments, the losses of two more steps, and error messages."""
    case: Case = {"zero": zero, "stage_changes": EIGHT}
    (answer,) = resume_cases(world, [case | {"path": path}])
    engine = make_engine(world, **case)
    resume(engine, Path(path))
    whole = {}
    for name, parameter in engine.model.named_parameters():
        for kind in engine.partition.kinds(name):
            whole[f"{name}|{kind}"] = torch.zeros(
                int(torch.Size(getattr(parameter, "ds_shape", parameter.shape)).numel())
            )
    for owned in engine.partition.owned():
        for kind, values in owned.moments.items():
            whole[f"{owned.name}|{kind}"][owned.start : owned.stop] = values.float()
    for values in whole.values():
        torch.distributed.all_reduce(values)
    engine.close()
    messages = (
        None
        if bits_32 is None
        else [
            complaints(world, {"zero": 3}, path, "resume"),
            complaints(world, case, bits_32["path"], "resume"),
        ]
    )
    return {key: values.tolist() for key, values in whole.items()}, answer["after"], messages


@pytest.mark.parametrize(("world_size", "zero"), [(1, 2), (4, 1)])
def test_moments_in_8_bits_are_rounded_once_more_at_other_ranks(
    saved: dict[str, Any], world_size: int, zero: int
) -> None:
    path = Path(saved["zero3-8bit"]["path"])
    arguments = {"path": str(path), "zero": zero, "bits_32": saved["zero3-ema"] if world_size == 1 else None}
    found, after, messages = run_ranks(f"{__name__}:moments_after", world_size, arguments, timeout=240)[0]
    with CheckpointReader(path) as reader:
        for key, values in found.items():
            name, kind = key.split("|")
            stored = torch.empty(len(values))
            reader.fill(stored, name, kind, 0)
            error = (torch.tensor(values) - stored).abs()
            share = 0.0106 if kind == "exp_avg" else 0.00353  # Half of the largest gap between levels.
            for low in range(0, len(values), 256):
                assert float(error[low : low + 256].max()) <= share * float(stored[low : low + 256].abs().max()), key
    for mine, theirs in zip(after, saved["zero3-8bit"]["after"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    if messages is not None:
        assert "saved with the state of adamw in 8 bits and no average" in messages[0]
        assert "now has the state of adamw and no average" in messages[0]
        assert "now has the state of adamw in 8 bits and no average" in messages[1]


def test_the_average_is_exported_as_evaluation_sees_it(saved: dict[str, Any]) -> None:
    path = Path(saved["zero3-ema"]["path"])
    averaged, plain = ToyModel(), ToyModel()
    load_weights(averaged, path, ema=True)
    load_weights(plain, path)
    for name, parameter in averaged.named_parameters():
        assert parameter.detach().view(-1).tolist() == saved["averages"][name], name
    assert not torch.equal(averaged.vision.weight, plain.vision.weight)
    with pytest.raises(CheckpointError, match="no average"):
        load_weights(averaged, Path(saved["zero3-muon"]["path"]), ema=True)


def test_adafactor_keeps_rows_and_columns(saved: dict[str, Any]) -> None:
    path = Path(saved["zero3-adafactor"]["path"])
    assert read_manifest(path).optimizer == "adafactor"
    from safetensors import safe_open

    with safe_open(path / "rank-00000.safetensors", "pt") as file:
        keys = set(file.keys())
        kept = {key: file.get_tensor(key).shape for key in keys if "blocks.0.up.weight" in key}
    assert kept["decoder.blocks.0.up.weight|exp_avg_sq_row"] == (36, 1)
    assert kept["decoder.blocks.0.up.weight|exp_avg_sq_col"] == (1, 12)
    assert set(kept) == {f"decoder.blocks.0.up.weight|{k}" for k in ("master", "exp_avg_sq_row", "exp_avg_sq_col")}
