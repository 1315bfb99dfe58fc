"""Which runs are started, the effect of their exit codes, and the summary of their folders."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmscale.cli import main
from mmscale.compare import Comparison, Stopped, Trial, plan_trials, run_trials, write_comparison
from mmscale.config import dump, load
from mmscale.errors import ConfigError
from mmscale.evaluate.result import (
    ChoiceResult,
    GenerationResult,
    HeldOutResult,
    Memory,
    Params,
    PerplexityResult,
    RunResult,
    SetResult,
    write_result,
)
from mmscale.run.config import RunConfig
from tests.compare.conftest import TINY, Read
from tests.report.pages import HOSTILE, Page

SEEDS = "compare.seeds=[1, 2, 3]"
SCORES = {"embedding": (0.50, 0.60, 0.70), "cross": (0.40, 0.45, 0.65), "hybrid": (0.8, 0.7, 0.9)}


def pretend(config: RunConfig, score: float = 0.5, more: Mapping[str, HeldOutResult] | None = None) -> None:
    """Write the files of a finished run."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump(config))
    lines = [
        {
            "step": step,
            "loss": 4 / step if step != 2 else None,
            "tokens": 900,
            "samples": 8,
            "learned_tokens": 30 + step,
            "model_flops": 5_000_000_000,
            "seconds": 0.5 * step,
        }
        for step in range(1, config.total_steps + 1)
    ]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = SetResult(score, 0.25, 0.25, 100, "name among 4", 0.05, 0.04, loss=2 - score)
    result = RunResult(
        world_size=1,
        zero_stage=1,
        precision="fp32",
        steps=config.total_steps,
        train_seconds=12.0,
        params=Params(1000, 900, {"vision": 400, "decoder": 600}),
        heldout={"both": held, **(more or {})},
        tokens=900 * config.total_steps,
        samples=8 * config.total_steps,
        memory=Memory((1 << 20, 3 << 20)),
        machine="a machine",
    )
    write_result(config.run_dir, result)


def planned(read: Read, *words: str) -> tuple[Comparison, list[Trial]]:
    comparison = read("compare.plan_steps=1", *words)
    return comparison, plan_trials(comparison)


class Starts:
    """Fake of the training command: it records the started runs and returns the given exit codes."""

    def __init__(self, codes: dict[str, int] | None = None) -> None:
        self.codes = codes or {}
        self.started: list[str] = []

    def __call__(self, path: Path, run_dir: Path) -> int:
        config = load(path, [], RunConfig).value
        assert config.run_dir == run_dir
        name = f"{run_dir.parent.name}-{config.seed}"
        self.started.append(name)
        code = self.codes.get(name, 0)
        if code == 0:
            pretend(config)
        return code


def test_after_a_failed_run_the_next_one_starts(read: Read) -> None:
    comparison, trials = planned(read, "compare.seeds=[1, 2]")
    logged: list[str] = []
    pages: list[int] = []
    starts = Starts({"cross-1": 1, "hybrid-2": 76})
    failures = run_trials(comparison, trials, starts, logged.append, lambda failures: pages.append(len(failures)))
    assert starts.started == ["embedding-1", "cross-1", "hybrid-1", "embedding-2", "cross-2", "hybrid-2"]
    assert [(f.variant, f.seed, f.exit_code) for f in failures] == [("cross", 1, 1), ("hybrid", 2, 76)]
    assert pages == [0, 1, 1, 1, 1, 2]
    assert any("cross, seed 1 failed (exit code 1)" in line for line in logged)
    figures = write_comparison(comparison, trials, failures)
    assert figures["failed"][0] == {"variant": "cross", "seed": 1, "exit_code": 1}
    assert [[run["seed"] for run in v["runs"]] for v in figures["variants"]] == [[1, 2], [2], [1]]
    text = Page(comparison.page_path.read_text()).text
    assert "cross, seed 1, failed (exit code 1) and is not included." in text
    assert "4 of 6 runs" in text
    again = Starts()
    assert run_trials(comparison, trials, again, logged.append, lambda failures: None) == []
    assert again.started == ["cross-1", "hybrid-2"]


@pytest.mark.parametrize("code", [75, 130, 143])
def test_a_run_that_was_stopped_stops_the_comparison(read: Read, code: int) -> None:
    comparison, trials = planned(read)
    starts = Starts({"cross-1": code})
    with pytest.raises(Stopped) as caught:
        run_trials(comparison, trials, starts, lambda text: None, lambda failures: None)
    assert caught.value.exit_code == code
    assert starts.started == ["embedding-1", "cross-1"]


def test_a_run_that_ends_well_without_a_result_failed(read: Read) -> None:
    comparison, trials = planned(read)
    failures = run_trials(comparison, trials, lambda path, run_dir: 0, lambda text: None, lambda failures: None)
    assert len(failures) == 3


