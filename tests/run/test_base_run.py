"""A run that takes blocks of its configuration from a run folder (``base: FOLDER``)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.loader.fingerprint import fingerprint, schedule_of
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.cli.main import main
from mmscale.config import dump, load
from mmscale.errors import ConfigError
from mmscale.run.config import RunConfig
from mmscale.run.stage_weights import check_initial_weights

REPO = Path(__file__).parents[2]
TINY = REPO / "tests/system/tiny.yaml"
STAGE = "stages: [{name: tune, steps: 1, learning_rate: {default: 1e-3}%s}]\n"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)  # Paths of shards are relative to the repository.


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A run folder that describes a model and has a folder of checkpoints, as an import writes it."""
    folder = tmp_path / "pretrained"
    (folder / "checkpoints").mkdir(parents=True)
    words = ["stages=[]", "data.datasets=[]", "data.template={kind: caption, prompts: ['a']}", f"run_dir={folder}"]
    (folder / "config.yaml").write_text(dump(load(TINY, words, RunConfig).value))
    return folder


def tuning(folder: Path, text: str) -> Path:
    path = folder.parent / "tune.yaml"
    path.write_text(text)
    return path


def test_a_run_begins_with_the_whole_file_of_another_but_in_its_own_folder(described: Path) -> None:
    whole = "base: pretrained\n" + STAGE % f", weights: [{{checkpoint: {described}}}]"
    with pytest.raises(ConfigError, match="run_dir: required, and missing"):
        load(tuning(described, whole), [], RunConfig)
    path = tuning(described, whole + "run_dir: runs/x\ndata: {datasets: [{name: d, manifest: m}]}\n")
    loaded = load(path, [], RunConfig)
    assert loaded.value.model == load(TINY, [], RunConfig).value.model
    assert loaded.value.data.datasets[0].template == loaded.value.data.template
    assert str(loaded.origins["model.decoder.num_layers"]).startswith(str(described / "config.yaml"))
    check_initial_weights(loaded)


def test_a_block_takes_the_same_block_of_the_run(described: Path) -> None:
    path = tuning(described, f"base: {TINY}\nmodel: {{base: pretrained, decoder: {{dropout: 0.25}}}}\n")
    decoder = load(path, [], RunConfig).value.model.decoder
    assert decoder.dropout == 0.25
    assert decoder == load(TINY, ["model.decoder.dropout=0.25"], RunConfig).value.model.decoder
    path = tuning(described, f"base: {TINY}\ndata: {{tokenizer: {{base: pretrained}}}}\n")
    assert load(path, [], RunConfig).value == load(TINY, [], RunConfig).value
    path = tuning(described, f"base: {TINY}\nmodel: {{decoder: {{extra_tokens: {{base: pretrained}}}}}}\n")
    with pytest.raises(ConfigError, match=r"tune.yaml:2 base=pretrained: .* no block 'model.decoder.extra_tokens'"):
        load(path, [], RunConfig)
    (described / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"base=pretrained: a folder without config.yaml"):
        load(path, [], RunConfig)


@pytest.mark.parametrize("block", ["base: pretrained\nrun_dir: x\n", "base: {tiny}\nmodel: {{base: pretrained}}\n"])
def test_a_run_does_not_train_anothers_model_from_random_values_unasked(described: Path, block: str) -> None:
    data = "data: {datasets: [{name: d, manifest: m}]}\n" if "tiny" not in block else ""
    block = block.replace("{tiny}", str(TINY)).replace("{{", "{").replace("}}", "}")
    path = tuning(described, block + data + STAGE % "")
    with pytest.raises(
        ConfigError, match=r"stages\.0\.weights: missing, and the model comes from the run .*pretrained"
    ):
        check_initial_weights(load(path, [], RunConfig))
    check_initial_weights(load(path, ["stages.0.weights=[]"], RunConfig))
    shutil.rmtree(described / "checkpoints")  # Without checkpoints there is nothing to begin with.
    check_initial_weights(load(path, [], RunConfig))


def test_train_and_validate_apply_the_rule(described: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tuning(
        described, f"base: {TINY}\nmodel: {{base: pretrained}}\nrun_dir: {described.parent}/new\n" + STAGE % ""
    )
    for words in (["train"], ["config", "validate"], ["launch", "local", "--ranks", "1"]):
        assert main([*words, str(path)]) == 2
        assert "stages.0.weights: missing, and the model comes from the run" in capsys.readouterr().err
    assert main(["config", "validate", str(path), "stages.0.weights=[]"]) == 0


def test_a_file_that_describes_a_model_does_not_train(described: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(described / "config.yaml")
    assert main(["params", path]) == 0
    capsys.readouterr()
    for words in (["train"], ["config", "validate"], ["config", "shrink"], ["launch", "local", "--ranks", "1"]):
        assert main([*words, path]) == 2
        error = capsys.readouterr().err
        assert "stages: empty; this configuration describes a model" in error
        assert f"begins with `base: {described}`" in error
    no_data = tuning(described, "base: pretrained\nrun_dir: x\n" + STAGE % "")
    assert main(["train", str(no_data)]) == 2
    assert "data.datasets: empty in stage tune" in capsys.readouterr().err


def test_defaults_of_data_sets_equal_keys_of_each(tmp_path: Path) -> None:
    chat, crop = "{kind: dialogue, format: chatml}", "{kind: fixed, size: 16, crop: center}"
    own = "{name: a, manifest: m, template: {kind: caption}}"
    default = load(
        TINY,
        [f"data.template={chat}", f"data.transforms={crop}", f"data.datasets=[{own}, {{name: b, manifest: m}}]"],
        RunConfig,
    ).value
    each = load(
        TINY,
        [
            f"data.datasets=[{own[:-1]}, transforms: {crop}}}, "
            f"{{name: b, manifest: m, template: {chat}, transforms: {crop}}}]"
        ],
        RunConfig,
    ).value
    assert default.data.datasets == each.data.datasets

    def of(config: RunConfig) -> str:
        schedule = schedule_of(config.data, {})
        tokenizer = load_tokenizer(config.data.tokenizer).fingerprint
        return fingerprint(config.data, config.media_spec, 1, {}, tokenizer, schedule, 1)

    assert of(default) == of(each)
    assert of(default) != of(load(TINY, [f"data.datasets=[{own}, {{name: b, manifest: m}}]"], RunConfig).value)
    path = tmp_path / "again.yaml"
    path.write_text(dump(default))
    assert load(path, [], RunConfig).value == default
    assert default.data.prompts == default.data.datasets[0]
    alone = load(TINY, [f"data.template={chat}", f"data.transforms={crop}", "data.datasets=[]"], RunConfig).value.data
    assert (alone.prompts.template, alone.prompts.transforms) == (alone.template, alone.transforms)
    assert alone.template is not None
    with pytest.raises(ConfigError, match=r"stages\.0 \(all\)\.data\.template: changes no data set"):
        load(TINY, ["stages=[{name: all, steps: 1, data: {template: {kind: text}}}]"], RunConfig)
