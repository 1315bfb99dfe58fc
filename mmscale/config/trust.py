"""Decide whether the Python code that a configuration names may be imported.

People share run folders. Files in a run folder, and the ``base`` files that they name, must therefore not run code on
the reader's machine. Code that another file or an override names is the user's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.io.own_code import KIND
from data_pipeline.io.trusted_code import ALLOW_FLAG, allow_commands, is_import_path, trust
from mmscale.config.tree import ConfigNode, Origin
from mmscale.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.config.load import Loaded

_CONFIG = "config.yaml"
STARTS_FILE = "starts/starts.jsonl"
"""File of a run folder with a line for each start of the run (``mmscale.report.starts``)."""
_RUN_OUTPUTS = (
    "checkpoints",
    "faults",
    "goodput.jsonl",
    "heartbeats",
    "sample_log",
    "lock",
    "logs",
    "metrics.jsonl",
    "report.html",
    "result.json",
    "starts",
    "trackers",
)
"""A folder with config.yaml and one of these is a run folder."""


@contextmanager
def code_allowed(allowed: bool) -> Iterator[None]:
    """Allow code from run folders within the context, if ``allowed``. Otherwise change nothing."""
    token = allow_commands.set(allowed or allow_commands.get())
    try:
        yield
    finally:
        allow_commands.reset(token)


def trust_own_kinds(root: ConfigNode) -> None:
    """Trust every ``kind: module:attr`` of a tree, before the tree is validated, which imports the code.

    Raises:
        ConfigError: a file in a run folder names one, and ``allow_commands`` is false.
    """
    for key, entry in _own_kinds(root, ""):
        reject_code(entry.origin, key, f"Python code {entry.value!r}")
        trust(str(entry.value))


def _own_kinds(entry: ConfigNode, path: str) -> Iterator[tuple[str, ConfigNode]]:
    """Yield path and entry of each ``kind: module:attr``."""
    if isinstance(entry.value, dict):
        children = list(entry.value.items())
    elif isinstance(entry.value, list):
        children = [(str(number), item) for number, item in enumerate(entry.value)]
    else:
        return
    for key, child in children:
        place = f"{path}.{key}" if path else key
        if key == KIND and is_import_path(child.value):
            yield place, child
        yield from _own_kinds(child, place)


def check_commands(loaded: Loaded[Any]) -> None:
    """Reject shell commands and Python code of data sets that came with a run folder, unless they are allowed.

    Call it before the data of a configuration are read.

    Raises:
        ConfigError: a value in a run folder's file would run code; the error names the value and the file.
    """
    from mmscale.config.load import leaves

    for key, value in leaves(loaded.value):
        name = ".".join(key)
        for found in _code_in(key, value)[:1]:
            reject_code(loaded.origins[name], name, found)


def _code_in(key: tuple[str, ...], value: Any) -> list[str]:
    """Return a description of each shell command and each piece of Python code that the value of a data set runs."""
    from data_pipeline.loader.front_to_back import commands

    if "shards" in key and isinstance(value, list):
        return [f"shell command {command!r}" for command in commands(value)]
    if "datasets" in key and key[-1] in ("pipeline", "stages") and value:
        return [f"Python code {path!r}" for path in ([value] if isinstance(value, str) else value)]
    return []


def reject_code(origin: Origin, key: str, code: str) -> None:
    """Raise ConfigError if ``code``, which a value would run, came with a run folder. ``allow_commands`` permits it."""
    folder = None if allow_commands.get() else next(filter(None, map(_run_folder_of, origin.files)), None)
    if folder is not None:
        raise ConfigError(
            f"{origin} {key}: this configuration came with the run folder {folder} and would run the {code}. If you "
            f"trust it, call `mmscale {ALLOW_FLAG} ...` (from Python: allow_code=True), or use a copy of the file "
            "outside of the run folder"
        )


def _run_folder_of(file: Path) -> Path | None:
    """Return the run folder that contains the file, directly or in a subfolder such as ``starts/``; None if none."""
    for parent in (file.parent.resolve(), file.resolve().parent):  # The folder of a link, and that of its target.
        for folder in (parent, parent.parent):
            has_output = any((folder / name).exists() for name in _RUN_OUTPUTS)
            if (folder / STARTS_FILE).exists() or ((folder / _CONFIG).exists() and has_output):
                return folder
    return None
