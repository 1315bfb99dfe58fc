"""When a run is scored, which step is the best, and when it ends early: the decisions without a model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mmscale.checkpoint import TrainState
from mmscale.config import load
from mmscale.dist import World
from mmscale.errors import CheckpointError, ConfigError
from mmscale.evaluate import BestConfig
from mmscale.evaluate.result import HeldOutResult, PerplexityResult
from mmscale.metrics.run_log import NullLog
from mmscale.run import evaluation
from mmscale.run.config import RunConfig
from mmscale.run.evaluation import Evaluations
from tests.checkpoint.toy_checkpoint import make_checkpoint

TINY = Path(__file__).parents[1] / "system/tiny.yaml"
PAGES = {"name": "pages", "kind": "perplexity", "manifest": "pages.manifest", "template": {"kind": "text"}}
STYLE = {"name": "style", "manifest": "style.manifest", "field": "name", "limit": 100}
WORLD = World(0, 1, 0, torch.device("cpu"))


def run_config(folder: Path, *words: str, **changes: Any) -> RunConfig:
    block = {"sets": [PAGES, STYLE], "every_steps": 2, "best": {"metric": "pages.loss"}, **changes}
    override = f"evaluation={yaml.safe_dump(block, default_flow_style=True, width=10**6).strip()}"
    return load(TINY, [f"run_dir={folder}", override, *words], RunConfig).value


class Notes(NullLog):
    """Keeps the lines and the values that a log gets."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[int, dict[str, float]] = {}

    def print_line(self, text: str) -> None:
        self.lines.append(text)

    def amend(self, step: int, values: Any) -> None:
        self.values[step] = dict(values)


def pages(loss: float) -> PerplexityResult:
    return PerplexityResult(loss=loss, error=0.1, perplexity=2.0, bits_per_byte=None, tokens=3, bytes=0, n=2)


