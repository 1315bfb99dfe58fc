"""Record how the newest start of a run ended.

    RUN/starts/outcome.json    removed when a start takes the folder, written by rank 0 when the start ends

If no process holds the folder and the file is missing, the run was killed or its machine failed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.io.strict import StrictConfig
from data_pipeline.io.untrusted import read_bytes

OUTCOME_FILE = "starts/outcome.json"
_MOST_LETTERS = 2000
_MOST_BYTES = 1 << 16


class RunOutcome(StrictConfig):
    """How a start ended.

    Attributes:
        outcome: ``finished``, ``stopped`` (on a request, and saved) or ``failed``.
        message: Reason of a stop, or the error message.
    """

    outcome: Literal["finished", "stopped", "failed"]
    message: str = Field(max_length=_MOST_LETTERS)


@contextmanager
def recorded_outcome(run_dir: Path, is_main: bool) -> Iterator[list[RunOutcome]]:
    """Record the outcome that the caller appends to the list, or the error that ends the block.

    Call it while the folder is held. Only rank 0 (``is_main``) writes. A file that cannot be written is left out.
    """
    path = run_dir / OUTCOME_FILE
    outcomes: list[RunOutcome] = []
    if is_main:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    try:
        yield outcomes
    except BaseException as error:
        text = str(error).strip() or type(error).__name__
        outcomes.append(RunOutcome(outcome="failed", message=text[:_MOST_LETTERS]))
        raise
    finally:
        if is_main and outcomes:
            with contextlib.suppress(OSError):
                write_whole(path, as_utf8(json.dumps(outcomes[-1].model_dump()) + "\n"), parents=True)


def read_outcome(run_dir: Path) -> RunOutcome | None:
    """Return how the newest start ended; None if it is running, was killed, or the file cannot be read."""
    try:
        return RunOutcome.model_validate_json(read_bytes(run_dir / OUTCOME_FILE, most_bytes=_MOST_BYTES))
    except (OSError, ValueError, ValidationError):
        return None
