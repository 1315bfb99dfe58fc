"""``mmscale config``: show the origin of each value, validate a configuration, shrink a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import emit

if TYPE_CHECKING:
    from mmscale.config import Loaded
    from mmscale.run.config import RunConfig

app = typer.Typer()

_CONFIG = typer.Argument(help="A run's YAML file.", metavar="CONFIG")
_OVERRIDES = typer.Argument(
    None, help="Values that override the file's, for example stages.0.steps=50.", metavar="[KEY=VALUE]..."
)


@app.command(epilog="Example: mmscale config show configs/quickstart.yaml stages.0.steps=50")
def show(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    json: bool = typer.Option(False, "--json", help="Print one JSON object: values, origins, notes."),
) -> None:
    """Print every value and its origin: default, file and line, or override."""
    from mmscale.config import leaves, load
    from mmscale.run.config import RunConfig

    loaded = load(config, overrides or [], RunConfig)
    values = {".".join(path): value for path, value in leaves(loaded.value)}
    if json:
        origins = {path: str(origin) for path, origin in loaded.origins.items()}
        emit({"values": values, "origins": origins, "notes": list(loaded.notes)}, json=True)
        return
    rows = [(f"{path} = {_to_json(value)}", loaded.origins[path]) for path, value in values.items()]
    width = min(max(len(text) for text, _ in rows), 72)
    for text, origin in rows:
        print(f"{text:<{width}}  # {origin}")
    for note in loaded.notes:
        print(f"# {note}")


def _to_json(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


@app.command(epilog="Example: mmscale config validate configs/quickstart.yaml run_dir=runs/other")
def validate(config: Path = _CONFIG, overrides: list[str] = _OVERRIDES) -> None:
    """Check everything in a configuration that can be checked without training: values, files, data, held-out sets."""
    from mmscale.config import load
    from mmscale.run.config import RunConfig, check_files

    loaded = load(config, overrides or [], RunConfig)
    run = loaded.value
    notes = check_files(run)
    _check_sources(loaded)
    for line in notes:
        print(f"mmscale: warning: {line}", file=sys.stderr)
    lanes = min(run.stage_data(number).lanes for number in range(len(run.stages)))
    print(f"{config}: valid, for at most {lanes} rank{'s' if lanes > 1 else ''}")


def _check_sources(loaded: Loaded[RunConfig]) -> None:
    """Check the checkpoints of initial weights and of teachers."""
    run = loaded.value
    is_based = any(len(origin.files) > 1 for origin in loaded.origins.values())
    if not is_based and not any(stage.weights or stage.distill for stage in run.stages):
        return
    import torch  # These modules import the engine, so import them only if they are needed.

    from mmscale.checkpoint import TrainState, find_latest, read_state
    from mmscale.dist import World
    from mmscale.run.folder import CHECKPOINTS
    from mmscale.run.stage_teachers import check_teachers
    from mmscale.run.stage_weights import check_initial_weights, check_stage_weights

    check_initial_weights(loaded)
    latest = find_latest(run.run_dir / CHECKPOINTS)
    state = read_state(latest) if latest else TrainState()
    world = World(0, 1, 0, torch.device("cpu"))
    check_stage_weights(run, world, state)
    check_teachers(run, world, state)


@app.command(epilog="Example: mmscale config shrink configs/recipes/emoji-stages.yaml > tiny.yaml")
def shrink(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    steps: int = typer.Option(4, help="Largest number of steps of each stage.", min=1),
    lanes: int = typer.Option(2, help="Largest number of rows of the global batch.", min=1),
) -> None:
    """Print a smoke test of the run as YAML: the same stages, with a tiny model and bundled data, in seconds."""
    from mmscale.config import dump, load
    from mmscale.run.config import RunConfig, require_training
    from mmscale.shrink.run import dropped_settings, shrink_run

    run = load(config, overrides or [], RunConfig).value
    require_training(run)
    for line in dropped_settings(run):
        print(f"# left out: {line}")
    print(dump(shrink_run(run, steps=steps, lanes=lanes)), end="")
