"""A resume also restores buffers and each rank's random state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.resume]


def test_buffers_and_generators_are_those_that_were_saved(tmp_path: Path) -> None:
    program = "tests.checkpoint.restored_programs:save_and_resume"
    (alone,) = run_ranks(program, 1, {"folder": str(tmp_path / "one")})
    two = run_ranks(program, 2, {"folder": str(tmp_path / "two"), "other": alone["path"]})
    for answer in (alone, *two):
        assert any(name.endswith("bias_steps") for name in answer["saved"])
        assert all(answer["fresh"][name] != values for name, values in answer["saved"].items())
        assert answer["resumed"] == answer["warm"] == answer["saved"]
        assert answer["drawn"] == answer["next"]
        assert answer["counts"] == [3, 30, 3, {"note": "x"}, 3]
    assert two[0]["next"] != two[1]["next"]
    assert two[0]["drawn of other"] == alone["next"]
    # The second rank did not exist when the checkpoint was saved.
    torch.manual_seed(8)
    assert two[1]["drawn of other"] == torch.rand(4).tolist()
