"""Load a run's configuration for a command that reads its data, without running code from a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_pipeline.io.trusted_code import ALLOW_FLAG

if TYPE_CHECKING:
    from mmscale.config import Loaded
    from mmscale.run.config import RunConfig

ALLOW_COMMANDS = typer.Option(
    False,
    ALLOW_FLAG,
    help="Allow the shell commands and Python code of a configuration that came with a run folder.",
)


def load_run(path: Path, overrides: list[str]) -> Loaded[RunConfig]:
    """Load the configuration of a run, for a command that reads the run's data.

    Raises:
        ConfigError: the configuration is invalid, has no stage or no data set, or fails ``check_commands``.
    """
    from mmscale.config import load
    from mmscale.config.trust import check_commands
    from mmscale.run.config import RunConfig, require_training

    loaded = load(path, overrides, RunConfig)
    require_training(loaded.value)
    check_commands(loaded)
    return loaded
