"""Program of two ranks for the text families: it trains one run after the other in one process group."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from mmscale.config import load
from mmscale.dist import World
from mmscale.run.config import RunConfig
from mmscale.run.train import train
from tests.engine.ranks import barrier


def train_all(world: World, files: list[str]) -> None:
    """Train each run."""
    # ``train`` leaves the process group at its end; here the next run needs it. DeepSpeed collects garbage for every
    # engine, which takes longer than to make the engine.
    no_report = mock.patch("mmscale.run.finalize.build_report", return_value="no report")
    with mock.patch("mmscale.run.train.shutdown"), mock.patch("gc.collect", return_value=0), no_report:
        for file in files:
            train(load(Path(file), [], RunConfig))
            barrier(world)
