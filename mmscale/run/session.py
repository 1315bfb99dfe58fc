"""Open the parts of a run from Python: its configuration, loader and engine, or the whole training.

    config = load_config("configs/quickstart.yaml")
    with open_engine(config) as engine, open_loader(config, engine.world) as loader:
        for batch in itertools.islice(loader, 10):
            report = engine.train_step(batch.microbatches)

Use it for experiments with a loop of your own. Not for: checkpoints, logs and a resumed position, which ``train``
writes and reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.loader.loader import Loader
from mmscale.config import Loaded, load
from mmscale.config.trust import check_commands, code_allowed
from mmscale.dist import World, init_distributed, shutdown
from mmscale.engine.engine import Engine
from mmscale.objectives.choice import choose_objective
from mmscale.run.config import RunConfig
from mmscale.run.folder import CONFIG
from mmscale.run.train import Outcome, build
from mmscale.run.train import train as run_train


def load_config(path: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> RunConfig:
    """Return the validated configuration of a run.

    Args:
        path: A run's YAML file, or a run folder, whose ``config.yaml`` is read.
        overrides: ``key=value`` words, as on the command line.
        allow_code: Whether a file in a run folder may name shell commands and Python code. If not, such a file is an
            error.

    Raises:
        ConfigError: the file or an override is wrong; the message names file, line, key and value.
    """
    return _load(path, overrides, allow_code).value


def _load(path: str | Path, overrides: Sequence[str], allow_code: bool) -> Loaded[RunConfig]:
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    with code_allowed(allow_code):
        loaded = load(file, list(overrides), RunConfig)
        check_commands(loaded)
    return loaded


def open_loader(config: RunConfig, world: World | None = None, *, stage: int = 0) -> Loader:
    """Open the batches of a stage from its first step. Close the loader, or use it as a context manager.

    Args:
        config: The run.
        world: The rank whose lanes are read; None for a process that works alone.
        stage: Number of the stage, from 0.

    Raises:
        DataPipelineError: the data cannot be opened.
    """
    rank, world_size = (0, 1) if world is None else (world.rank, world.world_size)
    return Loader(
        config.stage_data(stage),
        config.stage_media(stage),
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        micro_lanes=config.engine.micro_lanes,
    )


@contextmanager
def open_engine(config: RunConfig, *, stage: int = 0) -> Iterator[Engine]:
    """Join the ranks, build the model of a stage with initial weights, and yield it in a DeepSpeed engine.

    All ranks must call. The process is one rank: start several with ``torchrun``. A process that is one of several
    ranks can open one engine. Weights and teachers that the stage names are not loaded.

    Args:
        config: The run.
        stage: Number of the stage, from 0.

    Raises:
        LaunchError: this process cannot join the ranks.
        UnsupportedError: this machine cannot compute what the configuration requests.
    """
    world = init_distributed(config.engine)
    try:
        objective = choose_objective(config.stage_model(stage), config.stages[stage], world, ())
        engine = Engine(build(config, world, stage), objective, config.stages[stage], config.engine, world)
        try:
            yield engine
        finally:
            engine.close()
    finally:
        shutdown(world)


def train(path: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> Outcome:
    """Train a run, or resume it if its folder has a checkpoint, and write its report. All ranks must call.

    Args:
        path: As for ``load_config``.
        overrides: As for ``load_config``.
        allow_code: As for ``load_config``.

    Raises:
        MMScaleError, DataPipelineError: see ``mmscale.errors`` and ``data_pipeline.errors``.
    """
    return run_train(_load(path, overrides, allow_code))