class Scorer:
    """Evaluations whose results come from a list of losses of the set ``pages``."""

    def __init__(self, config: RunConfig, state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.losses, self.state = Notes(), list[float](), state
        monkeypatch.setattr(evaluation, "score_sets", lambda *arguments: self._results())
        self.evaluations = Evaluations(config, WORLD, self.log, state, config.run_dir / "checkpoints")
        self.engine: Any = SimpleNamespace(
            inference=lambda ema: nullcontext(), stage=SimpleNamespace(ema=None, name="pretrain"), world=WORLD
        )

    def _results(self) -> dict[str, HeldOutResult]:
        return {"pages": pages(self.losses.pop(0))}

    def run(self, step: int, loss: float, stage: int = 0) -> bool:
        self.losses.append(loss)
        self.state = replace(self.state, step=step, stage_step=step, stage_index=stage)
        is_best = self.evaluations.run(self.engine, self.state)
        self.state = replace(self.state, extra=self.evaluations.extra_state())
        return is_best


def test_a_step_is_scored_once_and_the_lowest_loss_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(run_config(tmp_path), TrainState(), monkeypatch)
    due = scorer.evaluations.is_due
    assert [step for step in range(7) if due(TrainState(step=step))] == [2, 4, 6]
    assert scorer.run(2, math.nan) is False, "NaN is not a best value"
    assert [scorer.run(step, loss) for step, loss in ((4, 3.0), (6, 3.0), (8, 2.9), (10, math.nan))] == [
        *(True, False, True, False)
    ]
    assert not due(TrainState(step=10))
    assert scorer.log.values[8] == {"heldout/pages/loss": 2.9, "heldout/pages/error": 0.1}
    best = scorer.evaluations.best
    assert best is not None
    assert (best.step, best.value) == (8, 2.9)


def test_min_delta_decides_what_improves() -> None:
    low, high = BestConfig(metric="a.b.loss", min_delta=0.5), BestConfig(metric="a.score", min_delta=0.25)
    assert (low.set, low.value) == ("a.b", "loss")
    assert [low.improves(value, 2.0) for value in (1.5, 1.49, 2.6, math.nan)] == [False, True, False, False]
    assert [high.improves(value, 0.5) for value in (0.75, 0.76, 0.2, math.nan)] == [False, True, False, False]
    assert not high.improves(math.inf, None)


def test_only_evaluations_of_the_last_stage_count_towards_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = "stages=[{name: first, steps: 20}, {name: second, steps: 20}]"
    config = run_config(tmp_path, stages, best={"metric": "pages.loss", "stop_after": 2})
    scorer = Scorer(config, TrainState(), monkeypatch)
    for step in (2, 4, 6, 8):
        scorer.run(step, 1.0 + step)
        assert scorer.evaluations.end_reason(scorer.state) is None
    scorer.run(22, 9.0, stage=1)
    assert scorer.evaluations.end_reason(scorer.state) is None
    scorer.run(24, 2.5, stage=1)  # Better than 3.0 of the first stage.
    scorer.run(26, 2.5, stage=1)
    scorer.run(28, 2.5, stage=1)
    reason = scorer.evaluations.end_reason(scorer.state)
    assert reason is not None
    assert "did not improve in 2 evaluations" in reason
    assert "2.5 at step 24" in reason
    assert scorer.evaluations.end_reason(replace(scorer.state, step=40)) is None, "the run has no step left to skip"


def test_a_restart_goes_on_with_the_best_if_its_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, checkpoints = run_config(tmp_path), tmp_path / "checkpoints"
    scorer = Scorer(config, TrainState(), monkeypatch)
    scorer.run(2, 3.0)
    scorer.run(4, 4.0)
    saved = scorer.state
    lost = Scorer(config, saved, monkeypatch)
    assert lost.evaluations.best is None
    assert "step-00000002 is missing; the best checkpoint is chosen anew" in lost.log.lines[0]
    make_checkpoint(checkpoints, step=2)
    again = Scorer(config, saved, monkeypatch)
    assert again.evaluations.best == scorer.evaluations.best
    assert (checkpoints / "best").resolve() == (checkpoints / "step-00000002").resolve()
    assert not again.run(6, 3.5)
    changed = Scorer(run_config(tmp_path, during={"limit": 9}), saved, monkeypatch)
    assert changed.evaluations.best is None, "values of fewer samples cannot be compared"
    assert not (checkpoints / "best").is_symlink()
    other = Scorer(run_config(tmp_path, best={"metric": "style.score"}), saved, monkeypatch)
    assert other.evaluations.best is None
    with pytest.raises(CheckpointError, match="the best evaluation is damaged: value"):
        Scorer(config, replace(saved, extra={"best": saved.extra["best"] | {"value": "x"}}), monkeypatch)


def test_a_folder_named_best_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints/best/mine").mkdir(parents=True)
    Scorer(run_config(tmp_path), TrainState(), monkeypatch)
    assert (tmp_path / "checkpoints/best/mine").is_dir()


def test_a_step_that_a_stop_request_left_unscored_is_scored_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(run_config(tmp_path), TrainState(), monkeypatch)
    scorer.run(2, 3.0)
    stopped = TrainState(step=4, extra=scorer.state.extra)
    assert Scorer(run_config(tmp_path), stopped, monkeypatch).evaluations.is_due(stopped)
    assert not Scorer(run_config(tmp_path), scorer.state, monkeypatch).evaluations.is_due(scorer.state)


def test_results_of_whole_sets_are_not_computed_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = Scorer(run_config(tmp_path, during={"limit": 50}), TrainState(), monkeypatch)
    limited.run(2, 3.0)
    assert limited.evaluations.known(limited.state) == {}
    whole = Scorer(run_config(tmp_path, during={"limit": None}), TrainState(), monkeypatch)
    whole.run(2, 3.0)
    assert whole.evaluations.known(whole.state) == {"pages": pages(3.0)}
    assert whole.evaluations.known(TrainState(step=3)) == {}


def test_the_smaller_limit_applies_during_training(tmp_path: Path) -> None:
    def limits(**during: Any) -> list[tuple[str, int | None]]:
        block = run_config(tmp_path, during=during, best=None).evaluation.during_training
        return [(held.name, held.limit) for held in block.sets]

    assert limits() == [("pages", 256), ("style", 100)]
    assert limits(limit=20) == [("pages", 20), ("style", 20)]
    assert limits(limit=None, sets=["style"]) == [("style", 100)]
    assert limits(limit=None) == [("pages", None), ("style", 100)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best": {"metric": "pages.score"}}, r"pages\.score: not a value of a set; known here: pages\.loss, pages\."),
        ({"best": {"metric": "loss"}}, "known here: pages.loss, pages.bits_per_byte, style.score, style.loss"),
        ({"during": {"sets": ["style"]}}, "pages.loss: not a value of a set; known here: style.score, style.loss"),
        ({"during": {"sets": ["stile"]}}, r"during.sets names \['stile'\]; the sets are \['pages', 'style'\]"),
        ({"every_steps": None}, "best: set every_steps too"),
        ({"sets": [], "best": None}, "every_steps=2: there is no set to score"),
        ({"best": {"metric": "pages.loss", "min_delta": -1}}, "min_delta=-1: must be at least 0"),
        ({"best": {"metric": "pages.loss", "stop_after": 0}}, "stop_after=0: must be at least 1"),
    ],
    ids=str,
)
def test_a_mistake_in_the_block_is_found_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, **changes)
