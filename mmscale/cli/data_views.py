"""``mmscale data views``: what a configuration makes of an image of a given size, without any image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from mmscale.cli.console import emit

app = typer.Typer()

_QUICKSTART = "mmscale data views configs/quickstart.yaml --size 1920x1080"


@app.command(epilog=f"Example: {_QUICKSTART}")
def views(
    config: Path = typer.Argument(help="A run's YAML file."),
    overrides: list[str] = typer.Argument(None, help="Values that win over the file's.", metavar="[KEY=VALUE]..."),
    size: str = typer.Option(..., "--size", help="Of the image, pixels.", metavar="WIDTHxHEIGHT"),
    dataset: str | None = typer.Option(None, "--dataset", help="Whose transforms; none takes the first data set's."),
    json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
) -> None:
    """Print the views, tokens, patches and cost of an image: the effect of transforms, tiling and layout."""
    from data_pipeline.errors import DataConfigError
    from data_pipeline.text.tokenizer import load_tokenizer
    from mmscale.config import load
    from mmscale.run.config import RunConfig

    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", size)
    if match is None:
        raise typer.BadParameter(f"{size!r}: expected WIDTHxHEIGHT in pixels, 1920x1080 say", param_hint="--size")
    width, height = int(match[1]), int(match[2])
    run = load(config, overrides or [], RunConfig).value
    names = [each.name for each in run.data.datasets]
    if dataset is not None and dataset not in names:
        raise DataConfigError(f"--dataset {dataset}: the configuration has {', '.join(names)}")
    chosen = run.data.datasets[names.index(dataset) if dataset is not None else 0]
    figures = _figures(chosen, load_tokenizer(run.data.tokenizer), run.media_spec, (height, width))
    if json:
        emit(figures, json=True)
        return
    print(f"{'view':<12}{'pixels':<12}{'at':<12}{'of':<12}{'role':<10}{'patches':>8}{'features':>9}")
    for row in figures["views"]:
        columns = f"{row['view']:<12}{row['pixels']:<12}{row['at']:<12}{row['of']:<12}{row['role']:<10}"
        print(f"{columns}{row['patches']:>8,}{row['features']:>9,}")
    emit({name: value for name, value in figures.items() if name != "views"})


def _figures(dataset: Any, tokenizer: Any, spec: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Views and totals of one image of ``size``, height first."""
    from data_pipeline.errors import DataConfigError
    from data_pipeline.images.transforms import ImageTransform
    from data_pipeline.media_spec import Placement
    from data_pipeline.packing.document_builder import DocumentBuilder
    from data_pipeline.sample import ImagePart, Sample, TextPart
    from data_pipeline.text.templates.stored import InterleavedTemplate

    if spec.placement is Placement.NONE:
        raise DataConfigError("the model has no image tower: it takes no images")
    plan = ImageTransform(dataset.transforms, spec).plan(size)
    builder = DocumentBuilder(dataset.model_copy(update={"template": InterleavedTemplate()}), tokenizer, spec)
    document = builder.measure(Sample((ImagePart(b"", "image", size), TextPart("x"))))
    (extent,) = document.images
    rows = []
    apart = "compared" if spec.placement is Placement.PAIR else "attended"
    for view, item in zip(plan.views, document.items, strict=True):
        canvas = plan.canvases[view.canvas].size
        height, width = (side * spec.patch_size for side in view.grid[1:])
        rows.append(
            {
                "view": "whole" if view.place is None else f"tile {view.place[0] + 1},{view.place[1] + 1}",
                "pixels": f"{width}x{height}",
                "at": f"{view.left},{view.top}",
                "of": f"{canvas[1]}x{canvas[0]}",
                "role": "embedded" if view.embedded else apart,
                "patches": len(item.values),
                "features": item.num_features(spec),
            }
        )
    tokens = extent.stop - extent.start
    cost = tokens + spec.cost_per_patch * document.computed_patches(spec)
    return {"views": rows, "tokens": tokens, "patches": document.num_patches, "cost": round(cost, 1)}
