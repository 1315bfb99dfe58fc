"""``mmscale generate``: a trained model says what is in an image."""

from __future__ import annotations

from pathlib import Path

import typer

from mmscale.cli.console import emit

app = typer.Typer()

_RUN = typer.Argument(help="A run folder, or one checkpoint of it (RUN/checkpoints/step-N).", metavar="RUN")
_IMAGE = typer.Option(..., "--image", help="A JPEG, PNG or WebP file.")


@app.command(epilog='Example: mmscale generate runs/quickstart --image photo.jpg --prompt "name:"')
def generate(
    run: Path = _RUN,
    image: Path = _IMAGE,
    prompt: str = typer.Option(None, "--prompt", help="Text after the image; by default the first one of training."),
    max_new_tokens: int = typer.Option(32, "--max-new-tokens", min=1, help="Longest answer, tokens."),
    temperature: float = typer.Option(
        0.0, "--temperature", min=0.0, help="0 takes the likeliest token each time; above 0 draws."
    ),
    top_p: float = typer.Option(0.9, "--top-p", min=0.0, max=1.0, help="Draw from tokens of this joint probability."),
    seed: int = typer.Option(0, "--seed", help="Of the draws."),
    json: bool = typer.Option(False, "--json", help="One JSON object: text, image, checkpoint."),
) -> None:
    """Describe an image with a trained model."""
    from mmscale.cli.trained import open_trained
    from mmscale.errors import ConfigError
    from mmscale.generate import describe_image
    from mmscale.models.generation import GreedyConfig, NucleusConfig

    if top_p == 0:
        raise ConfigError("--top-p 0 leaves no token to draw from; --temperature 0 takes the likeliest one")
    trained = open_trained(run)
    config = trained.config
    text = describe_image(
        trained.model,
        image,
        config.evaluation_data(trained.stage),
        config.stage_media(trained.stage),
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        sampling=NucleusConfig(temperature=temperature, top_p=top_p, seed=seed) if temperature else GreedyConfig(),
    )
    if json:
        emit({"text": text, "image": str(image), "checkpoint": str(trained.checkpoint)}, json=True)
    else:
        print(text)