def test_folders_of_another_comparison_are_refused(read: Read) -> None:
    comparison, trials = planned(read)
    run_trials(comparison, trials, Starts(), lambda text: None, lambda failures: None)
    other, trials = planned(read, "stages.0.clip=0.5", "data.packing.max_documents=3")
    starts = Starts()
    with pytest.raises(ConfigError, match=r"embedding/seed-1: holds a run with other values of data.packing.max_doc"):
        run_trials(other, trials, starts, lambda text: None, lambda failures: None)
    assert starts.started == []


def test_seeds_and_variants_can_be_added_later(read: Read) -> None:
    comparison, trials = planned(read)
    run_trials(comparison, trials, Starts(), lambda text: None, lambda failures: None)
    more, trials = planned(read, "compare.seeds=[1, 9]")
    starts = Starts()
    run_trials(more, trials, starts, lambda text: None, lambda failures: None)
    assert starts.started == ["embedding-9", "cross-9", "hybrid-9"]


@pytest.fixture
def figures(read: Read) -> tuple[Comparison, dict[str, Any]]:
    comparison, trials = planned(read, SEEDS)
    for trial in trials:
        pretend(trial.config, SCORES[trial.variant][trial.seed - 1])
    return comparison, write_comparison(comparison, trials, [])


def test_figures_are_means_over_seeds_and_differences_seed_by_seed(figures: tuple[Comparison, dict[str, Any]]) -> None:
    comparison, found = figures
    assert json.loads(comparison.json_path.read_text()) == found
    first, cross, _ = found["variants"]
    held = cross["heldout"]["both"]
    own, other = SCORES["cross"], SCORES["embedding"]
    pairs = [a - b for a, b in zip(own, other, strict=True)]
    for interval, values in ((held["score"]["mean"], own), (held["score"]["difference"], pairs)):
        half = 4.3027 * statistics.stdev(values) / math.sqrt(3)
        assert interval["mean"] == pytest.approx(statistics.fmean(values))
        assert interval["high"] - interval["mean"] == pytest.approx(half, rel=1e-4)
        assert interval["mean"] - interval["low"] == pytest.approx(half, rel=1e-4)
    assert held["score"]["asked_error"] == pytest.approx(math.sqrt(0.5 * 0.5 / 100))
    assert held["loss"]["mean"]["mean"] == pytest.approx(2 - statistics.fmean(own))
    assert first["heldout"]["both"]["score"]["difference"] is None
    (run, *_) = first["runs"]
    assert (run["steps"], run["learned_tokens"], run["flops"]) == (6, 30 * 6 + 21, 30_000_000_000)
    assert run["train_loss"] == pytest.approx(4 / 6)  # The last tenth of six steps is the last step.
    assert run["timing"]["step_seconds"] == pytest.approx(1.75)
    assert run["timing"]["tokens_per_second"] == pytest.approx(statistics.median(900 / (0.5 * s) for s in range(1, 7)))
    assert run["timing"]["memory_bytes"] == 3 << 20


def test_the_page_shows_every_variant_and_needs_no_network(figures: tuple[Comparison, dict[str, Any]]) -> None:
    comparison, found = figures
    text = comparison.page_path.read_text()
    page = Page(text)
    tables = {attributes["id"] for tag, attributes in page.tags if tag == "table" and "id" in attributes}
    assert tables == {"result-table", "cost-table"}
    for variant in comparison.variants:
        assert page.text.count(variant.name) >= 5  # Two tables, the bars, two legends.
        assert all(word in page.text for word in variant.overrides)
    assert "50.0%" in page.text
    assert "difference −10.0% ± 12.4%" in page.text
    assert "standard error over questions 5.0%" in page.text
    assert all(sentence in page.text for sentence in found["limits"])
    assert [chart["axis"] for chart in page.charts] == ["learned tokens", "million operations"]
    lines = [line for chart in page.charts for line in chart["lines"]]
    assert [line["label"] for line in lines] == 2 * ["embedding", "cross", "hybrid"]
    for line in lines:
        assert len(line["x"]) == len(line["y"]) == len(line["low"]) == len(line["high"]) > 1
        for low, mean, high in zip(line["low"], line["y"], line["high"], strict=True):
            assert low - 1e-6 <= mean <= high + 1e-6
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links == []
    assert "@import" not in text
    assert "url(" not in text


def test_the_limits_follow_from_what_was_run(figures: tuple[Comparison, dict[str, Any]]) -> None:
    limits = " ".join(figures[1]["limits"])
    for words in (
        "trained on emoji for 201 learned tokens",
        "95% Student t intervals of the mean over 3 seeds (2.48 standard deviations",
        "vision and decoder start with the same bits in every variant; connector differs",
        "same samples in the same order, cut into the same batches",
        "not tuned for any of them",
        "a machine, fp32",
    ):
        assert words in limits


