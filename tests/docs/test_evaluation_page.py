"""The sets and the comparison of docs/evaluation.md are legal, and the sets accept the page's sample."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from data_pipeline.sample import Provenance, Sample
from mmscale.compare.config import CompareConfig
from mmscale.evaluate import ChoiceSet, EvaluationConfig
from mmscale.evaluate.choice import make_question

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "evaluation.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
SETS = [block["evaluation"] for block in BLOCKS if "evaluation" in block]


@pytest.mark.parametrize("block", SETS, ids=lambda block: block["sets"][0]["name"])
def test_set(block: dict[str, object]) -> None:
    (held,) = EvaluationConfig.model_validate(block).sets
    assert (REPO / held.manifest).is_file()
    if isinstance(held, ChoiceSet):
        (row,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        question = make_question(Sample((), json.loads(row), Provenance("d", "s", "k", 0)), held)
        assert (len(question.choices), question.right) == (3, 1)


def test_every_kind_is_shown() -> None:
    shown = {block["sets"][0].get("kind", "images") for block in SETS}
    assert shown == {"images", "choice", "perplexity", "generation", "drawings"}


def test_comparison() -> None:
    (block,) = (block for block in BLOCKS if "compare" in block)
    names = [variant.name for variant in CompareConfig.model_validate(block["compare"]).variants]
    assert names == ["embedding", "cross_attention"]
