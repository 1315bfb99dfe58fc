from __future__ import annotations

import re

import pytest

from tests.path_of_a_pair import REPO, path_of_a_pair


@pytest.mark.slow
def test_the_path_is_no_longer_than_the_documented_one() -> None:
    text = (REPO / "docs" / "architecture.md").read_text()
    quoted = re.search(r"^(\d+) files, (\d+) functions$", text, re.MULTILINE)
    assert quoted is not None
    path = path_of_a_pair()
    assert {"mmscale/run/train.py:_train_stage", "mmscale/engine/engine.py:Engine.train_step"} <= set(path)
    files = {name.partition(":")[0] for name in path}
    assert (len(files), len(path)) <= (int(quoted[1]), int(quoted[2]))
    assert len(path) <= int(quoted[2])
