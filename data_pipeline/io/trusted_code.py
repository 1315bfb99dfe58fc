"""The Python code that this process may import because a configuration names it as ``module:attr``."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from contextvars import ContextVar
from typing import Any

ALLOW_FLAG = "--allow-commands"
allow_commands: ContextVar[bool] = ContextVar("allow_commands", default=False)
"""Whether code from run folders may run: ``--allow-commands`` on the command line, ``allow_code=True`` from Python."""

_trusted: set[str] = set()


def is_import_path(value: Any) -> bool:
    """Return whether a ``kind`` is the path of Python code, ``module:attr``."""
    return isinstance(value, str) and ":" in value


def trust(path: str) -> None:
    """Allow this process to import ``module:attr`` as a part of a configuration."""
    _trusted.add(path)


def is_trusted(path: str) -> bool:
    """Return whether ``trust`` was called with this path."""
    return path in _trusted


def import_attribute(path: str) -> Any:
    """Return the object ``module:attr``. Appends the working directory to ``sys.path``.

    Raises:
        Exception: whatever the import raises, ImportError and AttributeError included.
    """
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return operator.attrgetter(attribute)(importlib.import_module(module))
