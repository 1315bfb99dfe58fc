"""The sets of docs/evaluation.md are legal, and take the samples that stand above them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from data_pipeline.sample import Provenance, Sample
from mmscale.evaluate import ChoiceSet, EvaluationConfig
from mmscale.evaluate.choice import question_of

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "evaluation.md").read_text()
SETS = [
    yaml.safe_load(block)["evaluation"] for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("block", SETS, ids=lambda block: block["sets"][0]["name"])
def test_set(block: dict[str, object]) -> None:
    (held,) = EvaluationConfig.model_validate(block).sets
    assert (REPO / held.manifest).is_file()
    if isinstance(held, ChoiceSet):
        (row,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        question = question_of(Sample((), json.loads(row), Provenance("d", "s", "k", 0)), held)
        assert (len(question.choices), question.right) == (3, 1)


def test_every_kind_is_shown() -> None:
    assert {block["sets"][0].get("kind", "images") for block in SETS} == {"images", "choice", "perplexity"}
