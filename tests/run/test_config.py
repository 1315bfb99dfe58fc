"""A stage's overrides of data and model: merged, validated when loaded, and read by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import DataConfigError
from mmscale.cli.main import main
from mmscale.config import dump, load
from mmscale.errors import ConfigError
from mmscale.models.connector_config import HybridConnectorConfig
from mmscale.nn.rope import RopeConfig, Rotary2dConfig
from mmscale.run.config import RunConfig
from mmscale.run.file_checks import check_files
from mmscale.shrink.run import shrink_run

TINY = Path(__file__).parents[1] / "system/tiny.yaml"
LARGE = {"model": {"vision": {"positions": {"grid": [6, 6]}}}}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # Paths of shards are relative to the repository.


def run_of(*stages: dict[str, Any]) -> RunConfig:
    listed = [{"name": f"s{number}", "steps": 2, **stage} for number, stage in enumerate(stages)]
    return load(TINY, [f"stages={yaml.safe_dump(listed, default_flow_style=True)}"], RunConfig).value


def rope(theta: float) -> dict[str, Any]:
    return {"model": {"decoder": {"rope": {"theta": theta}}}}


def test_a_changed_model_stays_changed_and_changed_data_do_not() -> None:
    config = run_of({}, rope(20_000.0) | {"data": {"lanes": 2}}, LARGE, rope(30_000.0))
    models = [config.stage_model(number) for number in range(4)]
    assert [model.decoder.rope for model in models] == [RopeConfig(theta=t) for t in (10_000, 20_000, 20_000, 30_000)]
    assert [config.stage_media(number).fixed_grid for number in range(4)] == [(4, 4), (4, 4), (6, 6), (6, 6)]
    assert [config.stage_data(number).lanes for number in range(4)] == [4, 2, 4, 4]
    assert [config.continues(number) for number in range(4)] == [False, False, False, True]
    assert config.model == models[0]


def test_the_written_configuration_has_the_same_stages(tmp_path: Path) -> None:
    """The written configuration contains every default."""
    config = run_of({}, {"model": {"connector": {"kind": "hybrid", "every": 2}}}, rope(20_000.0))
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    again = load(path, [], RunConfig).value
    assert again == config
    assert [again.stage_model(n) for n in range(3)] == [config.stage_model(n) for n in range(3)]


def test_a_block_of_another_kind_is_replaced_whole() -> None:
    config = run_of({}, {"model": {"connector": {"kind": "hybrid", "every": 2}}})
    connector = config.stage_model(1).connector
    assert connector == HybridConnectorConfig(every=2)
    assert connector.mlp is None
    native = {"model": {"vision": {"positions": {"kind": "rotary_2d", "theta": 100.0}}}}
    vision = run_of(native).stage_model(0).vision
    assert vision is not None
    assert vision.positions == Rotary2dConfig(theta=100.0)


def test_an_illegal_override_names_its_stage_at_once() -> None:
    with pytest.raises(ConfigError, match=r"stages\.1 \(s1\)\.model\.decoder\.rope\.theta: .* greater than 1"):
        run_of({}, rope(0.5))
    with pytest.raises(ConfigError, match=r"stages\.0 \(s0\)\.model\.vision\.hiden_dim: unknown key"):
        run_of({"model": {"vision": {"hiden_dim": 3}}})
    with pytest.raises(ConfigError, match=r"stages\.1 \(s1\)\.model: vision and connector: set both"):
        run_of({}, {"model": {"vision": None}})
    with pytest.raises(ConfigError, match=r"stages\.0 \(s0\)\.data\.lanes: "):
        run_of({"data": {"lanes": 0}})


def test_a_stage_trains_and_takes_what_its_own_model_has() -> None:
    text = {"model": {"vision": None, "connector": None}}
    new = {"model": {"decoder": {"extra_tokens": {"rows": 3}}}}
    with pytest.raises(ConfigError, match=r"stages\.0 \(s0\) names \['vision'\]; this model has \['decoder'\]"):
        run_of({**text, "train": ["vision"]})
    with pytest.raises(ConfigError, match=r"stages\.0 \(s0\) names \['extra_tokens'\]"):
        run_of({"train": ["extra_tokens"]}, new)
    with pytest.raises(ConfigError, match=r"stages\.1 \(s1\) names \['audio'\]"):
        run_of({}, {"weights": [{"checkpoint": "x", "components": ["audio"]}]})
    with pytest.raises(ConfigError, match=r"components=\['all', 'decoder'\]: `all` must be the only name"):
        run_of({"weights": [{"checkpoint": "x", "components": ["all", "decoder"]}]})
    tokenizer = {"kind": "vqgan", "base_dim": 32, "multipliers": [1], "attention_levels": [], "latent_dim": 4}
    drawing = {
        "decoder": {"image_tokens": {"kind": "separate", "codes": 8, "code_dim": 2}},
        "image_tokenizer": {**tokenizer, "codebook_size": 8, "code_dim": 2},
    }
    with pytest.raises(ConfigError, match=r"stages\.0 \(s0\)\.train names image_tokenizer: the data hold its codes"):
        run_of({"model": drawing, "train": ["decoder", "image_tokenizer"]})
    config = run_of(new, {"train": ["extra_tokens", "connector"]})
    assert config.stage_model(1).components == ("vision", "connector", "decoder", "extra_tokens")


def test_a_stage_that_cannot_upcycle_names_the_key() -> None:
    moe = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_dim": 64, "renormalise": True}

    def sparse(**keys: Any) -> dict[str, Any]:
        return {
            "model": {"decoder": {"mlp": {**moe, **keys}}, "connector": {"mlp": {"hidden_dim": 64}}},
            "upcycle": True,
        }

    assert run_of({}, sparse()).stages[1].upcycles_previous
    with pytest.raises(ConfigError, match=r"stages\.1 \(s1\)\.upcycle=true: the decoder of this stage has no experts"):
        run_of({}, {"upcycle": True})
    with pytest.raises(ConfigError, match=r"stages\.0 \(s0\)\.upcycle=true: nothing is loaded; name the dense model"):
        run_of(sparse())
    with pytest.raises(
        ConfigError, match=r"stages\.1 \(s1\)\.upcycle=true: model\.decoder\.mlp\.expert_dim=48: must be 64"
    ):
        run_of({}, sparse(expert_dim=48))
    with pytest.raises(ConfigError, match=r"stages\.1 \(s1\)\.upcycle=true: model\.decoder\.mlp\.renormalise=false"):
        run_of({}, sparse(renormalise=False))
    with pytest.raises(ConfigError, match=r"stages\.2 \(s2\)\.upcycle=true: .* have experts already"):
        run_of({}, sparse(), {"upcycle": True})
    loaded = {**sparse(expert_dim=48), "weights": [{"checkpoint": "x", "components": ["decoder"]}]}
    assert not run_of({}, loaded).stages[1].upcycles_previous  # Checked when the run starts.
    assert not shrink_run(run_of({}, sparse())).stages[1].upcycle


def test_a_model_is_asked_by_the_data_of_the_last_stage_that_has_it() -> None:
    config = run_of({"data": {"lanes": 1}}, {"data": {"lanes": 2}}, LARGE, {"data": {"lanes": 3}})
    assert [config.evaluation_data(number).lanes for number in range(4)] == [2, 2, 3, 3]


def test_what_a_later_stage_lacks_is_found_before_the_first_step() -> None:
    with pytest.raises(DataConfigError, match=r"stage s1, data set emoji: .*32"):
        check_files(run_of({}, LARGE))
    with pytest.raises(ConfigError, match=r"vocab_size=2040: the tokenizer of stage s1 has 2048 ids"):
        check_files(run_of({}, {"model": {"decoder": {"vocab_size": 2040}}}))
    rows = {"model": {"decoder": {"vocab_size": 2040, "extra_tokens": {"rows": 7}}}}
    with pytest.raises(ConfigError, match=r"vocab_size=2040, extra_tokens\.rows=7: the tokenizer"):
        check_files(run_of({}, rows))
    rows["model"]["decoder"]["extra_tokens"]["rows"] = 8
    check_files(run_of({}, rows))


def test_an_import_into_a_run_of_several_models_needs_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(run_of({}, rope(20_000.0))))
    words = ["checkpoint", "import", str(tmp_path / "absent"), str(tmp_path / "new"), "--config", str(path)]
    assert main(words) == 2
    assert "choose the stage that resumes with --stage" in capsys.readouterr().err
    assert main([*words, "--stage", "s1"]) == 1
    assert "absent" in capsys.readouterr().err


def test_options_of_next_tokens_are_refused_in_a_contrastive_stage() -> None:
    with pytest.raises(ConfigError, match=r"stages\.0 \(contrast\)\.z_loss=0\.1: the model has no logits"):
        load(Path("configs/recipes/emoji-contrast.yaml"), ["stages.0.z_loss=0.1"], RunConfig)
