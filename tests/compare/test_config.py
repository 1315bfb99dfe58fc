"""A comparison is valid as a whole, or an error names each wrong variant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmscale.compare import check_comparison, plan_trials, read_comparison
from mmscale.compare.config import EqualBudget
from mmscale.errors import ConfigError
from mmscale.run.config import RunConfig
from tests.compare.conftest import REPO, TINY, Read
from tests.evaluate.drawing_models import write_codes

SHIPPED = sorted((REPO / "configs/compare").glob("*.yaml"))
THIRD = "compare.variants.2.overrides"


@pytest.mark.parametrize("path", [*SHIPPED, TINY], ids=lambda path: path.name)
def test_shipped_comparisons_are_legal_and_fair(path: Path, tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "compare.plan_steps=1", "compare.seeds=[1]"]
    if path.name == "emoji-draw.yaml":  # Its codes, tokenizer and classifier come from runs before it.
        codes = write_codes(tmp_path / "codes", rows=8, columns=8)
        words += [f"data.datasets.0.manifest={codes}", "stages.0.weights=[]", "evaluation.sets=[]"]
    comparison = read_comparison(path, words)
    check_comparison(comparison, ranks=2)
    first, *others = plan_trials(comparison)
    runs = [variant.run.model_dump(exclude={"run_dir"}) for variant in comparison.variants]
    assert all(run not in runs[:number] for number, run in enumerate(runs))
    for other in others:
        assert (other.parts_after is None) == (path.name != "emoji-draw.yaml"), "its variants read other data"
        for mine, theirs in zip(other.stages, first.stages, strict=True):
            if comparison.settings.equal is EqualBudget.TOKENS:
                assert (mine.steps, mine.learned_tokens) == (theirs.steps, theirs.learned_tokens)
            else:
                assert theirs.flops <= mine.flops < theirs.flops + mine.flops / mine.steps


def test_there_is_a_shipped_one() -> None:
    assert SHIPPED


def test_variants_differ_in_their_overrides_only(read: Read) -> None:
    first, cross, hybrid = (variant.run for variant in read().variants)
    assert [run.model.connector.kind for run in (first, cross, hybrid) if run.model.connector] == [
        "embedding",
        "cross_attention",
        "hybrid",
    ]
    without = {"model": {"connector"}}
    assert first.model_dump(exclude=without) == cross.model_dump(exclude=without) == hybrid.model_dump(exclude=without)


def test_a_variant_wins_over_the_command_line(read: Read) -> None:
    runs = [v.run for v in read("seed=5", "engine.zero_stage=2", f"{THIRD}=[engine.zero_stage=0]").variants]
    assert [run.engine.zero_stage for run in runs] == [2, 2, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare.variants.1.overrides=[modle.x=1]", f"{THIRD}=[engine.zero_stage=4]"], r"variant cross: .*'model'\?"),
        (
            ["compare.variants.1.overrides=[modle.x=1]", f"{THIRD}=[engine.zero_stage=4]"],
            r"variant hybrid: .*zero_stage=4",
        ),
        ([f"{THIRD}=[run_dir=elsewhere]"], r"variant hybrid: run_dir=elsewhere"),
        (["max_steps=3"], r"variant embedding: max_steps=3: a comparison plans the steps"),
        (
            [f"{THIRD}=[evaluation.sets.0.choices=3]"],
            r"variant hybrid: its evaluation block differs from that of embedding",
        ),
        (
            ["evaluation.every_steps=2", "evaluation.best={metric: both.score, stop_after: 3}"],
            r"variant embedding: evaluation.best.stop_after=3: all variants train for an equal budget",
        ),
        ([f"{THIRD}=[stages.0.name=other]"], r"variant hybrid: has other stages than embedding"),
        (["compare.seeds=[1, 1]"], r"compare: seeds must differ"),
        (["compare.seeds=[]"], r"compare.seeds"),
        (["compare.variants.2.name=cross"], r"compare: variants must differ"),
        (["compare.variants.2.name=a/b"], r"compare.variants.2.name=a/b"),
        (["compare.variants=[{name: alone}]"], r"compare.variants"),
        (["compare.equal=time"], r"compare.equal=time: not one of the choices; known here: tokens, flops"),
        (["compare.budget=3"], r"compare.budget=3: unknown key"),
    ],
)
def test_mistakes_are_reported_before_anything_is_done(read: Read, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_run_without_the_block_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match="no `compare` block"):
        read_comparison(REPO / "configs/quickstart.yaml", [])


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        ([f"{THIRD}=[data.datasets.0.manifest=gone.manifest]"], 1, r"variant hybrid: .*gone.manifest: no such file"),
        ([f"{THIRD}=[model.decoder.vocab_size=7]"], 1, r"variant hybrid: model.decoder.vocab_size=7"),
        (["model.vision.patch_size=4"], 1, r"(?s)variant embedding: .*variant cross: .*variant hybrid: "),
        (["data.lanes=1"], 2, r"variant embedding: world size 2 does not fit"),
        ([THIRD + "=['stages=[{name: all, steps: 6, weights: [{checkpoint: gone}]}]']"], 1, r"variant hybrid: .*gone"),
    ],
)
def test_missing_files_are_reported_before_anything_is_done(
    read: Read, words: list[str], ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_comparison(read(*words), ranks)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_the_block_is_unknown_to_a_run() -> None:
    assert "compare" not in RunConfig.model_fields
