"""Recipes of published systems state for each value whether it was published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.configs.files import RECIPES, name_of

PUBLISHED = [path for path in RECIPES if not path.stem.startswith("emoji")]
_KEYS = (
    r"lanes|weight|kind: (?:native|longest_side|padded|tiles|fixed)|tiling|max_\w+|min_\w+|longest|size|packing|order"
)
_STAGE = r"steps|train|learning_rate|warmup_steps|schedule|optimizer|clip|z_loss|ema|min_learning_rate"
_VALUE = re.compile(rf"^\s*(?:- )?(?:{_KEYS}|{_STAGE})\b.*", re.MULTILINE)


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_every_value_has_a_comment_on_its_origin(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    unexplained = [line for line in _VALUE.findall(text) if not re.search(r"# .*(?:published|verified)", line)]
    assert not unexplained
    assert "base: " in text.split("model:")[0] or '"published"' in text  # The header explains the word.
