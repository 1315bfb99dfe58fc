"""Expert parallelism gives the losses, gradients and updates of one rank that holds all experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmscale.config import load
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.expert_parallel import check_placement, expert_groups
from mmscale.engine.partition import own_range
from mmscale.errors import ConfigError, UnsupportedError
from mmscale.nn.expert_parallel import PARTS, full_shape
from mmscale.run.config import RunConfig, check_world
from mmscale.shrink.run import shrink_run
from tests.engine.expert_programs import EXPERTS, REGULARISED
from tests.engine.ranks import ROOT, run_ranks

PROGRAM = "tests.engine.expert_programs:train_cases"
COLLAPSED = {"favourites": [0, 1], "activation_checkpointing": True, "steps": 2, "look": True}
"""Every row chooses the experts of the first rank, so the others receive none."""
ODD = {"mlp": {**EXPERTS, "num_experts": 4, "expert_dim": 23}, "hidden_dim": 33}
"""On 4 ranks with groups of 4, and with groups of 2, a slice or its half has an odd number of values."""
MANY: dict[str, dict[str, Any]] = {
    "plain": {"mlp": REGULARISED},
    "odd": {**ODD, "offload": "optimizer"},
    "collapsed": COLLAPSED,
    "persistent": {
        "persistent_parameter_elements": 10_000,
        "live_parameter_elements": 0,
        "stage": {"ema": {"decay": 0.5}, "clip": {"default": 0.3, "decoder": 0.2}},
        "steps": 2,
    },
    "bf16": {"precision": "bf16", "offload": "optimizer_and_weights"},
    "muon": {"stage": {"optimizer": {"kind": "muon"}}},
    "adafactor": {"stage": {"optimizer": {"kind": "adafactor"}}},
    "eight bits": {"stage": {"optimizer": {"kind": "adamw", "state_bits": 8}}},
}


ROUNDING = {"bf16": 2e-2, "eight bits": 4e-3}
"""Relative rounding error of formats with fewer bits than float32. Ranks divide the blocks of 8-bit moments."""


@dataclass(frozen=True)
class Trained:
    """The results of engines with one value of ``expert_parallel``, on a number of ranks."""

    ranks: int
    answers: list[dict[str, Any]]
    folder: Path

    def state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.folder / f"{name}.pt")
        return found


def train(ranks: int, sizes: tuple[int, ...], cases: dict[str, Any], folder: Path) -> list[Trained]:
    """Train each case with each value of ``expert_parallel`` in the same processes."""
    split = {f"{size}/{name}": {**case, "expert_parallel": size} for size in sizes for name, case in cases.items()}
    for size in sizes:
        (folder / str(ranks) / str(size)).mkdir(parents=True)
    answers = run_ranks(PROGRAM, ranks, {"cases": split, "folder": str(folder / str(ranks))}, timeout=300)
    return [
        Trained(
            ranks,
            [{name: answer[f"{size}/{name}"] for name in cases} for answer in answers],
            folder / str(ranks) / str(size),
        )
        for size in sizes
    ]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Compare each expected tensor; ``relative`` is the largest error relative to the tensor's largest value."""
    for key, values in expected.items():
        error = float((found[key] - values).abs().max())
        assert error <= relative * float(values.abs().max()), (key, error, float(values.abs().max()))


def assert_equal_runs(split: Trained, whole: Trained, name: str) -> None:
    mine, theirs = split.state(name), whole.state(name)
    for key, values in theirs["first"].items():
        assert torch.equal(mine["first"][key], values), key
    rounding = ROUNDING.get(name, 1e-6)
    for answer in split.answers:
        reports, expected = (torch.tensor(each[name]["reports"]) for each in (answer, whole.answers[0]))
        assert torch.allclose(reports[:, :2], expected[:, :2], rtol=rounding, atol=0)  # Loss and norm.
        assert torch.allclose(reports, expected, rtol=5 * rounding, atol=0)  # Each component's norm is a float32 sum.
    # After one step the first moment is the gradient. Adam divides it by its size, which amplifies rounding.
    kinds = {"moments": ("exp_avg", "momentum_buffer"), "values": ("weights", "ema")}
    moments, values = (
        {key: tensor for key, tensor in theirs["last"].items() if key.endswith(kinds[of])} for of in kinds
    )
    assert any("experts" in key for key in moments) == (name != "adafactor")
    several_steps = len(expected) > 1
    assert_close(mine["last"], moments, 1e-4 if several_steps and name not in ROUNDING else 5 * rounding)
    if name != "bf16":  # There a gradient near 0 may change its sign, and with it a whole step of Adam.
        assert_close(mine["last"], values, 1e-2)
    if "scores" in theirs:
        assert torch.isfinite(mine["scores"]).all()
        if split.ranks == whole.ranks:
            assert torch.allclose(mine["scores"], theirs["scores"], rtol=1e-5)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained]:
    cases = {"plain": {"mlp": REGULARISED}, "collapsed": COLLAPSED}
    split, whole = train(2, (2, 1), cases, tmp_path_factory.mktemp("experts"))
    return split, whole


