"""Arguments that all commands of ``mmscale launch`` share, and the checks before a start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mmscale.config import Loaded
    from mmscale.run.config import RunConfig

CONFIG = typer.Argument(help="A run's YAML file.", metavar="CONFIG")
OVERRIDES = typer.Argument(
    None, help="Values that override the file's, for example max_steps=50.", metavar="[KEY=VALUE]..."
)


def checked(config: Path, overrides: list[str], ranks: int) -> Loaded[RunConfig]:
    """Load the configuration and check it as each rank would, so that an error is printed once, before the start."""
    from mmscale.cli.run_file import load_run
    from mmscale.run.config import check_world
    from mmscale.run.stage_weights import check_initial_weights

    loaded = load_run(config, overrides)
    check_world(loaded.value, ranks)
    check_initial_weights(loaded)
    return loaded


def train_words(config: Path, overrides: list[str]) -> list[str]:
    """Return the command line of each rank."""
    from data_pipeline.io.trusted_code import ALLOW_FLAG, allow_commands

    return [*([ALLOW_FLAG] if allow_commands.get() else []), "train", str(config), *overrides]
