"""Warm starts in which only part of the weights fit: the loaded values and the report, on one rank and on two."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.checkpoint import load_weights, read_manifest
from mmscale.checkpoint.warm_start import LoadReport, Resampled, Resized, match
from mmscale.models.build import build_model
from mmscale.nn.patch_embed import resample_positions
from tests.checkpoint.warm_programs import settings
from tests.engine.ranks import run_ranks
from tests.models.tiny import VOCAB, config

pytestmark = pytest.mark.dist
warm_start = importlib.import_module("mmscale.checkpoint.warm_start")  # The package has a function of this name.

FROZEN = {"train": ["connector"]}
CASES: dict[str, dict[str, Any]] = {
    "same": {},
    "grid": {"model": {"grid": [3, 6]}},
    "grid-frozen": {"model": {"grid": [3, 6]}, "zero": 2, "stage": FROZEN},
    "turned": {"model": {"grid": [4, 2]}},  # Equally many positions in another order.
    "classless": {"model": {"class_token": False}},
    "classless-equal": {"model": {"grid": [3, 3], "class_token": False}},  # Both tables have nine rows.
    "tiles": {"model": {"grid": [3, 6], "tiles": {"max_tiles": 2, "global_layers": 1}}},
    "more": {"model": {"vocab_size": VOCAB + 10}},
    "more-frozen": {"model": {"vocab_size": VOCAB + 10}, "zero": 1, "stage": FROZEN},
    "fewer": {"model": {"vocab_size": VOCAB - 10, "tie_embeddings": True}, "zero": 0},
    "new rows": {"model": {"extra_tokens": {"rows": 5}}},
    "decoder": {"components": ["decoder"]},
    "vision and connector": {"components": ["vision", "connector"], "zero": 1, "stage": FROZEN},
    "average": {"ema": True},
    "unknown": {"components": ["decoder", "audio"]},
    "nothing fits": {"model": {"hidden_dim": 64}, "components": ["decoder"]},
}


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint of two ranks, and the answers of each case on two ranks and on one."""
    folder, cases = str(tmp_path_factory.mktemp("warm")), list(CASES.values())
    (path, two), again = run_ranks(
        "tests.checkpoint.warm_programs:save_and_take", 2, {"folder": folder, "cases": cases}
    )
    assert again[1] == two
    (one,) = run_ranks("tests.checkpoint.warm_programs:take_cases", 1, {"path": path, "cases": cases})
    assert one == two, "the world size must not change a bit"
    return Path(path), dict(zip(CASES, two, strict=True))


def saved(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    model = build_model(settings())
    load_weights(model, path, ema=ema)
    return dict(model.named_parameters())


def first(case: str) -> dict[str, Tensor]:
    return dict(build_model(settings(**CASES[case].get("model", {})), seed=2).named_parameters())


def weights(answer: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.tensor(values).view(like[name].shape) for name, values in answer["weights"].items()}


def check(case: str, taken: tuple[Path, dict[str, Any]], expected: dict[str, Tensor]) -> LoadReport:
    """Require that each weight has its initial, its saved or its ``expected`` value, in agreement with the report."""
    path, answers = taken
    report = LoadReport(**{name: tuple(names) for name, names in answers[case]["report"].items()})
    old, new = saved(path, ema=CASES[case].get("ema", False)), first(case)
    partly = {table[0] for table in (*report.resized, *report.resampled)}
    assert partly == set(expected)
    assert {*report.loaded, *report.missing, *report.mismatched, *report.left, *partly} == set(new)
    for name, values in weights(answers[case], new).items():
        right = expected[name] if name in partly else old[name] if name in report.loaded else new[name]
        assert torch.equal(values, right), name
    return report


def test_the_same_model_takes_all(taken: tuple[Path, dict[str, Any]]) -> None:
    report = check("same", taken, {})
    assert report.complete
    assert taken[1]["same"]["text"] == f"loaded all {len(report.loaded)} parameters"


TABLE = "vision.positions.position_embedding"


@pytest.mark.parametrize(("case", "grid"), [("grid", (3, 6)), ("grid-frozen", (3, 6)), ("turned", (4, 2))])
def test_a_position_table_is_resampled(taken: tuple[Path, dict[str, Any]], case: str, grid: tuple[int, int]) -> None:
    table = saved(taken[0])[TABLE].detach()
    plane = table[1:].T.reshape(1, -1, 2, 4)
    resampled = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    report = check(case, taken, {TABLE: resample_positions(table, (2, 4), grid)})
    found = weights(taken[1][case], first(case))[TABLE]
    torch.testing.assert_close(found, torch.cat([table[:1], resampled]), rtol=1e-6, atol=1e-7)
    assert not report.mismatched + report.missing + report.unused + report.resized + report.left
    assert f"{TABLE}: resampled from 2x4 to {grid[0]}x{grid[1]} positions" in taken[1][case]["text"]


def test_a_tower_of_views_becomes_one_of_tiles(taken: tuple[Path, dict[str, Any]]) -> None:
    table = saved(taken[0])[TABLE].detach()
    report = check("tiles", taken, {TABLE: resample_positions(table, (2, 4), (3, 6))})
    news = ("vision.pre_tiles.", "vision.post_tiles.", "vision.global_layers.", "vision.positions.")
    assert all(name.startswith(news) for name in report.missing)
    assert not report.mismatched + report.unused + report.resized + report.left


def test_each_table_of_tiles_is_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = torch.randn(3, 2, 9, 5)
    monkeypatch.setattr(warm_start, "whole_parameter", lambda *_, **__: tables)
    reader: Any = SimpleNamespace(manifest=SimpleNamespace(stored_name=lambda name: name))
    found = warm_start._resampled(reader, Resampled("tile_embedding", (2, 4), (3, 6)), False)
    assert found.shape == (3, 2, 19, 5)
    for grid in range(3):
        for tile in range(2):
            assert torch.equal(found[grid, tile], resample_positions(tables[grid, tile], (2, 4), (3, 6)))


@pytest.mark.parametrize("case", ["classless", "classless-equal"])
def test_a_table_with_other_first_rows_is_left_alone(taken: tuple[Path, dict[str, Any]], case: str) -> None:
    report = check(case, taken, {})
    assert report.mismatched == (TABLE,)
    assert report.unused == ("vision.positions.class_embedding",)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("more", ("decoder.embed_tokens.weight", "head.weight")),
        ("more-frozen", ("decoder.embed_tokens.weight", "head.weight")),
        ("fewer", ("decoder.embed_tokens.weight",)),
    ],
)
def test_rows_that_both_have_are_taken(taken: tuple[Path, dict[str, Any]], case: str, names: tuple[str, ...]) -> None:
    rows, old, new = CASES[case]["model"]["vocab_size"], saved(taken[0]), first(case)
    both = min(rows, VOCAB)
    report = check(case, taken, {name: torch.cat([old[name][:both], new[name][both:]]) for name in names})
    assert [tuple(table) for table in report.resized] == [(name, both, VOCAB, rows) for name in names]
    assert report.unused == (() if len(names) == 2 else ("head.weight",))
    end = ", 10 new rows unchanged" if rows > VOCAB else ""
    assert f"{names[0]}: loaded {both} of the checkpoint's {VOCAB} rows{end}" in taken[1][case]["text"]


