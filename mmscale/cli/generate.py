"""``mmscale generate``: answer a prompt about images, videos and sounds with a trained model, or draw what it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import emit, printable

if TYPE_CHECKING:
    from mmscale.models.sampling import SamplingConfig

app = typer.Typer()

_RUN = typer.Argument(help="A run folder, or one checkpoint of it (RUN/checkpoints/step-N).", metavar="RUN")
_IMAGES = typer.Option(None, "--image", help="A JPEG, PNG or WebP file; repeatable.")
_VIDEOS = typer.Option(
    None,
    "--video",
    help="An MP4, WebM, Matroska or GIF file, or a folder of frames X beside X.json, which holds their rate "
    '({"fps": 8}); repeatable. <video> inserts it.',
)
_SOUNDS = typer.Option(None, "--audio", help="A WAV, FLAC, MP3, Ogg, Opus or M4A file; repeatable. <audio> inserts it.")
_PROMPT = typer.Option(
    None,
    "--prompt",
    help="The prompt; by default the first prompt of training. <image> inserts the next image, <image-2> the second "
    "one; files without a mark precede the prompt. With --images, the text to draw.",
)
_TEMPERATURE = typer.Option(
    None, min=0.0, help="Sampling temperature; 0 always takes the most likely token. Default: 0; for drawings 1."
)
_TOP_K = typer.Option(None, min=1, help="Sample from this many of the most likely tokens; by default from all.")
_TOP_P = typer.Option(
    None,
    min=0.0,
    max=1.0,
    help="Sample from the fewest tokens with this total probability. Default: 0.9; for drawings 1.",
)
_MIN_P = typer.Option(
    0.0, min=0.0, max=1.0, help="Sample from tokens with at least this fraction of the highest probability."
)
_PENALTY = typer.Option(None, help="Repetition penalty: above 1 makes earlier tokens less likely. Default: 1, none.")
_STOP = typer.Option(None, "--stop", help="A text that ends an answer; repeatable.")
_NUM = typer.Option(None, "--num", min=1, help="Number of answers, each sampled independently. Default: 1.")
_LENGTH = typer.Option(
    None, "--max-new-tokens", min=1, help="Largest length of an answer, tokens. Default: 32; with --output 512 of text."
)
_DRAWINGS = typer.Option(None, "--images", min=1, max=1024, help="Draw this many images of the prompt.")
_SIZE = typer.Option(
    None, "--size", metavar="H[xW]", help="Size of a drawing, pixels; by default the only size of training."
)
_GUIDANCE = typer.Option(
    None, "--guidance", min=1.0, help="Scale of classifier-free guidance of a drawing. Default: 1, none."
)
_TOKENIZER = typer.Option(
    None,
    "--tokenizer",
    metavar="RUN",
    help="The image tokenizer that encoded the data, if it is no part of the model: its run folder or a checkpoint.",
)
_OUTPUT = typer.Option(
    None,
    "--output",
    metavar="DIR",
    help="Folder for the drawings. Without --images, the answer is in words and may contain drawings (Emu3).",
)
_JSON = typer.Option(
    False,
    "--json",
    help="Print one JSON object: text (the first answer), texts, images, videos, sounds, checkpoint; of drawings "
    "images, contact, prompt, seed, checkpoint; of an answer with drawings its parts.",
)


@app.command(
    epilog='Example: mmscale generate runs/quickstart --image photo.jpg --prompt "name:"; '
    'mmscale generate runs/emoji-draw --prompt "red apple" --images 4 --output apples'
)
def generate(
    run: Path = _RUN,
    image: list[Path] = _IMAGES,
    video: list[Path] = _VIDEOS,
    audio: list[Path] = _SOUNDS,
    prompt: str = _PROMPT,
    num: int = _NUM,
    max_new_tokens: int = _LENGTH,
    temperature: float = _TEMPERATURE,
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    min_p: float = _MIN_P,
    repetition_penalty: float = _PENALTY,
    seed: int = typer.Option(0, "--seed", help="Seed of the sampling. Drawing i uses this seed plus i, from 0."),
    stop: list[str] = _STOP,
    stream: bool = typer.Option(False, "--stream", help="Print the answer token by token."),
    images: int = _DRAWINGS,
    size: str = _SIZE,
    guidance: float = _GUIDANCE,
    tokenizer: Path = _TOKENIZER,
    output: Path = _OUTPUT,
    json: bool = _JSON,
) -> None:
    """Answer a prompt about images, videos and sounds with a trained model; or draw images of it."""
    from mmscale.cli.drawing_files import DrawingRequest
    from mmscale.errors import ConfigError
    from mmscale.models.sampling import SamplingConfig

    penalty = 1.0 if repetition_penalty is None else repetition_penalty
    if top_p == 0 or penalty <= 0:
        raise ConfigError(
            f"--top-p {1 if top_p is None else top_p:g} --repetition-penalty {penalty:g}: both must be above 0; "
            "--temperature 0 takes the most likely token"
        )
    draws = images is not None or output is not None
    sampling = SamplingConfig(
        temperature=float(draws) if temperature is None else temperature,
        top_k=top_k,
        top_p=(1.0 if draws else 0.9) if top_p is None else top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        seed=seed,
    )
    request = DrawingRequest(size, guidance or 1.0, tokenizer, output)
    answers: dict[str, object] = {
        "image": image,
        "video": video,
        "audio": audio,
        "num": num,
        "stop": stop,
        "stream": stream,
        "repetition-penalty": repetition_penalty,
    }
    if images is not None:
        _leave_out({**answers, "max-new-tokens": max_new_tokens}, "belongs to answers in words", "--images")
        request.draw(run, prompt, images, sampling, json=json)
        return
    if output is not None:
        _leave_out(answers, "belongs to answers without drawings", "--output")
        request.answer(run, prompt, max_new_tokens or 512, sampling, json=json)
        return
    drawing = {"size": size, "guidance": guidance, "tokenizer": tokenizer}
    _leave_out(drawing, "belongs to drawings; give --output DIR too")
    _answer(
        run,
        (image or (), video or (), audio or ()),
        prompt,
        num or 1,
        max_new_tokens or 32,
        sampling,
        stop or (),
        stream=stream,
        json=json,
    )


def _leave_out(options: dict[str, object], why: str, other: str = "") -> None:
    """Raise for the first option that is given although it has no effect."""
    from mmscale.errors import ConfigError

    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise ConfigError(f"--{name} {why}" + (f"; leave it out with {other}" if other else ""))


def _answer(
    run: Path,
    media: tuple[Sequence[Path], Sequence[Path], Sequence[Path]],
    prompt: str | None,
    num: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: Sequence[str],
    *,
    stream: bool,
    json: bool,
) -> None:
    """Print answers in words. ``media``: files of images, of videos, and of sounds."""
    from mmscale.cli.trained import open_trained
    from mmscale.errors import ConfigError
    from mmscale.evaluate.answers import respond

    if num > 1 and not sampling.is_random:
        raise ConfigError(f"--num {num}: all answers would be the same; give a --temperature above 0")
    if stream and (num > 1 or json):
        raise ConfigError("--stream prints one answer as it grows: leave out --num and --json")
    trained = open_trained(run)
    printer, (images, videos, sounds) = Printer(), media
    texts = respond(
        trained.model,
        trained.config.evaluation_data(trained.stage),
        trained.config.stage_media(trained.stage),
        images=images,
        videos=videos,
        sounds=sounds,
        prompt=prompt,
        num=num,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        show=printer.show if stream else None,
    )
    if json:
        files = {"images": images, "videos": videos, "sounds": sounds}
        names = {kind: [str(path) for path in paths] for kind, paths in files.items()}
        emit({"text": texts[0], "texts": texts, **names, "checkpoint": str(trained.checkpoint)}, json=True)
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