@pytest.mark.dist
@pytest.mark.parametrize("name", ["plain", "collapsed"])
def test_two_ranks_that_share_the_experts_train_as_two_that_gather_them(
    on_two: tuple[Trained, Trained], name: str
) -> None:
    split, whole = on_two
    assert_equal_runs(split, whole, name)
    assert split.answers[0][name]["counts"] == whole.answers[0][name]["counts"]
    assert split.answers[0][name]["text"] == whole.answers[0][name]["text"]
    assert [answer[name]["held"] for answer in split.answers] == [answer[name]["held"] for answer in whole.answers]


@pytest.mark.dist
def test_a_rank_whose_experts_get_no_row_keeps_the_pace(on_two: tuple[Trained, Trained]) -> None:
    split, _ = on_two
    received = [answer["collapsed"]["rows"] for answer in split.answers]
    assert len(received[0]) == len(received[1])
    # Calls alternate between the rows that arrive and the outputs that come back; the second kind is never empty.
    assert 0 in received[1]
    assert 0 not in received[0]
    gradient = split.state("collapsed")["last"]["decoder.layers.1.mlp.experts.down_proj|exp_avg"].view(8, -1)
    assert [bool(each.abs().sum()) for each in gradient] == [True] * 2 + [False] * 6


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_setting_trains_as_on_one_rank(tmp_path: Path) -> None:
    (whole,) = train(1, (1,), MANY, tmp_path)
    for size, names in ((2, [name for name in MANY if name != "collapsed"]), (4, ["plain", "collapsed"])):
        (split,) = train(4, (size,), {name: MANY[name] for name in names}, tmp_path / str(size))
        for name in names:
            assert_equal_runs(split, whole, name)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
def test_the_ranges_of_all_ranks_cover_a_divided_parameter_once(parts: int, replicas: int, numel: int) -> None:
    """``numel`` values in each slice; ranks with the same remainder hold shards of the same slice."""
    world_size = parts * replicas
    covered = []
    for rank in range(world_size):
        parameter: Any = nn.Parameter(torch.empty(0))
        setattr(parameter, PARTS, parts)
        parameter.ds_numel, parameter.ds_shape = numel, (numel, 1)
        assert full_shape(parameter) == (parts * numel, 1)
        start, stop = own_range(parameter, World(rank, world_size, 0, torch.device("cpu")))
        covered += range(start, stop)
        if start < stop:
            assert start // numel == (stop - 1) // numel == rank % parts
    assert sorted(covered) == list(range(parts * numel))


def run_config(*words: str) -> RunConfig:
    experts = "{kind: moe, num_experts: 6, experts_per_token: 2, expert_dim: 8}"
    return load("tests/system/tiny.yaml", [f"model.decoder.mlp={experts}", *words], RunConfig).value


def test_what_cannot_be_divided_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    two = "engine.expert_parallel=2"
    with pytest.raises(ValueError, match=r"expert_parallel=2 needs zero_stage=3, got 2.*set zero_stage=3"):
        EngineConfig(zero_stage=2, expert_parallel=2)
    with pytest.raises(ConfigError, match=r"hold equally many of num_experts=6; set engine.expert_parallel=2"):
        run_config("engine.expert_parallel=4")
    with pytest.raises(ConfigError, match=r"the model of stages.0 \(.*\) has no experts"):
        run_config(two, "model.decoder.mlp={kind: dense, hidden_dim: 8}")
    config = run_config(two)
    check_world(config, 4)
    with pytest.raises(
        ConfigError, match="world size 3 cannot be divided into groups of 2 ranks; start a multiple of 2"
    ):
        check_world(config, 3)
    with pytest.raises(ConfigError, match=r"world size 1 cannot be divided .* or set engine.expert_parallel=1"):
        expert_groups(World(0, 1, 0, torch.device("cpu")), 2)
    assert shrink_run(config).engine.expert_parallel == 1


def test_an_engine_that_ignores_the_groups_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would average the gradients of different experts."""
    from deepspeed.utils import groups

    shards, world = object(), object()
    monkeypatch.setitem(groups._EXPERT_DATA_PARALLEL_GROUP, "ep_size_2", shards)
    model: Any = nn.Linear(1, 1, bias=False)
    engine = SimpleNamespace(optimizer=SimpleNamespace(_autoep_expert_parallel_group=None))
    check_placement(engine, model, 1, "0.19.8")
    with pytest.raises(ConfigError, match="the model has no experts"):
        check_placement(engine, model, 2, "0.19.8")
    setattr(model.weight, PARTS, 2)
    model.weight.ds_process_group = shards
    check_placement(engine, model, 2, "0.19.8")
    with pytest.raises(UnsupportedError, match=r"DeepSpeed 0.18 shards experts over all ranks; use DeepSpeed 0.19.8"):
        check_placement(SimpleNamespace(optimizer=None), model, 2, "0.18")
    model.weight.ds_process_group = world
    with pytest.raises(UnsupportedError, match="shards experts over all ranks"):
        check_placement(engine, model, 2, "0.19.8")