def test_rows_of_new_tokens_keep_their_first_values(taken: tuple[Path, dict[str, Any]]) -> None:
    report = check("new rows", taken, {})
    assert report.missing == ("decoder.embed_tokens.extra_weight", "head.extra_weight")
    assert not report.mismatched + report.unused + report.resized


def test_one_component_alone(taken: tuple[Path, dict[str, Any]]) -> None:
    for case, components in (("decoder", ("decoder.", "head.")), ("vision and connector", ("vision.", "connector."))):
        report = check(case, taken, {})
        assert all(name.startswith(components) for name in report.loaded)
        assert {*report.loaded, *report.left} == set(first(case))
        assert not any(name.startswith(components) for name in report.left)
        assert not report.missing + report.unused + report.mismatched
    text = taken[1]["decoder"]["text"]
    count = sum(name.startswith("decoder.") for name in first("decoder"))
    assert text.startswith(f"loaded: decoder.* ({count}), head.* (1); not asked for, unchanged: connector.* (")


def test_the_averages(taken: tuple[Path, dict[str, Any]]) -> None:
    assert check("average", taken, {}).complete
    assert not torch.equal(saved(taken[0], ema=True)["head.weight"], saved(taken[0])["head.weight"])


def test_what_cannot_be_taken_is_refused(taken: tuple[Path, dict[str, Any]]) -> None:
    path, answers = taken
    assert "no component ['audio']; it has ['connector', 'decoder', 'vision']" in answers["unknown"]["error"]
    assert answers["nothing fits"]["error"] == f"{path} holds no parameter of decoder in a shape that fits"


def test_a_manifest_that_says_nothing_sensible_of_the_grid(taken: tuple[Path, dict[str, Any]]) -> None:
    manifest = read_manifest(taken[0])
    model = build_model(settings(grid=(4, 2)))
    for values in (None, {"vision": None}, {"vision": {"positions": {"grid": [4, "x"]}}}):
        other = manifest.model_copy(update={"model_config_values": values})
        assert TABLE in match(model, other).loaded
    wrong = {"vision": {"positions": {"grid": [5, 5]}}}
    assert match(model, manifest.model_copy(update={"model_config_values": wrong})).mismatched == (TABLE,)


def test_the_report_names_every_parameter_once() -> None:
    report = LoadReport(
        ("decoder.a", "decoder.b.x", "head.weight"),
        ("decoder.b.y",),
        ("old.x", "old.y"),
        ("vision.t",),
        (Resized("decoder.e", 5, 5, 7),),
        (Resampled("vision.p", (1, 2), (3, 4)),),
        ("connector.x", "connector.y"),
    )
    assert str(report).split("; ") == [
        "loaded: decoder.a, decoder.b.x, head.* (1)",
        "not in the checkpoint, unchanged: decoder.b.y",
        "another shape, unchanged: vision.t",
        "not asked for, unchanged: connector.* (2)",
        "only in the checkpoint, not used: old.* (2)",
        "decoder.e: loaded 5 of the checkpoint's 5 rows, 2 new rows unchanged",
        "vision.p: resampled from 1x2 to 3x4 positions",
    ]


def test_a_text_model_gives_its_decoder_to_a_multimodal_one(taken: tuple[Path, dict[str, Any]]) -> None:
    """The checkpoint has no tower and no connector, so the report lists them as missing."""
    manifest = read_manifest(taken[0])
    parameters = {name: e for name, e in manifest.parameters.items() if name.startswith(("decoder.", "head."))}
    text = manifest.model_copy(update={"parameters": parameters, "model_config_values": config(None).model_dump()})
    report = match(build_model(settings()), text)
    assert set(report.loaded) == set(parameters)
    assert all(name.startswith(("vision.", "connector.")) for name in report.missing)
