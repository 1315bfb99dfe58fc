"""``mmscale checkpoint``: which checkpoints a run has, and whether they are good."""

from __future__ import annotations

from pathlib import Path

import typer

from mmscale.cli.console import console, emit

app = typer.Typer()

_FOLDER = typer.Argument(help="A run folder, its checkpoints folder, or one checkpoint.", metavar="PATH")
_JSON = typer.Option(False, "--json", help="One JSON object.")


@app.command("list", epilog="Example: mmscale checkpoint list runs/quickstart")
def list_(path: Path = _FOLDER, json: bool = _JSON) -> None:
    """List checkpoints, oldest first: step, stage, ranks, size, and whether all files are there."""
    from mmscale.checkpoint.manifest import missing_or_cut, read_manifest
    from mmscale.errors import CheckpointError

    rows = []
    for folder in _checkpoints(path):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            rows.append({"name": folder.name, "whole": False, "problem": str(error)})
            continue
        problem = missing_or_cut(folder, manifest)
        row = {
            "name": folder.name,
            "step": manifest.state.step,
            "stage": manifest.stage,
            "stage_step": manifest.state.stage_step,
            "world_size": manifest.world_size,
            "zero_stage": manifest.zero_stage,
            "precision": manifest.precision,
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
            "whole": problem is None,
        }
        rows.append(row if problem is None else row | {"problem": problem})
    if json:
        emit({"checkpoints": rows}, json=True)
        return
    for row in rows:
        emit({str(row["name"]): {key: value for key, value in row.items() if key != "name"}})


@app.command(epilog="Example: mmscale checkpoint verify runs/quickstart")
def verify(path: Path = _FOLDER, json: bool = _JSON) -> None:
    """Read every byte: sizes, checksums, and that the ranks' ranges cover each parameter. Exit code 1 if not good."""
    from mmscale.checkpoint.reshard import verify as find_problems
    from mmscale.cli.console import progress

    folders = _checkpoints(path)
    results: dict[str, list[str]] = {}
    with progress("verify", total=len(folders)) as meter:
        for folder in folders:
            results[folder.name] = find_problems(folder)
            meter.advance(note=folder.name)
    if json:
        emit({"checkpoints": results}, json=True)
    else:
        emit({name: "; ".join(problems) or "good" for name, problems in results.items()})
    bad = [name for name, problems in results.items() if problems]
    if bad:
        console.print(f"{len(bad)} of {len(results)} checkpoints are damaged: {', '.join(bad)}", style="red")
        raise typer.Exit(1)


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoints that ``path`` means.

    Raises:
        CheckpointError: there is none.
    """
    from mmscale.checkpoint.manifest import MANIFEST, list_checkpoints
    from mmscale.errors import CheckpointError

    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path} has no checkpoints; give a run folder, its checkpoints folder, or one checkpoint"
        )
    return found
