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
    assert {"mmscale/run/train.py:_next_batch", "mmscale/engine/engine.py:Engine.train_step"} <= set(path)
    files = {name.partition(":")[0] for name in path}
    # Polls go by the clock: in one of the two runs they may add a few functions.
    assert len(files) <= int(quoted[1]) + 1
    assert len(path) <= int(quoted[2]) + 4
