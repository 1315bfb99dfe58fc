"""``mmscale`` with slow steps: ``throttled_rank.py FILE ARGUMENTS``. FILE holds ``STEP SECONDS``.

Each step after STEP takes SECONDS longer. So a fault can take effect before the run ends. The values of the run do not
change.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mmscale.cli.main import main
from mmscale.engine.watchdog import Watchdog

brake = Path(sys.argv.pop(1))
begin_step = Watchdog.begin_step


def begin_step_slowly(self: Watchdog, step: int) -> None:
    begin_step(self, step)
    first, seconds = map(float, brake.read_text().split())
    if step > first:
        time.sleep(seconds)


Watchdog.begin_step = begin_step_slowly  # type: ignore[method-assign]
sys.exit(main())
