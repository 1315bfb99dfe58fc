"""``mmscale generate``: a trained model answers a prompt, with images or without."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from mmscale.cli.console import emit

app = typer.Typer()

_RUN = typer.Argument(help="A run folder, or one checkpoint of it (RUN/checkpoints/step-N).", metavar="RUN")
_IMAGES = typer.Option(None, "--image", help="A JPEG, PNG or WebP file; may be given several times.")
_PROMPT = typer.Option(
    None,
    "--prompt",
    help="What is asked; by default the first prompt of training. Images stand where it says <image> (the next one) "
    "or <image-2> (the second), else before it.",
)
_TEMPERATURE = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time; above 0 draws.")
_TOP_K = typer.Option(None, min=1, help="Draw from so many tokens, the likeliest.")
_TOP_P = typer.Option(0.9, min=0.0, max=1.0, help="Draw from the fewest tokens of this joint probability.")
_MIN_P = typer.Option(0.0, min=0.0, max=1.0, help="Draw from tokens at least so likely, relative to the likeliest.")
_PENALTY = typer.Option(1.0, help="Above 1 makes tokens less likely that were said before; 1 does nothing.")
_STOP = typer.Option(None, "--stop", help="A text that ends an answer; may be given several times.")


@app.command(epilog='Example: mmscale generate runs/quickstart --image photo.jpg --prompt "name:"')
def generate(
    run: Path = _RUN,
    image: list[Path] = _IMAGES,
    prompt: str = _PROMPT,
    num: int = typer.Option(1, "--num", min=1, help="Answers, each drawn anew."),
    max_new_tokens: int = typer.Option(32, "--max-new-tokens", min=1, help="Longest answer, tokens."),
    temperature: float = _TEMPERATURE,
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    min_p: float = _MIN_P,
    repetition_penalty: float = _PENALTY,
    seed: int = typer.Option(0, "--seed", help="Of the draws."),
    stop: list[str] = _STOP,
    stream: bool = typer.Option(False, "--stream", help="Print the answer while it grows."),
    json: bool = typer.Option(False, "--json", help="One JSON object: text (the first), texts, images, checkpoint."),
) -> None:
    """Ask a trained model: about images, or about nothing but text."""
    from mmscale.cli.trained import open_trained
    from mmscale.errors import ConfigError
    from mmscale.evaluate.answers import respond
    from mmscale.models.sampling import SamplingConfig

    if top_p == 0 or repetition_penalty <= 0:
        raise ConfigError(
            f"--top-p {top_p:g} --repetition-penalty {repetition_penalty:g}: both must be above 0; "
            "--temperature 0 takes the likeliest token"
        )
    if num > 1 and not temperature:
        raise ConfigError(f"--num {num}: all answers would be the same; give a --temperature above 0")
    if stream and (num > 1 or json):
        raise ConfigError("--stream prints one answer as it grows: leave out --num and --json")
    trained = open_trained(run)
    printer = _Printer()
    texts = respond(
        trained.model,
        trained.config.evaluation_data(trained.stage),
        trained.config.stage_media(trained.stage),
        images=image or (),
        prompt=prompt,
        num=num,
        max_new_tokens=max_new_tokens,
        sampling=SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        stop=stop or (),
        show=printer.show if stream else None,
    )
    if json:
        images = [str(path) for path in image or ()]
        emit({"text": texts[0], "texts": texts, "images": images, "checkpoint": str(trained.checkpoint)}, json=True)
    elif stream:
        printer.end(texts[0])
    else:
        print("\n\n".join(texts))


class _Printer:
    """Prints what is new of a text that grows."""

    def __init__(self) -> None:
        self._printed = ""

    def show(self, text: str) -> None:
        """Prints whole letters only: of a letter of several bytes the first ones decode to U+FFFD."""
        text = text.lstrip().rstrip("\ufffd")
        if text.startswith(self._printed):
            sys.stdout.write(text[len(self._printed) :])
            sys.stdout.flush()
            self._printed = text

    def end(self, text: str) -> None:
        """Prints the rest."""
        self.show(text)
        print()
