"""Configuration loading against hand-written expectations."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.config import DroppedKeyWarning, load
from mmscale.errors import ConfigError


class Precision(str, Enum):
    FP32 = "fp32"
    BF16 = "bf16"


class Dense(StrictConfig):
    kind: Literal["dense"] = "dense"
    width: int = 4


class Experts(StrictConfig):
    kind: Literal["experts"] = "experts"
    count: int = Field(8, ge=1)
    width: int = 4


Mlp = Annotated[Dense | Experts, Field(discriminator="kind")]


class Stage(StrictConfig):
    name: str
    steps: int
    betas: tuple[float, float] = (0.9, 0.95)


class Tower(StrictConfig):
    depth: int = 2
    mlp: Mlp = Dense()


class Whole(StrictConfig):
    run_dir: Path = Path("runs/x")
    rate: float = 1.0
    precision: Precision = Precision.FP32
    mode: Literal["fast", "exact"] = "exact"
    tower: Tower | None = None
    mlps: list[Mlp] = []
    stages: list[Stage] = []
    limit: int | Literal["auto"] = "auto"
    level: Literal[0, 1, 2] = 0
    parts: tuple[Stage, ...] = Field((Stage(name="a", steps=1),), min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Whole:
        if self.rate > 100:
            raise ValueError(f"rate={self.rate}: must not exceed 100")
        return self


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


FULL = """\
run_dir: runs/a
rate: 1e-3
tower:
  depth: 3
  mlp:
    kind: dense
    width: 16
stages:
  - name: align
    steps: 10
  - {name: all, steps: 20, betas: [0.5, 0.6]}
