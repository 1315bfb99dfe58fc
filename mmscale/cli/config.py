"""``mmscale config``: where each value comes from, and whether the whole is legal."""

from __future__ import annotations

from pathlib import Path

import typer

from mmscale.cli.console import emit

app = typer.Typer()

_CONFIG = typer.Argument(help="A run's YAML file.", metavar="CONFIG")
_OVERRIDES = typer.Argument(
    None, help="Values that win over the file's, for example stages.0.steps=50.", metavar="[KEY=VALUE]..."
)


@app.command(epilog="Example: mmscale config show configs/quickstart.yaml stages.0.steps=50")
def show(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    json: bool = typer.Option(False, "--json", help="One JSON object: values, origins, notes."),
) -> None:
    """Print every value and where it came from: default, file and line, or override."""
    from mmscale.config import leaves, load
    from mmscale.run_config import RunConfig

    loaded = load(config, overrides or [], RunConfig)
    values = {".".join(path): value for path, value in leaves(loaded.value)}
    if json:
        origins = {path: str(origin) for path, origin in loaded.origins.items()}
        emit({"values": values, "origins": origins, "notes": list(loaded.notes)}, json=True)
        return
    rows = [(f"{path} = {_shown(value)}", loaded.origins[path]) for path, value in values.items()]
    width = min(max(len(text) for text, _ in rows), 72)
    for text, origin in rows:
        print(f"{text:<{width}}  # {origin}")
    for note in loaded.notes:
        print(f"# {note}")


def _shown(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


@app.command(epilog="Example: mmscale config validate configs/quickstart.yaml run_dir=runs/other")
def validate(config: Path = _CONFIG, overrides: list[str] = _OVERRIDES) -> None:
    """Check a configuration."""
    from mmscale.config import load
    from mmscale.run_config import RunConfig

    load(config, overrides or [], RunConfig)
    print(f"{config}: valid")


@app.command(epilog="Example: mmscale config shrink configs/recipes/emoji-stages.yaml > tiny.yaml")
def shrink(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    steps: int = typer.Option(4, help="Steps of each stage, at most.", min=1),
    lanes: int = typer.Option(2, help="Rows of the global batch, at most.", min=1),
) -> None:
    """Print a run of seconds with the same stages: a tiny twin of the model, on the bundled data."""
    from mmscale.config import dump, load
    from mmscale.run_config import RunConfig
    from mmscale.shrink_run import left_out, shrink_run

    run = load(config, overrides or [], RunConfig).value
    for line in left_out(run):
        print(f"# left out: {line}")
    print(dump(shrink_run(run, steps=steps, lanes=lanes)), end="")
