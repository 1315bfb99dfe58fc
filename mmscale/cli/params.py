"""``mmscale params``: count the parameters of a model without allocating it."""

from __future__ import annotations

from pathlib import Path

import typer

from mmscale.cli.console import emit

app = typer.Typer()

_CONFIG = typer.Argument(
    help="A YAML file of a model (decoder:, vision:, connector:), of a tower (vision:), of an image tokenizer "
    "(image_tokenizer:) or of a run.",
    metavar="CONFIG",
)
_OVERRIDES = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]...")


@app.command(epilog="Example: mmscale params configs/models/tiny.yaml")
def params(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    json: bool = typer.Option(False, "--json", help="Print one JSON object: total, active, components."),
) -> None:
    """Count the parameters of a model: in total, and active for one token."""
    from dataclasses import asdict

    from mmscale.config.layers import apply_overrides, read_layers
    from mmscale.config.validate import validate
    from mmscale.models.build import count_parameters
    from mmscale.models.config import kind_of_model

    root = apply_overrides(read_layers(config), overrides or [])
    block = root.child("model") or root  # A run's file has the model under the key "model".
    keys = [key for key in ("decoder", "image_tokenizer", "vision", "audio") if block.child(key) is not None]
    value, _ = validate(block, kind_of_model(keys or ["decoder"]), str(config))
    emit(asdict(count_parameters(value)), json=json)
