"""``mmscale generate``: answer a prompt with a trained model, with or without images."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from mmscale.cli.console import emit, printable

app = typer.Typer()

_RUN = typer.Argument(help="A run folder, or one checkpoint of it (RUN/checkpoints/step-N).", metavar="RUN")
_IMAGES = typer.Option(None, "--image", help="A JPEG, PNG or WebP file; repeatable.")
_PROMPT = typer.Option(
    None,
    "--prompt",
    help="The prompt; by default the first prompt of training. <image> inserts the next image, <image-2> the second "
    "one; images without a mark precede the prompt.",
)
_TEMPERATURE = typer.Option(0.0, min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
_TOP_K = typer.Option(None, min=1, help="Sample from this many of the most likely tokens; by default from all.")
_TOP_P = typer.Option(0.9, min=0.0, max=1.0, help="Sample from the fewest tokens with this total probability.")
_MIN_P = typer.Option(
    0.0, min=0.0, max=1.0, help="Sample from tokens with at least this fraction of the highest probability."
)
_PENALTY = typer.Option(1.0, help="Repetition penalty: above 1 makes earlier tokens less likely; 1 changes nothing.")
_STOP = typer.Option(None, "--stop", help="A text that ends an answer; repeatable.")


@app.command(epilog='Example: mmscale generate runs/quickstart --image photo.jpg --prompt "name:"')
def generate(
    run: Path = _RUN,
    image: list[Path] = _IMAGES,
    prompt: str = _PROMPT,
    num: int = typer.Option(1, "--num", min=1, help="Number of answers, each sampled independently."),
    max_new_tokens: int = typer.Option(32, "--max-new-tokens", min=1, help="Largest length of an answer, tokens."),
    temperature: float = _TEMPERATURE,
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    min_p: float = _MIN_P,
    repetition_penalty: float = _PENALTY,
    seed: int = typer.Option(0, "--seed", help="Seed of the sampling."),
    stop: list[str] = _STOP,
    stream: bool = typer.Option(False, "--stream", help="Print the answer token by token."),
    json: bool = typer.Option(
        False, "--json", help="Print one JSON object: text (the first answer), texts, images, checkpoint."
    ),
) -> None:
    """Answer a prompt with a trained model, with or without images."""
    from mmscale.cli.trained import open_trained
    from mmscale.errors import ConfigError
    from mmscale.evaluate.answers import respond
    from mmscale.models.sampling import SamplingConfig

    if top_p == 0 or repetition_penalty <= 0:
        raise ConfigError(
            f"--top-p {top_p:g} --repetition-penalty {repetition_penalty:g}: both must be above 0; "
            "--temperature 0 takes the most likely token"
        )
    if num > 1 and not temperature:
        raise ConfigError(f"--num {num}: all answers would be the same; give a --temperature above 0")
    if stream and (num > 1 or json):
        raise ConfigError("--stream prints one answer as it grows: leave out --num and --json")
    trained = open_trained(run)
    printer = Printer()
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


class Printer:
    """Prints the new part of a growing text."""

    def __init__(self) -> None:
        self._printed = ""

    def show(self, text: str) -> None:
        """Print the new characters of ``text``, except a final U+FFFD: an incomplete character decodes to it.

        Prints nothing if ``text`` does not begin with the printed text.
        """
        text = text.lstrip().rstrip("\ufffd")
        if sys.stdout.isatty():  # A model may write sequences that control the terminal.
            text = "".join(letter if letter in "\n\t" else printable(letter) for letter in text)
        if text.startswith(self._printed):
            sys.stdout.write(text[len(self._printed) :])
            sys.stdout.flush()
            self._printed = text

    def end(self, text: str) -> None:
        """Print the remaining characters of the complete answer, as ``show`` does, and a newline."""
        self.show(text)
        print()
