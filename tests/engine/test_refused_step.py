"""A rejected update changes nothing at any ZeRO stage, and training continues as without its batch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.ranks import run_ranks

KINDS = [(zero, precision, 32) for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)]
KINDS += [(zero, "fp32", 8) for zero in (0, 1, 2, 3)] + [(0, "bf16", 8)]


@pytest.mark.dist
def test_a_step_that_one_rank_refuses_is_left_out_by_all() -> None:
    kinds: list[dict[str, Any]] = [
        {"zero": zero, "precision": precision, "state_bits": bits, "clip": 0.5 if zero % 2 else {"default": 0.3}}
        for zero, precision, bits in KINDS
    ]
    with_it = [kind | {"order": [0, 1, 7, 2], "refused": 2} for kind in kinds]
    without = [kind | {"order": [0, 1, 2]} for kind in kinds]
    ranks = run_ranks("tests.engine.programs:guarded", 2, {"cases": with_it + without})
    for answers in ranks:
        for refused, plain in zip(answers[: len(KINDS)], answers[len(KINDS) :], strict=True):
            assert [applied for *_, applied in refused["reports"]] == [True, True, False, True]
            assert refused["reports"][:2] + refused["reports"][3:] == plain["reports"]
            assert refused["state"] == plain["state"], "masters and moments, bit for bit"
            assert refused["steps"] == plain["steps"] == 3
            # Called once a step, with the values that the step reports.
            assert refused["asked"] == [report[:2] for report in refused["reports"]]
            assert all(0 < norm < 1e9 for _, norm in refused["asked"])
    assert [a["asked"] for a in ranks[0]] == [a["asked"] for a in ranks[1]]
