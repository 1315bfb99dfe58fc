"""``mmscale init``: write the commented file of a new run from a model and a data set."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_pipeline.prepare.choices import SourceKind
from mmscale.cli.console import console, emit, progress, warn

if TYPE_CHECKING:
    from mmscale.init.model import StartingModel
    from mmscale.init.write import InitReport

app = typer.Typer()


class Adapters(str, Enum):
    """Values of ``--adapters``."""

    lora = "lora"
    dora = "dora"


@app.command(epilog="Example: mmscale init runs/pretrained photos --output photos.yaml")
def init(
    model: str = typer.Argument(
        help="The model: a Hugging Face folder, hf://ORG/NAME, the folder of an import or a run, or, to train from "
        "random values, a YAML file or a name of configs/models.",
        metavar="MODEL",
    ),
    data: Path = typer.Argument(
        help="The data: a folder of media, CSV, TSV, JSON, JSONL, Parquet, Arrow, tars, or a manifest.",
        metavar="DATA",
    ),
    output: Path = typer.Option(..., "--output", help="The YAML file to write. Shards go next to it."),
    run_dir: Path | None = typer.Option(
        None, "--run-dir", help="Folder of the run; by default runs/ and the name of the file."
    ),
    adapters: Adapters | None = typer.Option(
        None, "--adapters", help="Train adapters: the default, lora, if MODEL has weights."
    ),
    full: bool = typer.Option(False, "--full", help="Train the weights themselves instead of adapters."),
    epochs: float = typer.Option(1.0, "--epochs", min=0.01, help="Passes over the data."),
    steps: int | None = typer.Option(None, "--steps", min=1, help="Optimizer steps, instead of --epochs."),
    heldout: int | None = typer.Option(
        None, "--heldout", min=1, help="Samples to hold out for evaluation; by default a tenth, and at most 500."
    ),
    prompt: str = typer.Option(
        "Describe this image.", "--prompt", help="The user's words about an image with a caption, if MODEL chats."
    ),
    kind: SourceKind = typer.Option("auto", "--from", help="Format of DATA, as for `mmscale data ingest`."),
    columns: list[str] = typer.Option([], "--column", help="Rename column OLD to NEW; repeatable.", metavar="NEW=OLD"),
    images: Path | None = typer.Option(
        None, "--images", file_okay=False, exists=True, help="Folder of the images that a list names."
    ),
    force: bool = typer.Option(False, "--force", help="Replace the file and the folder of an earlier init."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write a run file for a model and a data set, with sizes that fit this machine.

    Stores the data as shards, holds samples out for evaluation, and checks the file like `mmscale config validate`.
    """
    from data_pipeline.prepare.records import FieldNames
    from data_pipeline.prepare.sources import SourceOptions
    from mmscale.cli.data_shards import pair
    from mmscale.config.layers import RUN_CONFIG
    from mmscale.errors import ConfigError
    from mmscale.init.data import DataRequest
    from mmscale.init.machine import find_machine
    from mmscale.init.write import RunRequest, write_run

    if full and adapters is not None:
        raise ConfigError("--full trains the weights themselves: leave out --adapters")
    if output.exists() and not force:
        raise ConfigError(f"{output}: exists already; --force replaces it")
    run_dir = run_dir or Path("runs") / output.stem
    if (run_dir / RUN_CONFIG).exists():
        raise ConfigError(f"{run_dir}: holds a run already; name a new folder with --run-dir")
    start = _starting_model(model, output)
    if start.trained is None and adapters is not None:
        raise ConfigError(
            f"--adapters: {start.name} starts from random values, which adapters cannot train; leave it out"
        )
    if start.trained is not None and not full:
        adapters = adapters or Adapters.lora
    options = SourceOptions(kind, FieldNames(tuple(map(pair, columns))), images=images)
    folder = output.with_name(f"{output.stem}-data")
    request = RunRequest(
        output=output,
        run_dir=run_dir,
        data=DataRequest(data, folder, options, prompt, heldout, force),
        adapters=None if adapters is None else adapters.value,
        steps=steps,
        epochs=epochs,
    )
    _show(write_run(request, start, find_machine(), progress), json)


def _starting_model(model: str, output: Path) -> StartingModel:
    """Return the starting model. A Hugging Face folder, or one of a hub, is imported first, next to the new file."""
    from mmscale.hf.hub import SCHEME, local_folder
    from mmscale.hf.read import CONFIG
    from mmscale.init.model import require_whole, starting_model
    from mmscale.run.imported import import_run

    if not model.startswith(SCHEME) and not (Path(model) / CONFIG).is_file():
        return starting_model(model)
    name = model.rpartition("/")[2] if model.startswith(SCHEME) else Path(model).resolve().name
    run = output.with_name(f"{name}-imported")
    if run.exists():
        console.print(f"{run}: an earlier import, which is used again", markup=False)
    else:
        folder = local_folder(model, None, lambda said: console.print(said, markup=False))
        require_whole(import_run(folder, run), model)
        console.print(f"{model}: imported into {run}", markup=False)
    return starting_model(str(run))


def _show(report: InitReport, json: bool) -> None:
    data, sizes = report.data, report.sizes
    if data.num_skipped:
        listed = data.manifest.with_name(f"{data.name}.skipped.jsonl")
        warn([f"{data.num_skipped} rows cannot be used and are left out; {listed} gives the reasons"])
    if data.examples.others:
        kind = data.examples.kind.value
        warn([f"{data.examples.others} of the first samples hold no {kind}: look at them with `mmscale data show`"])
    warn(report.notes)
    file = shlex.quote(str(report.file))
    ranks = report.machine.ranks
    commands = {
        f"mmscale data show {file} --samples 0:1": "what the model reads, and what it learns",
        f"mmscale train {file}"
        if ranks == 1
        else f"mmscale launch local {file} --ranks {ranks}": f"{sizes.steps} steps",
        f"mmscale eval {file}": "scores on the held-out samples",
    }
    if json:
        emit(
            {
                "file": str(report.file),
                "run_dir": str(report.run.run_dir),
                "source": data.description,
                "manifest": str(data.manifest),
                "samples": data.num_samples,
                "heldout": data.num_heldout,
                "skipped": data.num_skipped,
                "lanes": sizes.lanes,
                "max_tokens": sizes.max_tokens,
                "max_documents": sizes.documents,
                "steps": sizes.steps,
                "zero_stage": sizes.zero_stage,
                "rank_bytes": sizes.rank_bytes,
                "next": list(commands),
            },
            json=True,
        )
        return
    console.print(f"{data.name}: {data.description}", markup=False)
    console.print(f"{data.num_samples:,} samples to train on, {data.num_heldout:,} held out", markup=False)
    print(f"wrote {report.file}; next:")
    width = max(map(len, commands))
    for command, purpose in commands.items():
        print(f"  {command:<{width}}  # {purpose}")
