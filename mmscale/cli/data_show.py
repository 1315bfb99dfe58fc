"""``mmscale data show``: print the documents that training builds from single samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.console import emit

if TYPE_CHECKING:
    from data_pipeline.config import DatasetConfig
    from data_pipeline.history.text_spans import TextSpan
    from mmscale.run.config import RunConfig

app = typer.Typer()

_WIDTH = 100


@app.command(epilog="Example: mmscale data show configs/quickstart.yaml --samples 0:2")
def show(
    config: Path = typer.Argument(help="A run's YAML file."),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    dataset: str | None = typer.Option(None, "--dataset", help="Name of the data set; by default the first."),
    samples: str = typer.Option(
        "0:3", "--samples", help="Samples of its manifest, from A up to, but not including, B.", metavar="A:B"
    ),
    epoch: int = typer.Option(0, "--epoch", min=0, help="Epoch that decides the sampled texts and augmentations."),
    pictures: Path | None = typer.Option(
        None, "--pictures", help="Folder for the images and videos as the model sees them, as PNG files."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of lines."),
) -> None:
    """Print the documents that training builds from samples.

    Shows context text, learned text with its loss weight, and the positions of images, videos and sounds. With
    --pictures, each crop becomes a file SAMPLE-CROP.png, with up to eight frames of a video side by side. A bad sample
    is listed with its reason; then the exit code is 1.
    """
    from dataclasses import asdict

    from mmscale.cli.data import parse_range
    from mmscale.config import load
    from mmscale.run.config import RunConfig

    run = load(config, overrides or [], RunConfig).value
    chosen = chosen_dataset(run, dataset)
    found = list(_documents(run, chosen, parse_range(samples, "--samples"), epoch, pictures))
    is_bad = any("problem" in one for one in found)
    if json:
        plain = [{**one, "text_spans": [asdict(part) for part in one.get("text_spans", ())]} for one in found]
        emit({"dataset": chosen.name, "samples": plain}, json=True)
    for sample in found if not json else ():
        if "problem" in sample:
            print(f"sample {sample['sample']}  {sample['shard']}/{sample['key']}  bad: {sample['problem']}")
            continue
        weight = sum(one.weight * one.num_tokens for one in sample["text_spans"])
        print(
            f"sample {sample['sample']}  {sample['shard']}/{sample['key']}  {sample['tokens']} tokens, "
            f"{sample['patches']} patches, weight {weight:g}"
        )
        branch = 0
        for one in sample["text_spans"]:
            if one.branch != branch:
                branch = one.branch
                print(f"  branch {branch}")
            print(_line(one))
    if is_bad:
        raise typer.Exit(1)


def _line(one: TextSpan) -> str:
    words = repr(one.text) if one.is_text else one.text
    if len(words) > _WIDTH:
        words = f"{words[: _WIDTH // 2]} ... {words[-_WIDTH // 2 :]}"
    weight = f"x {one.weight:g}" if one.weight else ""
    return f"  {one.kind:<8}{one.num_tokens:>5} {weight:<10} {words}"


def chosen_dataset(run: RunConfig, name: str | None) -> DatasetConfig:
    """Return the data set called ``name``, or the first one.

    Raises:
        DataConfigError: there is none of that name.
    """
    from data_pipeline.errors import DataConfigError

    for one in run.data.datasets:
        if name in (None, one.name):
            return one
    names = ", ".join(one.name for one in run.data.datasets)
    raise DataConfigError(f"--dataset {name}: the configuration has {names}")


def _documents(run: RunConfig, dataset: DatasetConfig, samples: range, epoch: int, pictures: Path | None) -> Any:
    from data_pipeline.errors import DataConfigError, SampleError
    from data_pipeline.history.text_spans import text_spans
    from data_pipeline.io.atomic import write_whole
    from data_pipeline.loader.sample_source import dataset_seed
    from data_pipeline.order.randomness import SampleRng
    from data_pipeline.packing.document_builder import DocumentBuilder
    from data_pipeline.shards.manifest import Manifest
    from data_pipeline.shards.sample_reader import SampleReader
    from data_pipeline.text.tokenizer import load_tokenizer
    from mmscale.metrics.sample_images import encode_png, join_patches

    spec, tokenizer = run.media_spec, load_tokenizer(run.data.tokenizer)
    build = DocumentBuilder(dataset, tokenizer, spec)
    manifest = Manifest.open(dataset.indexed)
    if samples.stop > manifest.num_samples:
        raise DataConfigError(
            f"--samples {samples.start}:{samples.stop}: {dataset.name} has {manifest.num_samples} samples"
        )
    reader, seed = SampleReader(manifest, dataset.name), dataset_seed(run.seed, dataset.name)
    for number in samples:
        try:
            sample = reader.read(number, epoch)
            document = build(sample, SampleRng(seed, number, epoch))
        except SampleError as error:
            yield {"sample": number, "shard": error.shard, "key": error.key, "problem": error.reason}
            continue
        crops = [item for item in document.items if item.modality == "image"]
        for crop, item in enumerate(crops if pictures is not None else ()):
            assert pictures is not None, "no crops otherwise"
            picture = join_patches(item.values, item.grid, spec, item.later_values)
            write_whole(pictures / f"{number}-{crop}.png", encode_png(picture), parents=True)
        yield {
            "sample": number,
            "shard": sample.provenance.shard,
            "key": sample.provenance.key,
            "tokens": document.num_tokens,
            "patches": document.num_patches,
            "branches": len(document.branches),
            "text_spans": text_spans(document, tokenizer, spec),
        }
