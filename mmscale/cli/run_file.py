"""The configuration of a run whose data a verb is about to read."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mmscale.config import Loaded
    from mmscale.run.config import RunConfig

FLAG = "--allow-commands"
ALLOW_COMMANDS = typer.Option(
    False, FLAG, help="Run the shell commands and Python code of a configuration that came with a run folder."
)
allow_commands: ContextVar[bool] = ContextVar("allow_commands", default=False)
"""Whether ``--allow-commands`` is on the command line; ``mmscale.cli.main`` sets it."""
_TRACES = (
    "checkpoints",
    "faults",
    "goodput.jsonl",
    "heartbeats",
    "ledger",
    "lock",
    "logs",
    "metrics.jsonl",
    "report.html",
    "result.json",
    "starts",
)
"""A folder with config.yaml and one of these is a run folder."""


def load_run(path: Path, overrides: list[str]) -> Loaded[RunConfig]:
    """Load the configuration of a run whose data the verb will read.

    Raises:
        ConfigError: it is wrong, or it would run a shell command or Python code that came with a run folder.
    """
    from mmscale.config import load
    from mmscale.run.config import RunConfig

    loaded = load(path, overrides, RunConfig)
    check_commands(loaded)
    return loaded


def check_commands(loaded: Loaded[Any]) -> None:
    """Refuse shell commands and Python code that came with a run folder, unless ``--allow-commands`` is given.

    A run folder is data that people pass on; its files, and the ``base`` files that they name, must not run code on the
    reader's machine. Code in other files and in overrides are the user's own.

    Raises:
        ConfigError: names the first such code and its place.
    """
    from mmscale.config import leaves
    from mmscale.errors import ConfigError

    if allow_commands.get():
        return
    for key, value in leaves(loaded.value):
        name = ".".join(key)
        found = _code_in(key, value)
        origin = loaded.origins[name]
        folder = next(filter(None, map(_run_folder_of, origin.files)), None) if found else None
        if folder is not None:
            raise ConfigError(
                f"{origin} {name}: this configuration came with the run folder {folder} and would run the "
                f"{found[0]}. If you trust it, call `mmscale {FLAG} ...`, or name a copy of the file that "
                "lies elsewhere"
            )


def _code_in(key: tuple[str, ...], value: Any) -> list[str]:
    """The shell commands and the Python code that a value of a data set names, as messages call them."""
    from data_pipeline.loader.front_to_back import commands

    if "shards" in key and isinstance(value, list):
        return [f"shell command {command!r}" for command in commands(value)]
    if "datasets" in key and key[-1] in ("pipeline", "stages") and value:
        return [f"Python code {path!r}" for path in ([value] if isinstance(value, str) else value)]
    return []


def _run_folder_of(file: Path) -> Path | None:
    """The run folder that holds the file, itself or in a folder of its own such as ``starts/``."""
    from mmscale.report.starts import STARTS_FILE
    from mmscale.run.folder import CONFIG

    for place in (file.parent.resolve(), file.resolve().parent):  # A link stands in the one and leads to the other.
        for folder in (place, place.parent):
            has_trace = any((folder / name).exists() for name in _TRACES)
            if (folder / STARTS_FILE).exists() or ((folder / CONFIG).exists() and has_trace):
                return folder
    return None
