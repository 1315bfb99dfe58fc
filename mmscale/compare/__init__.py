"""Compare variants of one run that get the same data and the same budget: ``mmscale compare``.

    config --> plan --> runs --> summary, limits --> page

Use it to see which connector (or any other choice) does better for the same tokens or the same operations. It does not
search for good values: every variant is trained exactly as configured.
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
