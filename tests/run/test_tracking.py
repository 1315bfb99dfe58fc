from __future__ import annotations

from pathlib import Path

from mmscale.config import load
from mmscale.run.config import RunConfig
from mmscale.run.tracking import public_values, run_facts

REPO = Path(__file__).resolve().parents[2]
SECRETS = ("hunter2", "s3cr3t", "sig0")


def test_trackers_get_the_configuration_without_its_secrets(tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path}",
        "metrics.trackers=[{kind: mlflow, tracking_uri: 'http://user:hunter2@tracker:5000/path?token=sig0'}]",
    ]
    config = load(REPO / "configs/quickstart.yaml", overrides, RunConfig).value
    streamed = config.data.datasets[0].model_copy(
        update={"manifest": None, "shards": ("pipe:curl -H 'Authorization: s3cr3t' https://x/{0..3}.tar", "a/b.tar")}
    )
    data = config.data.model_copy(update={"datasets": (*config.data.datasets, streamed)})
    values = public_values(config.model_copy(update={"data": data}))
    assert not any(secret in str(values) for secret in SECRETS)
    assert values["metrics.trackers.0.tracking_uri"] == "http://(hidden)@tracker:5000/path?(hidden)"
    last = len(data.datasets) - 1
    assert values[f"data.datasets.{last}.shards"] == ["pipe:(hidden)", "a/b.tar"]
    assert values["stages.0.optimizer.kind"] == "adamw"
    assert values["data.tokenizer.path"].endswith(".model")


def test_facts_of_a_folder_without_a_start_name_its_report(tmp_path: Path) -> None:
    config = load(REPO / "configs/quickstart.yaml", [f"run_dir={tmp_path / 'first ü'}"], RunConfig).value
    facts = run_facts(config)
    assert (facts.name, facts.commit) == ("first ü", None)
    assert facts.facts["report"] == str(tmp_path / "first ü" / "report.html")
