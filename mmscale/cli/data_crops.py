"""``mmscale data crops``: show how a configuration divides an image or a video of a given size; needs no file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from mmscale.cli.console import emit, print_table
from mmscale.cli.data_show import chosen_dataset

app = typer.Typer()

_QUICKSTART = "mmscale data crops configs/quickstart.yaml --size 1920x1080"


@app.command(epilog=f"Example: {_QUICKSTART}")
def crops(
    config: Path = typer.Argument(help="A run's YAML file."),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    size: str = typer.Option(..., "--size", help="Size of the image or of a frame, pixels.", metavar="WIDTHxHEIGHT"),
    frames: int | None = typer.Option(None, "--frames", min=1, help="Frames of a video; by default it is an image."),
    fps: float | None = typer.Option(
        None, "--fps", min=1e-3, max=1e4, help="Frames for each second of the video. Default: 30."
    ),
    dataset: str | None = typer.Option(
        None, "--dataset", help="Data set whose transforms to apply; by default the first."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
) -> None:
    """Print the crops, tokens, patches and cost of an image, or the frames of a video.

    They follow from the configuration's transforms, tiling and layout, or from data.video.
    """
    from data_pipeline.text.tokenizer import load_tokenizer
    from mmscale.config import load
    from mmscale.run.config import RunConfig

    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", size)
    if match is None:
        raise typer.BadParameter(
            f"{size!r}: expected WIDTHxHEIGHT in pixels, for example 1920x1080", param_hint="--size"
        )
    if fps is not None and frames is None:
        raise typer.BadParameter("belongs to a video: give its number of frames with --frames", param_hint="--fps")
    width, height = int(match[1]), int(match[2])
    run = load(config, overrides or [], RunConfig).value
    chosen = chosen_dataset(run, dataset)
    tokenizer, spec = load_tokenizer(run.data.tokenizer), run.media_spec
    if frames is None:
        results = _crops_and_totals(chosen, tokenizer, spec, (height, width))
    else:
        duration = round(frames / (fps or 30.0) * 1e6)
        results = _frames_and_totals(chosen, tokenizer, spec, (frames, duration, height, width))
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
    return {"crops": rows, **_totals(document, spec)}


def _frames_and_totals(dataset: Any, tokenizer: Any, spec: Any, size: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return the chosen frames and totals of one video with a constant frame rate; ``size``: a ``VideoSize``."""
    from data_pipeline.errors import DataConfigError
    from data_pipeline.packing.document_builder import DocumentBuilder
    from data_pipeline.sample import AudioSize, Sample, TextPart, VideoPart, VideoSize
    from data_pipeline.text.templates.stored import InterleavedTemplate

    if dataset.video is None:
        raise DataConfigError(f"--frames: data set {dataset.name} has no block video (data.video)")
    video = VideoSize(*size)
    builder = DocumentBuilder(dataset.model_copy(update={"template": InterleavedTemplate()}), tokenizer, spec)
    silent = AudioSize(0, 0, 0)  # Also with data.audio.from_video.
    document = builder.dry_run(Sample((VideoPart(b"", "video", video, silent), TextPart("x"))))
    times = dataset.video.frames.planned_times(video, dataset.video.frames.count(video, spec.frames_per_patch))
    rows = [
        {
            "frames": f"{item.grid[0] * spec.frames_per_patch if item.later_values is not None else item.grid[0]}",
            "pixels": f"{item.grid[2] * spec.patch_size}x{item.grid[1] * spec.patch_size}",
            "patches": len(item.values),
            "features": item.num_features(spec),
        }
        for item in document.items
    ]
    return {"crops": rows, "seconds": [round(time, 3) for time in times], **_totals(document, spec)}


def _totals(document: Any, spec: Any) -> dict[str, Any]:
    """Return the tokens of the only image or video of a document, the patches and the cost."""
    (extent,) = document.images
    tokens = extent.stop - extent.start
    cost = tokens + spec.cost_per_patch * document.computed_patches(spec)
    return {"tokens": tokens, "patches": document.num_patches, "cost": round(cost, 1)}
