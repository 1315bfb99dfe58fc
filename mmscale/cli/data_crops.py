"""``mmscale data crops``: show how a configuration divides an image of a given size into crops; needs no image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from mmscale.cli.console import emit, print_table

app = typer.Typer()

_QUICKSTART = "mmscale data crops configs/quickstart.yaml --size 1920x1080"


@app.command(epilog=f"Example: {_QUICKSTART}")
def crops(
    config: Path = typer.Argument(help="A run's YAML file."),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    size: str = typer.Option(..., "--size", help="Size of the image, pixels.", metavar="WIDTHxHEIGHT"),
    dataset: str | None = typer.Option(
        None, "--dataset", help="Data set whose transforms to apply; by default the first."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
) -> None:
    """Print the crops, tokens, patches and cost of an image.

    They follow from the configuration's transforms, tiling and layout.
    """
    from data_pipeline.errors import DataConfigError
    from data_pipeline.text.tokenizer import load_tokenizer
    from mmscale.config import load
    from mmscale.run.config import RunConfig

    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", size)
    if match is None:
        raise typer.BadParameter(
            f"{size!r}: expected WIDTHxHEIGHT in pixels, for example 1920x1080", param_hint="--size"
        )
    width, height = int(match[1]), int(match[2])
    run = load(config, overrides or [], RunConfig).value
    names = [each.name for each in run.data.datasets]
    if dataset is not None and dataset not in names:
        raise DataConfigError(f"--dataset {dataset}: the configuration has {', '.join(names)}")
    chosen = run.data.datasets[names.index(dataset) if dataset is not None else 0]
    results = _crops_and_totals(chosen, load_tokenizer(run.data.tokenizer), run.media_spec, (height, width))
    if json:
        emit(results, json=True)
        return
    print_table(results["crops"])
    emit({name: value for name, value in results.items() if name != "crops"})


def _crops_and_totals(dataset: Any, tokenizer: Any, spec: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return the crops and totals of one image.

    Args:
        dataset: Configuration of the data set.
        tokenizer: The run's tokenizer.
        spec: The model's ``MediaSpec``.
        size: (height, width) of the image, pixels.
    """
    from data_pipeline.errors import DataConfigError
    from data_pipeline.images.transforms import ImageTransform
    from data_pipeline.media_spec import Placement
    from data_pipeline.packing.document_builder import DocumentBuilder
    from data_pipeline.sample import ImagePart, Sample, TextPart
    from data_pipeline.text.templates.stored import InterleavedTemplate

    if spec.placement is Placement.NONE:
        raise DataConfigError("the model has no image tower, so it takes no images")
    plan = ImageTransform(dataset.transforms, spec).plan(size)
    builder = DocumentBuilder(dataset.model_copy(update={"template": InterleavedTemplate()}), tokenizer, spec)
    document = builder.dry_run(Sample((ImagePart(b"", "image", size), TextPart("x"))))
    (extent,) = document.images
    rows = []
    apart = "compared" if spec.placement is Placement.PAIR else "attended"
    for crop, item in zip(plan.crops, document.items, strict=True):
        canvas, at = plan.canvases[crop.canvas], (crop.top, crop.left)
        if canvas.source is not None:  # A part of another canvas, which shows where it is.
            at, canvas = canvas.source[1][:2], plan.canvases[canvas.source[0]]
        height, width = (side * spec.patch_size for side in crop.grid[1:])
        rows.append(
            {
                "crop": "whole" if crop.cell is None else f"tile {crop.cell[0] + 1},{crop.cell[1] + 1}",
                "pixels": f"{width}x{height}",
                "at": f"{at[1]},{at[0]}",
                "of": f"{canvas.size[1]}x{canvas.size[0]}",
                "role": "embedded" if crop.embedded else apart,
                "patches": len(item.values),
                "features": item.num_features(spec),
            }
        )
    tokens = extent.stop - extent.start
    cost = tokens + spec.cost_per_patch * document.computed_patches(spec)
    return {"crops": rows, "tokens": tokens, "patches": document.num_patches, "cost": round(cost, 1)}
