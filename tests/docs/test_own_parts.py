"""docs/extending.md, "Your own package": its parts are loaded, trained, resumed, and refused from a run folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmscale import load_config
from mmscale.config import dump
from mmscale.errors import ConfigError
from tests.docs.test_extending import OWN, REPO, SECTIONS

FILES = dict(re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```", SECTIONS[OWN], re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's two files; modules imported from it are forgotten at the end."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(REPO / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("data_pipeline.io.trusted_code._trusted", set())
    monkeypatch.setitem(sys.modules, "my_parts", None)
    monkeypatch.delitem(sys.modules, "my_parts")
    return tmp_path


def test_the_blocks_are_instances_of_the_package_and_the_dump_loads_again(folder: Path) -> None:
    config = load_config("my_run.yaml")
    parts = (config.model.connector.projector, config.data.datasets[0].template, config.stages[0].objective)
    assert [type(part).__name__ for part in parts] == ["TwoLayers", "Shout", "Focal"]
    assert (parts[0].rank, parts[2].gamma) == (16, 1.5)
    (folder / "again.yaml").write_text(dump(config))
    assert load_config("again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.objective.gama=3", r"stages\.0\.objective\.gama=3: unknown key; did you mean 'gamma'\?"),
        ("stages.0.objective.gamma=x", r"stages\.0\.objective\.gamma=x: expected a number"),
        ("stages.0.objective.kind=focal", r"stages\.0\.objective\.kind=focal: expected the path of a class"),
        (
            "stages.0.objective.kind=my_parts:Nothing",
            r"objective\.kind=my_parts:Nothing: cannot be imported: Attribute",
        ),
        ("stages.0.objective.kind=my_parts:Shout", r"kind=my_parts:Shout: is .*, expected a class that derives from "),
        ("model.connector.projector.kind=lost:Part", r"projector\.kind=lost:Part: cannot be imported: ModuleNotFound"),
        ("model.connector.projector.kind=part", r"kind=part: unknown variant; known here: linear, mlp"),
        ("stages.0.z_loss=1", r"objective=my_parts:Focal: replaces the loss; leave out z_loss and distill"),
    ],
)
def test_a_mistake_is_reported_at_its_key(folder: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("my_run.yaml", [override])


def as_run_folder(folder: Path) -> Path:
    """A run folder that someone else sends: its configuration names code next to the reader's files."""
    run = folder / "theirs"
    (run / "checkpoints").mkdir(parents=True)
    config = yaml.safe_load(FILES["my_run.yaml"]) | {"base": str(REPO / "configs/quickstart.yaml")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "my_parts.py").write_text("open('ran', 'w')\n")
    return run


def test_a_run_folder_names_no_code_that_runs(folder: Path) -> None:
    run = as_run_folder(folder)
    with pytest.raises(
        ConfigError, match=r"came with the run folder .*theirs and would run the Python code 'my_parts:"
    ):
        load_config(run)
    (folder / "mine.yaml").write_text(f"base: {run}/config.yaml\nrun_dir: runs/mine\n")
    with pytest.raises(ConfigError, match="came with the run folder"):
        load_config("mine.yaml")
    assert not (folder / "ran").exists()
    with pytest.raises(ConfigError, match="cannot be imported: AttributeError"):
        load_config(run, allow_code=True)
    assert (folder / "ran").exists()


def test_values_that_no_file_of_the_user_names_are_refused(folder: Path) -> None:
    """A checkpoint or another record may contain a model block; validating it must not import code."""
    from mmscale.models.config import ModelConfig

    model = load_config("configs/quickstart.yaml").model.model_dump()
    model["connector"] = {"kind": "embedding", "projector": {"kind": "my_parts:TwoLayers"}}
    with pytest.raises(ValueError, match="would import Python code, and no file of yours names it"):
        ModelConfig.model_validate(model)
    assert "my_parts" not in sys.modules


def test_an_entry_point_has_a_name_and_needs_no_permission(folder: Path) -> None:
    installed = folder / "installed/my_parts-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[mmscale.objectives]\nfocal = my_parts:Focal\n")
    sys.path += [str(folder / "installed"), str(folder)]
    run = as_run_folder(folder)
    (folder / "my_parts.py").write_text(FILES["my_parts.py"])
    settings = {"base": str(REPO / "configs/quickstart.yaml"), "stages": [{"name": "a", "steps": 1}]}
    settings["stages"][0]["objective"] = {"kind": "focal", "gamma": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    objective = load_config(run).stages[0].objective
    assert (type(objective).__name__, objective.kind, objective.gamma) == ("Focal", "focal", 3)


_COMMANDS = """
import json, sys
from mmscale.cli.main import main
train = ["train", "my_run.yaml", "data.workers=0", "data.packing.max_tokens=256", "model.decoder.num_layers=2"]
picture = "examples/photo.png"
answer = ["generate", "runs/my-parts", "--image", sys.argv[1], "--max-new-tokens", "2"]
codes = [main([*train, "max_steps=1"]), main(train), main(answer), main(["--allow-commands", *answer])]
print(json.dumps(codes))
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_run_trains_resumes_and_answers(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, "red.png"],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 2, 0], done.stdout + done.stderr
    assert "(step 1 of 2)" in done.stderr + done.stdout
    lines = [json.loads(line) for line in (folder / "runs/my-parts/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["loss"] < line["metric/cross_entropy"] for line in lines)
