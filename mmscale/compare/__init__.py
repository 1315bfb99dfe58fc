"""Variants of one run trained from one start, on the same data, on equal terms: ``mmscale compare``.

    config --> plan --> runs --> figures, limits --> page

For: which connector (or any other choice) does better for the same tokens or the same operations. Not for: searching
for good values; every variant is trained as it is written.
"""

from mmscale.compare.config import Comparison, check_comparison, read_comparison
from mmscale.compare.page import write_comparison
from mmscale.compare.plan import Trial, plan_trials
from mmscale.compare.runs import Stopped, prepare, run_trials

__all__ = [
    "Comparison",
    "Stopped",
    "Trial",
    "check_comparison",
    "plan_trials",
    "prepare",
    "read_comparison",
    "run_trials",
    "write_comparison",
]
