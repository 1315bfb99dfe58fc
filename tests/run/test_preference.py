"""Settings of preference optimisation that do not fit the stage, its data or its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.check.batches import BatchMaker
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.evaluate.check import check_sets
from mmscale.objectives.preference import pair_places
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import teacher_sources
from mmscale.shrink.run import dropped_settings, shrink_run

CONFIG = Path(__file__).parents[1] / "system/preference.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # Paths of shards are relative to the repository.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.preference=null", "preference: missing, and a data set has a template of kind preference"),
        ("stages.0.preference={}", "preference: data set talks has another template"),
        ("stages.1.data.packing.too_long=truncate", "too_long=truncate: a cut pair has lost an answer"),
        ("stages.1.z_loss=0.1", "preference: replaces the loss; leave out objective, z_loss and distill"),
        ("stages.1.preference.label_smoothing=0.5", "stages.1.preference.label_smoothing"),
        ("stages.1.preference={loss: ipo, label_smoothing: 0.1}", "belongs to loss=sigmoid, not ipo"),
        (
            "stages.1.weights=[{checkpoint: somewhere, components: [decoder]}]",
            "preference.reference=start: needs one checkpoint with the weights of the beginning",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_an_error(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(CONFIG, [override], RunConfig)
    assert message in str(error.value)


def test_the_reference_is_the_beginning_of_the_stage_or_a_checkpoint() -> None:
    def sources(*overrides: str) -> list[str]:
        config = load(CONFIG, ["run_dir=here", *overrides], RunConfig).value
        return [str(source.checkpoint) for source in teacher_sources(config, 1)]

    assert sources() == ["here/references/prefer"]
    assert sources("stages.1.preference.reference=runs/other") == ["runs/other"]
    assert sources("stages.1.preference.reference=none") == []
    assert sources("stages.1.weights=[{checkpoint: runs/first}]") == ["runs/first"]


def test_pairs_have_no_perplexity() -> None:
    held_out = "{name: pairs, kind: perplexity, manifest: examples/text/shards/pairs-heldout.manifest}"
    config = load(CONFIG, [f"evaluation.sets=[{held_out}]"], RunConfig).value
    with pytest.raises(ConfigError, match="has a rejected answer, whose likelihood is no score"):
        check_sets(config.evaluation, config.stage_data(1), config.stage_media(1))


def test_simulated_batches_are_pairs() -> None:
    """``mmscale check`` gives ranks different batches; each document but the dummy document must be a pair."""
    spec = load(CONFIG, [], RunConfig).value.stage_media(1)
    maker = BatchMaker(spec, 61, 1, num_answers=2)
    for kind in maker.kinds:
        batch = maker.make(kind, 0, 0)
        assert len(pair_places(batch).documents) == batch.num_samples, kind


def test_a_smoke_test_run_keeps_the_loss_and_its_reference() -> None:
    config = load(CONFIG, ["stages.1.preference.reference=runs/other"], RunConfig).value
    stage = shrink_run(config).stages[1]
    assert stage.preference is not None
    assert (stage.preference.beta, stage.preference.reference) == (0.5, "start")
    assert dropped_settings(config) == ["stages.1.preference.reference: runs/other"]
