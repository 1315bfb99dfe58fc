"""Load a run's configuration for a command that reads its data, without running code from a run folder."""

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
    False, FLAG, help="Allow the shell commands and Python code of a configuration that came with a run folder."
)
allow_commands: ContextVar[bool] = ContextVar("allow_commands", default=False)
"""Whether ``--allow-commands`` is on the command line; ``mmscale.cli.main`` sets it."""
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


def load_run(path: Path, overrides: list[str]) -> Loaded[RunConfig]:
    """Load the configuration of a run, for a command that reads the run's data.

    Raises:
        ConfigError: the configuration is invalid, has no stage or no data set, or fails ``check_commands``.
    """
    from mmscale.config import load
    from mmscale.run.config import RunConfig, require_training

    loaded = load(path, overrides, RunConfig)
    require_training(loaded.value)
    check_commands(loaded)
    return loaded


def check_commands(loaded: Loaded[Any]) -> None:
    """Reject shell commands and Python code that came with a run folder, unless ``--allow-commands`` is given.

    People share run folders, so files in a run folder, and the ``base`` files that they name, must not run code on the
    reader's machine. Code in other files, or given as an override, is the user's own.

    Raises:
        ConfigError: a value in a run folder's file would run code; the error names the value and the file.
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
                f"{found[0]}. If you trust it, call `mmscale {FLAG} ...`, or use a copy of the file outside of "
                "the run folder"
            )


def _code_in(key: tuple[str, ...], value: Any) -> list[str]:
    """Return a description of each shell command and each piece of Python code that a value would run."""
    from data_pipeline.loader.front_to_back import commands

    if "shards" in key and isinstance(value, list):
        return [f"shell command {command!r}" for command in commands(value)]
    if "datasets" in key and key[-1] in ("pipeline", "stages") and value:
        return [f"Python code {path!r}" for path in ([value] if isinstance(value, str) else value)]
    return []


def _run_folder_of(file: Path) -> Path | None:
    """Return the run folder that contains the file, directly or in a subfolder such as ``starts/``; None if none."""
    from mmscale.report.starts import STARTS_FILE
    from mmscale.run.folder import CONFIG

    for parent in (file.parent.resolve(), file.resolve().parent):  # The folder of a link, and that of its target.
        for folder in (parent, parent.parent):
            has_output = any((folder / name).exists() for name in _RUN_OUTPUTS)
            if (folder / STARTS_FILE).exists() or ((folder / CONFIG).exists() and has_output):
                return folder
    return None
