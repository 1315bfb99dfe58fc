"""Names and data of a harness's tasks: errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmscale.errors import ConfigError, MMScaleError

T = TypeVar("T")


def require_tasks(tasks: Sequence[str], known: Sequence[str], harness: str) -> None:
    """Check that all tasks exist.

    Raises:
        ConfigError: one does not; the error gives similar names.
    """
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"; similar: {', '.join(near)}" if near else ""
            raise ConfigError(f"{harness} has no task {task!r}{hint}; --include-path adds a folder of task files")


def loading_errors(tasks: Sequence[str], call: Callable[[], T]) -> T:
    """Return ``call()``.

    Raises:
        MMScaleError: the data of a task cannot be loaded, for example without a network.
    """
    try:
        return call()
    except OSError as error:
        raise MMScaleError(f"tasks {', '.join(tasks)}: {error}") from error
