"""A comparison of image tokenizers is planned, and the commands that need a decoder of text refuse one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmscale.cli.main import main
from mmscale.compare import plan_trials, read_comparison
from mmscale.compare.start import init_rules
from tests.compare.test_plan import by_variant, counted, run_of

RECIPE = Path("configs/recipes/emoji-vq.yaml")


def test_two_tokenizers_train_for_equal_operations(tmp_path: Path) -> None:
    variants = {"whole": [], "small": ["model.image_tokenizer.base_dim=8", "model.image_tokenizer.norm_groups=4"]}
    file = tmp_path / "compare.yaml"
    block = {"base": str(RECIPE.resolve()), "run_dir": str(tmp_path / "runs")}
    named = [{"name": name, "overrides": each} for name, each in variants.items()]
    compare = {"seeds": [3], "equal": "flops", "variants": named}
    file.write_text(yaml.safe_dump({**block, "compare": compare}))
    comparison = read_comparison(
        file,
        [
            "stages.0.steps=2",
            "stages.0.warmup_steps=1",
            "data.workers=0",
            "data.lanes=1",
            "data.packing.max_documents=2",
        ],
    )
    trials = by_variant(plan_trials(comparison), 3)
    budget = sum(step[2] for step in counted(run_of(comparison, "whole"), 3, 0, 2))
    real = counted(run_of(comparison, "small"), 3, 0, trials["small"].stages[0].steps)
    assert sum(step[2] for step in real[:-1]) < budget <= sum(step[2] for step in real)
    assert init_rules(run_of(comparison, "small")).keys() == {"encoder", "codebook", "decoder"}


def test_commands_that_need_a_decoder_of_text_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPE), "--nodes", "1", "--gpus-per-node", "1", "--gpu", "h100"]) == 2
    assert "this command needs a model with a decoder of text; an image tokenizer" in capsys.readouterr().err
    assert main(["eval", str(RECIPE)]) == 2
    assert "evaluation.sets is empty: there is nothing to score" in capsys.readouterr().err
