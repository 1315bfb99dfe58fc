"""Forged checkpoints whose checksums are right: ``verify`` and ``resume`` name the file and the key."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.order.state import LoaderState
from mmscale.checkpoint import TrainState, load_weights, resume, save, verify
from mmscale.checkpoint.manifest import read_state
from mmscale.errors import CheckpointError
from tests.checkpoint.plain_engine import plain_engine
from tests.checkpoint.test_read_back import reseal
from tests.checkpoint.toy_checkpoint import META, TENSORS, Change, rewrite
from tests.data_pipeline.lane_states import toy_lane
from tests.engine.toy import toy_model

pytestmark = pytest.mark.fault

STATE = TrainState(7, 0, 7, 70, 9, LoaderState("toy:1", 7, {0: toy_lane(7)}))
WEIGHT = "decoder.blocks.0.up.weight"


@pytest.fixture(autouse=True)
def deepspeed() -> Iterator[None]:
    """Replace DeepSpeed: a save only needs its version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="1.2.3"))
        yield


def answers(path: Path) -> list[str]:
    """Return the problems that ``verify`` finds; require that ``resume`` raises the first and changes nothing."""
    problems = verify(path)
    assert problems
    engine = plain_engine(toy_model(2))
    before = {name: values.clone() for name, values in engine.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(problems[0])):
        resume(engine, path)
    assert all(torch.equal(before[name], values) for name, values in engine.model.state_dict().items())
    return problems


def integers(key: str) -> dict[str, Change]:
    return {"header": lambda header: header[key].update(dtype="I32"), "metadata": _integers(key)}


def _integers(key: str) -> Change:
    return lambda metadata: metadata["tensors"][key].update(dtype="I32")


def random_state(**states: str) -> Change:
    return lambda metadata: metadata["random_state"].update(states)


def position(**changes: Any) -> Change:
    """Replace values of the loader state."""
    return lambda meta: meta.update(loader=json.dumps({**json.loads(meta["loader"]), **changes}))


CPU_BYTES = torch.Generator().get_state().numel()
FORGERIES: dict[str, tuple[dict[str, Change], str]] = {
    "weight of integers": (
        integers(f"{WEIGHT}|master"),
        rf"{TENSORS}: {WEIGHT}\|master has the number format I32, exp",
    ),
    "moment of integers": (integers(f"{WEIGHT}|exp_avg"), rf"{TENSORS}: {WEIGHT}\|exp_avg has the number format I32"),
    "no random state": (
        {"metadata": lambda metadata: metadata["random_state"].clear()},
        f"{META}: random_state.cpu is missing",
    ),
    "short random state": (
        {"metadata": random_state(cpu="00ff")},
        f"{META}: random_state.cpu is not the state of a torch",
    ),
    "zeroed random state": (
        {"metadata": random_state(cpu="00" * CPU_BYTES)},
        f"{META}: random_state.cpu is not the",
    ),
    "random state of letters": (
        {"metadata": random_state(cpu="xy")},
        f"{META}: random_state.cpu .*non-hexadecimal",
    ),
    "short state of the device": (
        {"metadata": random_state(cuda="00ff")},
        f"{META}: random_state.cuda .*: 2 bytes, expected 16",
    ),
    "no position": (
        {"metadata": lambda meta: meta.update(loader=None)},
        f"{META}: loader: .*: null, expected the pos",
    ),
    "position of a list": (
        {"metadata": lambda meta: meta.update(loader="[7]")},
        f"{META}: loader: .*no loader state",
    ),
    "step of a fraction": ({"metadata": position(step=7.5)}, f"{META}: loader: .*step and lanes integers from 0"),
    "lane of letters": (
        {"metadata": position(lanes={"0": "7"})},
        f"{META}: loader: .*lane 0: a lane's state must be",
    ),
    "short lane": ({"metadata": position(lanes={"0": [1, 2]})}, f"{META}: loader: .*is cut short: 2 integers"),
    "lane of other data sets": (
        {"metadata": position(datasets=["a"])},
        f"{META}: loader: .*lane 0 holds 0 data sets, but 1 are named",
    ),
    "negative lane": (
        {"metadata": position(lanes={"0": [-7]})},
        f"{META}: loader: .*lane 0: a lane's state must be",
    ),
    "name in place of names": (
        {"metadata": position(datasets="set")},
        f"{META}: loader: .*datasets must be a list",
    ),
    "number in place of a fingerprint": (
        {"metadata": position(fingerprint=3)},
        f"{META}: loader: .*fingerprint must be",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_is_refused(tmp_path: Path, forgery: str) -> None:
    path = save(plain_engine(toy_model(1)), STATE, tmp_path)
    rewrite(path)
    assert verify(path) == []
    changes, message = FORGERIES[forgery]
    rewrite(path, **changes)
    assert re.search(message, answers(path)[0]), answers(path)


def test_a_shape_of_negative_sides_is_refused(tmp_path: Path) -> None:
    path = save(plain_engine(toy_model(1)), STATE, tmp_path)
    sides = [-side for side in toy_model(1).get_parameter(WEIGHT).shape]
    reseal(path, lambda record: record["parameters"][WEIGHT].update(shape=sides))
    assert f"manifest.json is damaged: parameters.{WEIGHT}.shape.0: must be at least 0" in answers(path)[0]


def test_a_transposed_shape_is_refused_by_every_reader_that_knows_the_model(tmp_path: Path) -> None:
    """Both shapes have the same number of values, so only a reader with the model notices the difference."""
    path = save(plain_engine(toy_model(1)), STATE, tmp_path)
    shape = toy_model(1).get_parameter(WEIGHT).shape
    rewrite(path, manifest=lambda manifest: manifest["parameters"][WEIGHT].update(shape=tuple(reversed(shape))))
    assert verify(path) == []
    message = re.escape(f"{WEIGHT} is {list(reversed(shape))} in the checkpoint, {list(shape)} here")
    with pytest.raises(CheckpointError, match=message):
        resume(plain_engine(toy_model(2)), path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(toy_model(2), path)
    rewrite(path, manifest=lambda manifest: manifest["parameters"][WEIGHT].update(shape=(shape[0], shape[1] + 1)))
    assert re.search(rf"{WEIGHT}\|\w+: the ranks' ranges do not cover its", verify(path)[0])


def test_a_run_that_has_seen_no_data_has_no_position(tmp_path: Path) -> None:
    path = save(plain_engine(toy_model(1)), TrainState(7, 0, 7), tmp_path)
    assert verify(path) == []
    assert read_state(path).loader is None
