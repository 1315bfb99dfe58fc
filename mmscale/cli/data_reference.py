"""``mmscale data reference``: store the reference model's log-probabilities of preference pairs beside the pairs."""

from __future__ import annotations

from pathlib import Path

import typer

from data_pipeline.prepare.choices import OnError
from mmscale.cli.console import console, progress
from mmscale.cli.data_shards import JOBS, JSON, SHARD_SAMPLES, SHARD_SIZE, show

app = typer.Typer()


@app.command(epilog="Example: mmscale data reference configs/recipes/emoji-preferences.yaml --output shards")
def reference(
    config: Path = typer.Argument(help="A run's YAML file, with a stage that has preference."),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    output: Path = typer.Option(..., "--output", help="Folder for shards, indexes and manifest."),
    stage: str | None = typer.Option(None, "--stage", help="Name of the stage; by default the one with preference."),
    dataset: str | None = typer.Option(None, "--dataset", help="Name of its data set; by default the first."),
    shard_size: int = SHARD_SIZE,
    shard_samples: int = SHARD_SAMPLES,
    device: str = typer.Option("cpu", "--device", help="Device of the model: cpu, cuda or cuda:1."),
    jobs: int = JOBS,
    on_error: OnError = typer.Option(
        "fail", "--on-error", help="Whether an unusable pair ends the command, or is skipped and recorded."
    ),
    json: bool = JSON,
) -> None:
    """Copy a data set of pairs, with the log-probabilities of the frozen reference model of its stage.

    A run on the new shards need not load that model: set template.stored_reference to the printed checksum. After an
    interruption, run the same command to continue.
    """
    from data_pipeline.prepare.ingest import ingest
    from data_pipeline.prepare.reference import ReferenceSource
    from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
    from mmscale.config import load
    from mmscale.errors import ConfigError
    from mmscale.run.config import RunConfig
    from mmscale.run.stored_reference import CheckpointReference, preference_stage

    run = load(config, overrides or [], RunConfig).value
    number = preference_stage(run, stage)
    data = run.stage_data(number)
    chosen = next((each for each in data.datasets if dataset in (None, each.name)), None)
    if chosen is None or not isinstance(chosen.manifest, Path):
        names = ", ".join(each.name for each in data.datasets if isinstance(each.manifest, Path)) or "none"
        raise ConfigError(
            f"--dataset {dataset or data.datasets[0].name}: the data sets with a local manifest are {names}"
        )
    model = CheckpointReference.open(run, number, device)
    samples = ReshardSource([NamedManifest(chosen.name, chosen.manifest)], Selection())
    source = ReferenceSource(samples, model, chosen, data.tokenizer, model.spec, model.max_tokens)
    console.print(source.description, markup=False)
    with progress("reference", source.count()) as meter:
        report = ingest(
            source,
            output,
            chosen.name,
            max_bytes=shard_size,
            max_samples=shard_samples,
            workers=jobs if jobs > 1 else 0,
            on_error=on_error,
            image_tokenizer=samples.image_tokenizer,
            progress=meter.advance,
        )
    show(source.description, report, json, stored_reference=model.checksum)