"""


def test_values_and_origins(write) -> None:
    path = write(FULL)
    loaded = load(path, ["stages.1.steps=5", "tower.mlp.width=32"], Whole)
    assert loaded.value.rate == 0.001
    assert loaded.value.stages[1] == Stage(name="all", steps=5, betas=(0.5, 0.6))
    assert loaded.value.tower.mlp == Dense(width=32)
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    assert origins["rate"] == f"{path}:2"
    assert origins["tower.depth"] == f"{path}:4"
    assert origins["stages.0.steps"] == f"{path}:10"
    assert origins["stages.1.name"] == f"{path}:11"
    assert origins["stages.1.betas"] == f"{path}:11"
    assert origins["stages.0.betas"] == "default"
    assert origins["stages.1.steps"] == "override 1 (stages.1.steps=5)"
    assert origins["tower.mlp.width"] == "override 2 (tower.mlp.width=32)"
    assert origins["precision"] == "default"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E3", 1000.0), (".5", 0.5), ("5", 5.0), ("1_000.5", 1000.5)],
)
def test_numbers_of_overrides(write, text: str, value: float) -> None:
    override = f"rate={text}"
    if value > 100:
        with pytest.raises(ConfigError, match="must not exceed 100"):
            load(write("run_dir: x\n"), [override], Whole)
    else:
        assert load(write("run_dir: x\n"), [override], Whole).value.rate == value


def test_strings_that_yaml_1_1_reads_as_other_types(write) -> None:
    stages = "stages: [{name: no, steps: 010}, {name: 12:30:00, steps: 1}, {name: 2024-01-01, steps: 1}]\n"
    value = load(write(stages), [], Whole).value
    assert [stage.name for stage in value.stages] == ["no", "12:30:00", "2024-01-01"]
    assert value.stages[0].steps == 10


def test_base_files_are_merged_in_depth_and_lists_replaced(write) -> None:
    base = write(FULL, "lib/base.yaml")
    middle = write("base: base.yaml\nrate: 2\nstages: [{name: one, steps: 1}]\n", "lib/middle.yaml")
    path = write("base: lib/middle.yaml\ntower: {depth: 7}\n")
    loaded = load(path, [], Whole)
    assert (loaded.value.rate, loaded.value.tower.depth, loaded.value.tower.mlp.width) == (2.0, 7, 16)
    assert [stage.name for stage in loaded.value.stages] == ["one"]
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    assert origins["tower.mlp.width"] == f"{base}:7"
    assert origins["rate"] == f"{middle}:2"
    assert origins["tower.depth"] == f"{path}:2"


def test_a_block_has_a_base_of_its_own(write) -> None:
    inner = write("kind: dense\nwidth: 64\n", "lib/mlp.yaml")
    tower = write("depth: 5\nmlp: {base: mlp.yaml}\n", "lib/tower.yaml")
    path = write(FULL.replace("tower:\n", "tower:\n  base: lib/tower.yaml\n").replace("    width: 16\n", ""))
    loaded = load(path, [], Whole)
    assert (loaded.value.tower.depth, loaded.value.tower.mlp) == (3, Dense(width=64))
    assert str(loaded.origins["tower.mlp.width"]) == f"{inner}:2"
    assert str(loaded.origins["tower.mlp.kind"]) == f"{path}:7"
    write(f"kind: dense\nwidth: {{base: {tower.name}}}\n", "lib/mlp.yaml")
    with pytest.raises(ConfigError, match="leads back to"):
        load(path, [], Whole)
    with pytest.raises(ConfigError, match=r"run\.yaml:4 base=lib/none\.yaml: no such file"):
        load(write(FULL.replace("tower:\n", "tower:\n  base: lib/none.yaml\n")), [], Whole)


def test_the_base_of_a_block_replaces_its_base_in_a_base_of_the_file(write) -> None:
    """Values of the replaced base do not remain, those of the lower file itself do."""
    write("depth: 5\nmlp: {kind: experts, count: 16}\n", "models/a.yaml")
    write("mlp: {kind: dense}\n", "models/b.yaml")
    write("rate: 2\ntower: {base: models/a.yaml, mlp: {width: 8}}\n", "first.yaml")
    write("base: first.yaml\nrate: 3\n", "second.yaml")
    loaded = load(write("base: second.yaml\ntower: {base: models/b.yaml}\n"), [], Whole)
    assert loaded.value.tower == Tower(mlp=Dense(width=8))
    assert (loaded.value.rate, loaded.notes) == (3.0, ())
    assert load(write("base: second.yaml\n"), [], Whole).value.tower == Tower(depth=5, mlp=Experts(count=16, width=8))


def test_a_kind_of_a_base_of_a_block_drops_keys_of_the_file_below(write) -> None:
    write("mlp: {kind: dense}\n", "b.yaml")
    write("tower: {mlp: {kind: experts, count: 16}}\n", "a.yaml")
    with pytest.warns(DroppedKeyWarning, match="count"):
        assert load(write("base: a.yaml\ntower: {base: b.yaml}\n"), [], Whole).value.tower.mlp == Dense()


def test_switched_kind_drops_keys_of_the_file_with_a_warning(write) -> None:
    path = write("tower:\n  mlp:\n    kind: experts\n    count: 16\n    width: 8\n")
    with pytest.warns(DroppedKeyWarning, match="count"):
        loaded = load(path, ["tower.mlp.kind=dense"], Whole)
    assert loaded.value.tower.mlp == Dense(width=8)  # A key of both variants stays.
    assert loaded.notes == (
        f"{path}:4 tower.mlp.count: dropped, kind=dense (override 1 (tower.mlp.kind=dense)) has no such key; "
        "it belongs to kind=experts",
    )
    assert "tower.mlp.count" not in loaded.origins


def test_switched_kind_in_an_upper_file(write) -> None:
    write("mlps: []\ntower: {mlp: {kind: experts, count: 16}}\n", "b.yaml")
    with pytest.warns(DroppedKeyWarning):
        assert load(write("base: b.yaml\ntower: {mlp: {kind: dense}}\n"), [], Whole).value.tower.mlp == Dense()


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("tower: {mlp: {kind: experts}}", ["tower.mlp.count=3", "tower.mlp.kind=dense"]),
        ("tower: {mlp: {kind: experts}}", ["tower.mlp.kind=dense", "tower.mlp.count=3"]),
        ("tower: {mlp: {kind: dense, count: 3}}", []),
        ("tower: {mlp: {kind: dense, count: 3}}", ["tower.mlp.kind=dense"]),
    ],
)
def test_a_key_asked_for_is_never_dropped(write, text: str, overrides: list[str]) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=r"tower.mlp.count=3: unknown key"):
        load(path, overrides, Whole)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("rats: 1\n", [], "FILE:1 rats=1: unknown key; did you mean 'rate'?"),
        ("rate: 1\nledger: {every_steps: 3}\n", [], "FILE:2 ledger: renamed: write 'sample_log'"),
        ("\ntower:\n  dept: 1\n", [], "FILE:3 tower.dept=1: unknown key; did you mean 'depth'?"),
        (
            "tower: {mlp: {kind: dense, qqq: 1}}",
            [],
            "FILE:1 tower.mlp.qqq=1: unknown key; known here: kind, width",
        ),
        ("tower: {mlp: {kind: dens}}", [], "FILE:1 tower.mlp.kind=dens: unknown variant; did you mean 'dense'?"),
        ("tower: {mlp: {width: 1}}", [], "FILE:1 tower.mlp.kind: required, and missing: it selects the variant"),
        ("mlps: [{kind: experts, count: 0}]", [], "FILE:1 mlps.0.count=0: must be at least 1"),
        ("mlps: [{kind: experts, cout: 1}]", [], "FILE:1 mlps.0.cout=1: unknown key; did you mean 'count'?"),
        ("rate: [1]", [], "FILE:1 rate: expected a number"),
        ("\nrate: fast", [], "FILE:2 rate=fast: expected a number"),
        ("", ["rate=fast"], "override 1 (rate=fast) rate=fast: expected a number"),
        ("", ["rate=1", "tower.dpth=1"], "override 2 (tower.dpth=1) tower.dpth=1: unknown key; did you mean 'depth'?"),
        ("precision: fp23", [], "FILE:1 precision=fp23: not one of the choices; did you mean 'fp32'?"),
        ("mode: fats", [], "FILE:1 mode=fats: not one of the choices; did you mean 'fast'?"),
        ("level: 7", [], "FILE:1 level=7: not one of the choices; known here: 0, 1, 2"),
        ("parts: []", [], "FILE:1 parts: give at least one"),
        ("stages:\n- name: a\n", [], "FILE:2 stages.0.steps: required, and missing"),
        ("rate: 1000", [], "FILE:1 rate=1000: must not exceed 100"),
        ("rate: 1\nrate: 2\n", [], "FILE:2 rate: written twice, first at FILE:1"),
        ("rate: {a: 1\n", [], "FILE:2: not valid YAML"),
        ("- 1\n", [], "FILE: a configuration is a mapping of keys to values, this is a list"),
        ("base: nowhere.yaml\n", [], "FILE:1 base=nowhere.yaml: no such file"),
        ("base: .\n", [], "FILE:1 base=.: a folder without config.yaml, expected a YAML file or a run folder"),
        ("base: run.yaml\n", [], "FILE: its chain of 'base:' files leads back to"),
        ("a: &x [*x]\n", [], "FILE:1: an alias that contains itself"),
        ('rate: 1\nname: "a\\0b"\n', [], r"FILE:2: 'a\x00b': character 2 is U+0000, which no path"),
        ('stages:\n- name: "\\ud800"\n', [], r"FILE:2: '\ud800': character 1 is U+D800"),
        ('tower:\n  "k\\0": 1\n', [], r"FILE:2: 'k\x00': character 2 is U+0000"),
        ('base: "x\\0.yaml"\n', [], r"FILE:1: 'x\x00.yaml': character 2 is U+0000"),
        ("", [r'run_dir="a\udfffb"'], r"""override 1 (run_dir="a\udfffb"): 'a\udfffb': character 2 is U+DFFF"""),
        ("", ["k\udce9=1"], r"override 1 (k\udce9=1): 'k\udce9': character 2 is U+DCE9"),
        ("", ["rate"], "override 1 (rate): expected key=value"),
        ("", ["a..b=1"], "override 1 (a..b=1): expected key=value"),
        ("", ["rate.x=1"], "override 1 (rate.x=1) rate"),
        ("rate: 1", ["rate.x=1"], "override 1 (rate.x=1): 'x' is a key below 1 (FILE:1), which is not a block"),
        ("stages: []", ["stages.0.steps=1"], "'0' is not an index of this list of 0 items"),
        ("", ["stages.0.steps=1"], "the files have no list at this key; give the complete list"),
        ("", ["rate=[1"], "override 1 (rate=[1):1: not valid YAML"),
        ("limit: many", [], "FILE:1 limit=many: "),
        ("", ["rate=" + "x" * 3000], f"override 1 (rate={'x' * 75}...) rate={'x' * 80}...: expected a number"),
        ("", ["x" * 3000], f"override 1 ({'x' * 80}...): expected key=value"),
        ("", ["x" * 3000 + "=1"], f"override 1 ({'x' * 80}...) {'x' * 80}...=1: unknown key"),
        ("rate: " + "1" * 3000, ["rate.x=1"], "override 1 (rate.x=1): 'x' is a key below"),
    ],
)
def test_error_messages(write, text: str, overrides: list[str], message: str) -> None:
    path = write(text or "run_dir: x\n")
    with pytest.raises(ConfigError, match=re.escape(message.replace("FILE", str(path)))) as caught:
        load(path, overrides, Whole)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_binary_file_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: 1\n\xff\xfe")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: not a text file in UTF-8 (byte 6 cannot be read)")):
        load(path, [], Whole)


def test_every_error_is_listed(write) -> None:
    path = write("rats: 1\nmode: x\ntower: {depth: y}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, [], Whole)
    text = str(caught.value)
    assert text.startswith("3 errors in the configuration:\n")
    assert all(f"{path}:{line} " in text for line in (1, 2, 3))


def test_a_wrong_item_is_not_reported_twice(write) -> None:
    path = write("parts: [{name: a, steps: 1, stepz: 2}]\n")
    with pytest.raises(ConfigError) as caught:
        load(path, [], Whole)
    assert str(caught.value) == f"{path}:1 parts.0.stepz=2: unknown key; did you mean 'steps'?"


def test_override_of_a_null_block_and_a_whole_block(write) -> None:
    path = write("tower: null\n")
    assert load(path, ["tower.depth=5"], Whole).value.tower == Tower(depth=5)
    value = load(write(FULL), ["tower.mlp={kind: experts, count: 2}", "tower.depth=1"], Whole).value
    assert value.tower == Tower(depth=1, mlp=Experts(count=2))
    assert load(write(FULL), ["tower="], Whole).value.tower is None


def test_a_value_that_fits_no_member_of_a_union_is_one_error(write) -> None:
    path = write("limit: many\n")
    with pytest.raises(ConfigError) as caught:
        load(path, [], Whole)
    assert str(caught.value) == (
        f"{path}:1 limit=many: expected a whole number or not one of the choices; known here: auto"
    )
