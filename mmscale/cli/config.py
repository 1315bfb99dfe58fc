"""``mmscale config``: explain keys, show and compare values with their origins, validate a file, shrink a run."""

from __future__ import annotations

import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.console import emit

if TYPE_CHECKING:
    from mmscale.config.explain import Explanation

app = typer.Typer()

_CONFIG = typer.Argument(help="A run's YAML file.", metavar="CONFIG")
_OVERRIDES = typer.Argument(
    None, help="Values that override the file's, for example stages.0.steps=50.", metavar="[KEY=VALUE]..."
)


@app.command(epilog="Example: mmscale config show configs/quickstart.yaml stages.0.steps=50")
def show(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    yaml: bool = typer.Option(False, "--yaml", help="Print a YAML file with every value. It starts the same run."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object: values, origins, notes."),
) -> None:
    """Print every value and its origin: default, file and line, or override."""
    from mmscale.config import dump, load
    from mmscale.errors import ConfigError
    from mmscale.run.config import RunConfig

    if yaml:
        if json:
            raise ConfigError("--yaml and --json: give one of the two")
        print(dump(load(file_of(config), overrides or [], RunConfig).value), end="")
        return
    values, origins, notes = _read(config, overrides or [])
    if json:
        emit({"values": values, "origins": origins, "notes": list(notes)}, json=True)
        return
    rows = [(f"{path} = {_to_json(value)}", origins[path]) for path, value in values.items()]
    width = min(max(len(text) for text, _ in rows), 72)
    for text, origin in rows:
        print(f"{text:<{width}}  # {origin}")
    for note in notes:
        print(f"# {note}")


def _to_json(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, default=str)


def file_of(config: Path) -> Path:
    """Return the YAML file of a run: the file itself, or ``config.yaml`` of a run folder."""
    return config / "config.yaml" if config.is_dir() else config


def _read(config: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """Return values, origins and notes of a file or run folder, whose origins are those of its newest start."""
    from mmscale.config import leaves, load
    from mmscale.report.configuration import read_origins
    from mmscale.run.config import RunConfig

    file = file_of(config)
    loaded = load(file, overrides, RunConfig)
    values = {".".join(path): value for path, value in leaves(loaded.value)}
    origins = {path: str(origin) for path, origin in loaded.origins.items()}
    if config.is_dir():
        recorded = read_origins(config)
        origins |= {
            key: recorded[key] for key, origin in loaded.origins.items() if origin.kind == "file" if key in recorded
        }
    return values, origins, loaded.notes


@app.command(epilog="Example: mmscale config diff configs/quickstart.yaml runs/quickstart")
def diff(
    a: Path = typer.Argument(help="A run's YAML file, or a run folder.", metavar="A"),
    b: Path = typer.Argument(help="Another one.", metavar="B"),
    json: bool = typer.Option(False, "--json", help="Print one JSON object: both values and origins by key."),
) -> None:
    """Print the values that differ between two configurations, with both origins."""
    (old, old_origins, _), (new, new_origins, _) = _read(a, []), _read(b, [])
    rows = {
        key: {
            "a": old.get(key),
            "a_origin": old_origins.get(key, "absent"),
            "b": new.get(key),
            "b_origin": new_origins.get(key, "absent"),
        }
        for key in {**old, **new}
        if key not in old or key not in new or old[key] != new[key]
    }
    if json:
        emit({"a": str(a), "b": str(b), "differences": rows}, json=True)
        return
    for key, row in rows.items():
        print(key)
        sides = [(str(path), row[side], row[f"{side}_origin"]) for path, side in ((a, "a"), (b, "b"))]
        texts = ["" if origin == "absent" else _to_json(value) for _, value, origin in sides]
        for text, (_, _, origin), sign in zip(texts, sides, "-+", strict=True):
            print(f"  {sign} {text:<{min(max(map(len, texts)), 60)}}  # {origin}")
    count = len(rows)
    print(f"{count} values differ" if count != 1 else "1 value differs", file=sys.stderr)


class SchemaName(str, Enum):
    """Kinds of YAML files."""

    run = "run"
    compare = "compare"
    model = "model"
    site = "site"


@app.command(epilog="Example: mmscale config schema run > run.json")
def schema(
    name: SchemaName = typer.Argument(SchemaName.run, help="Kind of the YAML file: run, compare, model or site."),
) -> None:
    """Print the JSON schema of a YAML file: keys with meaning, type, range, default and choices.

    Editors complete and check a file whose first line is `# yaml-language-server: $schema=PATH`. The schemas of this
    version are in configs/schema.
    """
    from mmscale.config.json_schema import schema_text

    print(schema_text(schema_of(name.value)))


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON schema of the files of a run, a comparison, a model, or a site."""
    from mmscale.config.json_schema import json_schema

    if name == "compare":
        from mmscale.compare.config import ComparisonFile

        return json_schema(ComparisonFile)
    if name == "model":
        from mmscale.models.config import ModelFile

        return json_schema(ModelFile, is_complete=False)  # The file of a tower has no decoder.
    if name == "site":
        from mmscale.run.site import SiteConfig

        return json_schema(SiteConfig)
    from mmscale.run.config import RunConfig

    return json_schema(RunConfig)


@app.command(epilog="Example: mmscale config explain model.connector.every configs/quickstart.yaml")
def explain(
    key: str = typer.Argument(help="A key, such as engine.zero_stage or stages.learning_rate.", metavar="KEY"),
    config: Path | None = typer.Argument(None, help="A run's YAML file or a run folder.", metavar="[CONFIG]"),
    overrides: list[str] = _OVERRIDES,
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Explain a key: meaning, type, range, default, choices; with CONFIG also its value and origin.

    For a block, lists its keys.
    """
    from dataclasses import asdict

    from mmscale.config.explain import explain as explanations_of

    found = explanations_of(schema_of("compare" if key.partition(".")[0] == "compare" else "run"), key)
    values: dict[str, dict[str, Any]] = {}
    if config is not None:
        read, origins, _ = _read(config, overrides or [])
        patterns = {one.key for one in found}
        values = {
            path: {"value": value, "origin": origins[path]}
            for path, value in read.items()
            if any(_is_below(path, pattern) for pattern in patterns)
        }
    if json:
        emit({"explanations": [asdict(one) for one in found], "values": values}, json=True)
        return
    for one in found:
        _print_explanation(one)
    for path, each in values.items():
        print(f"{path} = {_to_json(each['value'])}  # {each['origin']}")
    if config is not None and not values:
        print(f"{config}: has no value at {key}; another kind of a block may have been chosen")


def _is_below(path: str, pattern: str) -> bool:
    words, wanted = path.split("."), pattern.split(".")
    return len(words) >= len(wanted) and all(b in ("*", a) for a, b in zip(words, wanted, strict=False))


def _print_explanation(one: Explanation) -> None:
    kinds = f"  (of kind {', '.join(one.kinds)})" if one.kinds else ""
    print(f"{one.key}{kinds}")
    if one.description:
        print(textwrap.fill(one.description, 100, initial_indent="  ", subsequent_indent="  "))
    facts = {"type": one.type}
    if not one.keys:
        facts["default"] = "none: a value is required" if one.is_required else _to_json(one.default)
    facts["kinds"] = ", ".join(one.variants)
    facts |= {f"  {choice}": text for choice, text in one.choices.items() if text}
    for name, text in facts.items():
        if text:
            print(f"  {name:<8} {text}")
    width = max(map(len, one.keys), default=0)
    for name, text in one.keys.items():
        print(f"    {name:<{width}}  {text}".rstrip())


@app.command(epilog="Example: mmscale config validate configs/quickstart.yaml run_dir=runs/other --ranks 2")
def validate(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    ranks: int | None = typer.Option(None, min=1, help="Number of ranks of the start; by default any that fits."),
    json: bool = typer.Option(
        False, "--json", help="Print one JSON object: the largest number of ranks, warnings, notes."
    ),
) -> None:
    """Check everything that `mmscale train` checks before its first step, and train nothing.

    Values, files, data, held-out sets, this machine, initial weights, teachers, and the state of the run folder:
    whether the run is finished, or can resume from its newest checkpoint.
    """
    from mmscale.cli.run_file import load_run
    from mmscale.run.before_start import check_before_start, check_run_folder
    from mmscale.run.config import check_world

    loaded = load_run(file_of(config), overrides or [])
    run = loaded.value
    warnings = check_before_start(loaded)
    if ranks is not None:
        check_world(run, ranks)
    notes = check_run_folder(run)
    for line in [*(f"warning: {warning}" for warning in warnings), *notes]:
        print(f"mmscale: {line}", file=sys.stderr)
    lanes = min(run.stage_data(number).lanes for number in range(len(run.stages)))
    if json:
        emit({"most_ranks": lanes, "warnings": warnings, "notes": notes}, json=True)
    else:
        print(f"{config}: valid, for at most {lanes} rank{'s' if lanes > 1 else ''}")


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
