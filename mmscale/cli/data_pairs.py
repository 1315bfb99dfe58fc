"""``mmscale data pairs``: make preference pairs of a model's own drawings, ranked by a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_pipeline.prepare.choices import OnError
from mmscale.cli.console import console, progress
from mmscale.cli.data_shards import JSON, SHARD_SAMPLES, SHARD_SIZE, show

if TYPE_CHECKING:
    from mmscale.cli.trained import Trained
    from mmscale.models.image_tokenizer import ImageTokenizer
    from mmscale.models.multimodal import MultimodalModel

app = typer.Typer()

_MANIFESTS = typer.Argument(help="Data sets with the texts to draw; their images are not read.", metavar="MANIFEST...")
_CLASSIFIER = typer.Option(
    ..., "--classifier", help="Run folder or checkpoint of a contrastive model, which ranks the drawings."
)
_FIELD = typer.Option(
    "name", "--field", help="Field with the name of a sample, which the classifier finds among all names."
)
_SIZE = typer.Option(
    None, "--size", metavar="H[xW]", help="Height and width in pixels; by default the only size of training."
)
_TOKENIZER = typer.Option(
    None, "--tokenizer", help="Run or checkpoint of the image tokenizer, for a model that does not contain it."
)


@app.command(
    epilog="Example: mmscale data pairs runs/emoji-draw examples/emoji/shards/train-quick.manifest "
    "--classifier runs/emoji-contrast --output shards/pairs"
)
def pairs(
    run: Path = typer.Argument(help="Run folder of the model that draws, or one checkpoint of it."),
    manifests: list[Path] = _MANIFESTS,
    classifier: Path = _CLASSIFIER,
    output: Path = typer.Option(..., "--output", help="Folder for shards, indexes and manifest."),
    name: str = typer.Option("pairs", "--name", help="Prefix of the shards and name of the manifest."),
    field: str = _FIELD,
    drawings: int = typer.Option(8, "--drawings", min=2, max=1024, help="Drawings of each text."),
    size: str = _SIZE,
    guidance: float = typer.Option(1.0, "--guidance", min=1.0, help="Scale of classifier-free guidance; 1 for none."),
    temperature: float = typer.Option(1.0, "--temperature", min=1e-6, help="Divides the logits of the codes."),
    top_k: int | None = typer.Option(
        None, "--top-k", min=1, help="Draw each code from this many likeliest ones; by default from all."
    ),
    seed: int = typer.Option(0, "--seed", help="Seed of the drawings."),
    tokenizer: Path = _TOKENIZER,
    shard_size: int = SHARD_SIZE,
    shard_samples: int = SHARD_SAMPLES,
    on_error: OnError = typer.Option(
        "skip", "--on-error", help="Whether a text without a pair ends the command, or is skipped and recorded."
    ),
    json: bool = JSON,
) -> None:
    """Draw each text several times, and store the best and the worst drawing as a preference pair.

    The samples keep their fields. A run reads them with template.kind=preference and each.kind=drawing. After an
    interruption, run the same command to continue.
    """
    from data_pipeline.prepare.computed import ComputedSource
    from data_pipeline.prepare.ingest import ingest
    from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
    from mmscale.checkpoint.manifest import manifest_checksum
    from mmscale.cli.drawing_files import DrawingRequest
    from mmscale.cli.trained import open_trained
    from mmscale.evaluate.classifier import Classifier
    from mmscale.evaluate.drawn_pairs import DrawnPairs, names_of
    from mmscale.models.sampling import SamplingConfig

    samples = ReshardSource([NamedManifest(path.stem, path) for path in manifests], Selection())
    trained = open_trained(run)
    data = trained.config.drawing_data(trained.stage)
    world = trained.world
    program = DrawnPairs(
        *_model_and_tokenizer(trained, tokenizer),
        data,
        trained.config.stage_media(trained.stage),
        Classifier.open(classifier, world),
        names_of(manifests, field, on_error),
        field,
        drawings,
        DrawingRequest(size, guidance, tokenizer, output).pixels(),
        guidance,
        SamplingConfig(temperature=temperature, top_k=top_k, top_p=1.0, seed=seed),
    )
    source = ComputedSource(
        samples,
        program,
        f"{manifest_checksum(trained.checkpoint)} {program.settings}",
        f"as pairs of {drawings} drawings, ranked among {len(program.names):,} names",
    )
    console.print(source.description, markup=False)
    with progress("pairs", source.count()) as meter:
        report = ingest(
            source,
            output,
            name,
            max_bytes=shard_size,
            max_samples=shard_samples,
            on_error=on_error,
            image_tokenizer=program.image_tokenizer,
            progress=meter.advance,
        )
    show(source.description, report, json, image_tokenizer=program.image_tokenizer)


def _model_and_tokenizer(trained: Trained, tokenizer: Path | None) -> tuple[MultimodalModel, ImageTokenizer]:
    """Return a model that draws, and the image tokenizer of its codes: its own, or that of the run ``tokenizer``.

    Raises:
        ConfigError: there is none, or it is not the one that encoded the data of the model.
    """
    from mmscale.errors import ConfigError
    from mmscale.models.image_tokenizer import ImageTokenizer
    from mmscale.models.multimodal import MultimodalModel
    from mmscale.run.image_tokens import tokenizer_of_data

    found = getattr(trained.model, "image_tokenizer", None)
    if tokenizer is not None:
        found = tokenizer_of_data(tokenizer, trained.config.drawing_data(trained.stage), trained.world.device)
    if not isinstance(trained.model, MultimodalModel) or not isinstance(found, ImageTokenizer):
        raise ConfigError(
            f"{trained.checkpoint}: its model has no image tokenizer to turn codes into pixels; name the run of the "
            "one that encoded its data: --tokenizer RUN"
        )
    return trained.model, found
