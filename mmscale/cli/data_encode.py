"""``mmscale data encode``: store the token ids of images and videos, for models that draw or read tokens."""

from __future__ import annotations

from pathlib import Path

import typer

from data_pipeline.prepare.choices import OnError
from mmscale.cli.console import console, progress
from mmscale.cli.data_shards import JOBS, JSON, SHARD_SAMPLES, SHARD_SIZE, show

app = typer.Typer()

_TOKENIZER = typer.Argument(
    help="Run folder of an image tokenizer, or one checkpoint of it (RUN/checkpoints/step-N).", metavar="TOKENIZER"
)
_MANIFESTS = typer.Argument(help="Data sets to encode and join, in order.", metavar="MANIFEST...")
_TRANSFORMS = typer.Option(
    None,
    "--transforms",
    metavar="YAML",
    help="How an image is resized and cropped, as data.transforms: '{kind: fixed, size: 256, crop: center}'. By "
    "default as in the tokenizer's own run, without augmentation.",
)
_VIDEO = typer.Option(
    None,
    "--video",
    metavar="YAML",
    help="Which frames of a video are encoded, and at which size, as data.video: "
    "'{frames: {kind: rate, per_second: 8}, min_pixels: 65536, max_pixels: 65536}'. Without it, a sample with a video "
    "is a bad sample.",
)


@app.command(
    epilog="Example: mmscale data encode runs/emoji-vq examples/emoji/shards/train.manifest --output tokens --jobs 2"
)
def encode(
    tokenizer: Path = _TOKENIZER,
    manifests: list[Path] = _MANIFESTS,
    output: Path = typer.Option(..., "--output", help="Folder for shards, indexes and manifest."),
    name: str = typer.Option("data", "--name", help="Prefix of the shards and name of the manifest."),
    transforms: str = _TRANSFORMS,
    video: str = _VIDEO,
    grids_only: bool = typer.Option(
        False, "--grids-only", help="Leave the media themselves out of the new shards; text and token ids stay."
    ),
    shard_size: int = SHARD_SIZE,
    shard_samples: int = SHARD_SAMPLES,
    device: str = typer.Option("cpu", "--device", help="Device of the tokenizer: cpu, cuda or cuda:1."),
    jobs: int = JOBS,
    on_error: OnError = typer.Option(
        "fail", "--on-error", help="Whether a sample that cannot be encoded ends the command, or is skipped."
    ),
    json: bool = JSON,
) -> None:
    """Encode the images and videos of data sets with an image tokenizer, into new shards.

    The manifest names the tokenizer, and a run that names another one (data.image_tokens.tokenizer) is refused. After
    an interruption, run the same command to continue.
    """
    from data_pipeline.prepare.encode import EncodedSource
    from data_pipeline.prepare.ingest import ingest
    from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
    from mmscale.cli.trained import run_and_checkpoint
    from mmscale.run.image_tokens import CheckpointEncoder, encoding_transforms, encoding_video

    run = run_and_checkpoint(tokenizer)
    encoder = CheckpointEncoder.open(tokenizer, device)
    chosen = encoding_transforms(None if run is None else run[0], transforms, encoder.image_size)
    samples = ReshardSource([NamedManifest(path.stem, path) for path in manifests], Selection())
    source = EncodedSource(samples, encoder, chosen, encoding_video(video), grids_only=grids_only)
    console.print(source.description, markup=False)
    with progress("encode", source.count()) as meter:
        report = ingest(
            source,
            output,
            name,
            max_bytes=shard_size,
            max_samples=shard_samples,
            workers=jobs if jobs > 1 else 0,
            on_error=on_error,
            image_tokenizer=encoder.digest,
            progress=meter.advance,
        )
    show(source.description, report, json, image_tokenizer=encoder.digest)
