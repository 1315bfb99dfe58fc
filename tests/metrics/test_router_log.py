"""The loads of experts in the metrics and in ``router.json``, against counts of single rows and plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.dist import World
from mmscale.engine.graph import RouterSums
from mmscale.errors import MMScaleError
from mmscale.metrics.router_log import ROUTER_FILE, RouterLog, RouterWindow, read_router
from mmscale.models.build import build_model
from tests.engine.ranks import run_ranks
from tests.metrics.router_programs import EVERY, EXPERTS, STEPS
from tests.models.tiny import DENSE, MOE, config

ALONE, OTHER = (World(rank, 2, 0, torch.device("cpu")) for rank in (0, 1))


@pytest.fixture(scope="module")
def model() -> Any:
    """A model with 6 experts, of which a token uses 2, in the blocks 1 and 3."""
    settings = config("embedding", mlp={**MOE, "every": 2, "dense": DENSE})
    return SimpleNamespace(config=build_model(settings, seed=0).config)


def sums(step: int) -> RouterSums:
    """Return loads of 10 text and 5 image tokens in two blocks. Text tokens never choose expert 5."""
    generator = torch.Generator().manual_seed(step)
    load = torch.zeros(2, 2, EXPERTS, dtype=torch.int64)
    for block in range(2):
        for kind, tokens in enumerate((10, 5)):
            for _ in range(tokens):
                load[block, kind, torch.randperm(EXPERTS - (kind == 0), generator=generator)[:2]] += 1
    return RouterSums(load, torch.tensor([[3.0, 1.5], [0.25 * step, 0.5]]), torch.tensor([step, 0]))


def run(folder: Path, model: Any, first: int, last: int, extra: dict[str, Any], every: int = 3) -> list[dict[str, Any]]:
    """Run steps after a start at ``first - 1``. ``extra`` gets the state after the last step."""
    log = RouterLog(folder, every, ALONE, first - 1, extra)
    values = [log.step(step, sums(step), model) for step in range(first, last + 1)]
    log.write()
    extra |= log.extra_state()
    return values


@pytest.mark.dist
def test_two_ranks_log_what_their_rows_chose(tmp_path: Path) -> None:
    answers = run_ranks("tests.metrics.router_programs:windows", 2, {"folder": str(tmp_path)})
    assert answers[0]["values"] == answers[1]["values"]
    for last in range(EVERY, STEPS + 1, EVERY):
        values = answers[0]["values"][last - 1]
        steps = range(last - EVERY, last)
        ratios, dead = [], []
        for number, block in enumerate((1, 3)):
            parts = [answer["counts"][step][number] for answer in answers for step in steps]
            text, image = ([sum(part[kind][e] for part in parts) for e in range(EXPERTS)] for kind in (0, 1))
            load = [a + b for a, b in zip(text, image, strict=True)]
            assert min(sum(text), sum(image)) > 0
            ratios.append(max(load) / (sum(load) / EXPERTS))
            dead.append(load.count(0))
            entropy = sum(answer["entropy"][step][number] for answer in answers for step in steps)
            distance = sum(abs(a / sum(text) - b / sum(image)) for a, b in zip(text, image, strict=True)) / 2
            assert values[f"router/{block}/max_over_mean"] == pytest.approx(ratios[-1])
            assert values[f"router/{block}/dead"] == dead[-1]
            assert values[f"router/{block}/entropy"] == pytest.approx(entropy / (sum(load) / 2), rel=1e-5)
            assert values[f"router/{block}/modality_distance"] == pytest.approx(distance)
            if last == STEPS:
                written = json.loads((tmp_path / ROUTER_FILE).read_text())
                assert (written["first"], written["last"], written["blocks"]) == (last - EVERY + 1, last, [1, 3])
                assert written["load"][number] == [text, image]
                assert written["tokens"][number] == [sum(text) / 2, sum(image) / 2]
        assert (values["router/max_over_mean"], values["router/dead"]) == (pytest.approx(max(ratios)), sum(dead))
        assert len(values) == 2 + 2 * 4
        assert answers[0]["values"][last - 2] == {}


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_gets_the_same_values(tmp_path: Path, model: Any, stop: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    expected = run(whole, model, 1, 7, {})
    assert [bool(values) for values in expected] == [False, False, True, False, False, True, False]
    extra: dict[str, Any] = {}
    before = run(resumed, model, 1, stop, extra)
    saved = json.loads(json.dumps(extra))
    run(resumed, model, stop + 1, 6, dict(extra))  # Lost: the process is killed before the next checkpoint.
    assert before + run(resumed, model, stop + 1, 7, saved) == expected
    assert (resumed / ROUTER_FILE).read_bytes() == (whole / ROUTER_FILE).read_bytes()


def test_the_file_has_the_last_whole_window_or_the_first_part(tmp_path: Path, model: Any) -> None:
    extra: dict[str, Any] = {}
    for first, last, steps in ((1, 2, (1, 2)), (3, 3, (1, 3)), (4, 5, (1, 3)), (6, 6, (4, 6))):
        run(tmp_path, model, first, last, extra)
        window = read_router(tmp_path)
        assert window is not None
        assert (window.first, window.last) == steps
        given = [sums(step) for step in range(steps[0], steps[1] + 1)]
        assert window.load.tolist() == sum(each.load for each in given).tolist()
        assert window.entropy.tolist() == sum(each.entropy.double() for each in given).tolist()
    RouterLog(tmp_path, 3, OTHER, 0, {})
    assert (tmp_path / ROUTER_FILE).exists()
    RouterLog(tmp_path, 3, ALONE, 5, {})  # Steps 4 to 6 are repeated.
    assert not (tmp_path / ROUTER_FILE).exists()


def test_no_experts_no_key_and_other_ranks_leave_no_file(tmp_path: Path, model: Any) -> None:
    for every, world, given in ((1, ALONE, None), (None, ALONE, sums(1)), (1, OTHER, sums(1))):
        log = RouterLog(tmp_path, every, world, 0, {})
        values = log.step(1, given, model)
        log.write()
        assert bool(values) == (world is OTHER)
        assert bool(log.extra_state()) == (world is OTHER)
    assert [*tmp_path.iterdir()] == []


def test_steps_without_a_token_or_with_nan_do_not_count(tmp_path: Path, model: Any) -> None:
    log = RouterLog(tmp_path, 3, ALONE, 0, {})
    broken = sums(2)._replace(entropy=torch.full((2, 2), math.nan))
    assert log.step(1, sums(1), model) == log.step(2, broken, model) == {}
    values = log.step(3, None, model)
    assert values == run(tmp_path, model, 1, 1, {}, every=1)[0]
    assert log.step(4, None, model) == log.step(5, None, model) == log.step(6, None, model) == {}


def test_a_window_with_text_alone_has_no_distance_and_dead_experts_are_those_of_all_tokens(
    tmp_path: Path, model: Any
) -> None:
    given = sums(1)
    log = RouterLog(tmp_path, 1, ALONE, 0, {})
    text_only = RouterSums(
        given.load * torch.tensor([1, 0])[:, None], given.entropy * torch.tensor([1, 0]), given.dropped
    )
    values = log.step(1, text_only, model)
    assert not [name for name in values if "modality" in name]
    assert values["router/dead"] == sum(values[f"router/{block}/dead"] for block in (1, 3)) >= 2
    apart = torch.zeros(2, 2, EXPERTS, dtype=torch.int64)
    apart[:, 0, :2], apart[:, 1, 2:] = 10, 5
    values = log.step(2, given._replace(load=apart), model)
    assert values["router/1/modality_distance"] == 1
    assert values["router/dead"] == 0
    same = torch.arange(EXPERTS).expand(2, 2, EXPERTS) * torch.tensor([4, 2])[:, None]
    assert log.step(3, given._replace(load=same), model)["router/3/modality_distance"] == 0


def test_dropped_choices_are_a_share_of_all(tmp_path: Path, model: Any) -> None:
    first, last = run(tmp_path, model, 1, 4, {}, every=2)[1::2]
    assert (first["router/1/dropped"], first["router/3/dropped"]) == ((1 + 2) / 60, 0)
    assert last["router/dropped"] == (3 + 4) / 120
    values = RouterLog(tmp_path, 1, OTHER, 0, {}).step(1, sums(1)._replace(dropped=torch.zeros(2).long()), model)
    assert not [name for name in values if "dropped" in name]


def test_another_number_of_experts_starts_a_window(tmp_path: Path, model: Any) -> None:
    log = RouterLog(tmp_path, 2, ALONE, 0, {})
    log.step(1, sums(1), model)
    load = torch.ones(2, 2, 8, dtype=torch.int64)
    values = log.step(2, RouterSums(load, torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)), model)
    assert (values["router/max_over_mean"], values["router/1/entropy"]) == (1.0, 2 / 8)


@pytest.mark.parametrize(
    "change",
    [
        {"load": [[[1, 2], [1]]]},
        {"load": [[[1, -2], [1, 2]]]},
        {"load": []},
        {"load": [[[], []]]},
        {"tokens": [[1, 1], [1, 1]]},
        {"entropy": [[1.0, math.nan]]},
        {"entropy": None},
        {"blocks": []},
        {"dropped": [1, 2]},
        {
            "blocks": [2, 1],
            "tokens": [[1, 1]] * 2,
            "entropy": [[1, 1]] * 2,
            "load": [[[1], [1]]] * 2,
            "dropped": [1, 1],
        },
        {"blocks": [1 << 60]},
        {"more": 1},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    window = RouterWindow(
        1, 2, (0,), np.ones((1, 2), np.int64), np.ones((1, 2)), np.ones((1, 2, 2), np.int64), np.ones(1, np.int64)
    )
    path = tmp_path / ROUTER_FILE
    assert read_router(tmp_path) is None
    path.write_text(window.to_json())
    assert read_router(tmp_path) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MMScaleError, match=r"router\.json is damaged: "):
        read_router(tmp_path)
    RouterLog(tmp_path, 1, ALONE, 9, {})
    assert not path.exists()