def test_sets_of_documents_and_of_choices_have_what_they_have(read: Read) -> None:
    comparison, trials = planned(read, "compare.seeds=[1, 2]")
    for number, trial in enumerate(trials):
        documents = PerplexityResult(2.0 + number, 0.3, 7.4, 1.5, tokens=90, bytes=200, n=9)
        choices = ChoiceResult(0.5, 0.25, 100, "right choice among 4", 0.05, {"none": 0.5})
        written = GenerationResult(1.5 + number / 10, 30, "CIDEr", 0.2)
        heard = GenerationResult(1.5, 30, "CIDEr", 0.2, control=0.5, chance=0.4, control_error=0.1)
        pretend(trial.config, more={"documents": documents, "choices": choices, "written": written, "heard": heard})
    cross = write_comparison(comparison, trials, [])["variants"][1]["heldout"]
    assert cross["documents"]["score"] is None
    assert cross["documents"]["loss"]["mean"]["mean"] == pytest.approx(4.5)
    assert cross["documents"]["loss"]["difference"]["mean"] == pytest.approx(1)
    assert cross["documents"]["loss"]["asked_error"] == pytest.approx(0.3)
    assert (cross["choices"]["loss"], cross["choices"]["control"]) == (None, None)
    assert cross["choices"]["score"]["asked_error"] == pytest.approx(0.05)
    text = Page(comparison.page_path.read_text()).text
    assert cross["written"]["score"]["mean"]["mean"] == pytest.approx(1.75)
    assert cross["written"]["score"]["asked_error"] == pytest.approx(0.2)
    assert (cross["written"]["chance"], cross["written"]["control"]) == (None, None)
    assert cross["heard"]["score"]["asked_error"] == pytest.approx(0.2), "CIDEr is no share, so not binomial"
    assert "documents: loss choices: accuracy written: CIDEr heard: CIDEr" in text
    assert "answers permuted 50.0" in text
    assert " 175.0 " in text
    assert "right choice among 4 · 100 samples" in text


def test_the_limits_of_one_seed_and_of_unlike_batches(read: Read) -> None:
    words = ("data.packing={max_tokens: 64}", "compare.variants.2.overrides=[stages.0.clip=0.5]")
    comparison, trials = planned(read, *words)
    for trial in trials:
        pretend(trial.config)
    limits = " ".join(write_comparison(comparison, trials, [])["limits"])
    assert "One seed: there are no intervals" in limits
    assert "Batches are not the same: those of cross, hybrid differ" in limits
    assert "Learning rates or optimizers differ" in limits


def test_a_comparison_that_has_just_begun_has_a_page(read: Read) -> None:
    comparison, trials = planned(read)
    write_comparison(comparison, trials, [])
    assert "No run is finished yet" in Page(comparison.page_path.read_text()).text


def test_hostile_overrides_stay_text(read: Read) -> None:
    word = json.dumps(f"data.datasets.0.template.prompts=[{json.dumps(HOSTILE.replace('{', '').replace('}', ''))}]")
    comparison, trials = planned(read, f"compare.variants.0.overrides=[{word}]")
    write_comparison(comparison, trials, [])
    page = Page(comparison.page_path.read_text())
    assert page.runs_its_own_script_alone()
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize(("codes", "exit_code"), [({}, 0), ({"cross-1": 2}, 1), ({"cross-1": 75}, 75)])
def test_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    codes: dict[str, int],
    exit_code: int,
) -> None:
    starts, worlds = Starts(codes), []

    def launch(words: list[str], ranks: int, run_dir: Path, stdout: int) -> int:
        worlds.append((words[0], ranks, stdout))
        return starts(Path(words[1]), run_dir)

    monkeypatch.setattr("launchers.local.launch", launch)
    words = ["compare", str(TINY), f"run_dir={tmp_path}", "--ranks", "2", "--json"]
    assert main.main(words) == exit_code
    out, _ = capfd.readouterr()
    assert set(worlds) == {("train", 2, 2)}
    if exit_code != 75:
        assert [failed["variant"] for failed in json.loads(out)["failed"]] == [name.split("-")[0] for name in codes]


def test_the_plan_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.main(["compare", str(TINY), f"run_dir={tmp_path}", "--plan", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert list(plan) == ["embedding, seed 1", "cross, seed 1", "hybrid, seed 1"]
    assert plan["cross, seed 1"]["stages"]["all"]["steps"] == 6
    assert not (tmp_path / "cross").exists()
    files = sorted(path.name for path in (tmp_path / "configs").iterdir())
    assert files == ["cross-seed-1.yaml", "embedding-seed-1.yaml", "hybrid-seed-1.yaml"]
