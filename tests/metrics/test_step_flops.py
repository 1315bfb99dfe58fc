"""``hardware_flops`` of a whole step against torch's counter: two forward passes where the objective needs them."""

from __future__ import annotations

import pytest

from tests.engine.ranks import run_ranks


def test_hardware_operations_of_a_step_are_those_that_torch_counts() -> None:
    for name, (told, counted) in run_ranks("tests.metrics.flops_programs:operations", 1, {})[0].items():
        assert told == pytest.approx(counted, rel=0.01), name
