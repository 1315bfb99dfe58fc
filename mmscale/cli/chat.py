"""``mmscale chat``: a conversation with a trained or imported model in the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mmscale.evaluate.answers import Chat

app = typer.Typer()

_RUN = typer.Argument(help="A run folder, or one checkpoint of it (RUN/checkpoints/step-N).", metavar="RUN")
_HELP = """\
Write a question and press Enter. The model gets the images, videos and sounds whose paths are in the line, for example:
what is this? photo.jpg
/image PATH   add an image to the next question
/video PATH   add a video, or a folder of frames, to the next question
/audio PATH   add a sound to the next question
/reset        forget the conversation
/quit         leave; Ctrl-D does the same, Ctrl-C ends an answer"""
_KINDS = {
    "image": ("an image", "JPEG, PNG or WebP"),
    "video": ("a video", "MP4, WebM, Matroska (.mkv) or GIF"),
    "audio": ("a sound", "WAV, FLAC, MP3, Ogg, Opus or M4A"),
}
"""Name and formats of each kind of file, by the name of its command."""


@app.command(epilog="Example: mmscale chat runs/pretrained")
def chat(
    run: Path = _RUN,
    max_new_tokens: int = typer.Option(512, "--max-new-tokens", min=1, help="Largest length of an answer, tokens."),
    temperature: float = typer.Option(0.0, min=0.0, help="Sampling temperature; 0 always takes the most likely token."),
    top_p: float = typer.Option(0.9, min=0.0, max=1.0, help="Sample from the fewest tokens with this probability."),
    seed: int = typer.Option(0, "--seed", help="Seed of the sampling."),
) -> None:
    """Talk with a model in the terminal, with or without images, videos and sounds.

    The whole conversation is the prompt of each answer. Questions may also come from a pipe, one a line; then the exit
    code is 1 if a line could not be answered.
    """
    from mmscale.cli.console import console
    from mmscale.cli.trained import open_trained
    from mmscale.errors import ConfigError
    from mmscale.evaluate.answers import Chat
    from mmscale.models.sampling import SamplingConfig

    if top_p == 0:
        raise ConfigError("--top-p 0: must be above 0; --temperature 0 takes the most likely token")
    trained = open_trained(run)
    conversation = Chat(
        trained.model,
        trained.config.evaluation_data(trained.stage),
        trained.config.stage_media(trained.stage),
        max_new_tokens=max_new_tokens,
        sampling=SamplingConfig(temperature=temperature, top_p=top_p, seed=seed),
    )
    if sys.stdin.isatty():
        console.print(f"{trained.checkpoint}\n{_HELP}", markup=False)
    if not _talk(conversation):
        raise typer.Exit(1)


def _talk(conversation: Chat) -> bool:
    """Answer the lines of stdin until it ends. Return whether all could be answered."""
    from data_pipeline.errors import DataPipelineError
    from mmscale.cli.console import console
    from mmscale.errors import MMScaleError

    waiting: list[Path] = []
    all_answered = True
    for line in _lines():
        command, _, rest = line.partition(" ")
        names_file = command.startswith("/") and command[1:] in _KINDS
        if command == "/quit":
            break
        try:
            if command == "/reset":
                conversation.reset()
                waiting.clear()
            elif names_file:
                waiting.append(_file(command, rest))
            elif command.startswith("/") and not Path(command).exists():
                console.print(_HELP, markup=False)
            else:
                words, files = _split(line)
                _answer(conversation, words, [*waiting, *files])
                waiting.clear()
        except KeyboardInterrupt:
            print()
        except (MMScaleError, DataPipelineError) as error:
            if not names_file:
                waiting.clear()  # Otherwise a damaged file would fail every further question too.
            console.print(f"mmscale: {error}", markup=False)
            all_answered = False
    return all_answered


def _lines() -> Iterator[str]:
    """Yield the lines that the user writes, without empty ones."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  Gives ``input`` keys for editing and earlier lines.

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


def _kind(path: Path) -> str | None:
    """Return ``image``, ``video`` or ``audio`` for an existing file, by its suffix; None for any other path."""
    from data_pipeline.shards.media_kind import media_kind

    return media_kind(path.suffix.lower().lstrip(".")) if path.is_file() else None


def _file(command: str, path: str) -> Path:
    from mmscale.errors import ConfigError

    words, (name, expected) = path.strip().strip("'\""), _KINDS[command[1:]]
    if command == "/video" and Path(words).is_dir():
        return Path(words)
    if not Path(words).is_file():
        raise ConfigError(f"{command} {words}: no such file; write the path of a {expected} file")
    if _kind(Path(words)) != command[1:]:
        raise ConfigError(f"{command} {words}: its name is not that of {name}; expected a {expected} file")
    return Path(words)


def _split(line: str) -> tuple[str, list[Path]]:
    """Return the words of a line without the paths of media, and these paths. One with blanks is quoted."""
    try:
        words = shlex.split(line)
    except ValueError:  # An apostrophe, as in "what's this".
        words = line.split()
    files = [word for word in words if _kind(Path(word)) is not None]
    if not files:
        return line, []
    for file in files:
        for written in (shlex.quote(file), f'"{file}"', file):
            if written in line:
                line = line.replace(written, "", 1)
                break
    return " ".join(line.split()), [Path(file) for file in files]


def _answer(conversation: Chat, words: str, files: list[Path]) -> None:
    from mmscale.cli.generate import Printer

    printer = Printer()
    kinds = ["video" if file.is_dir() else _kind(file) for file in files]
    images, videos, sounds = ([file for file, one in zip(files, kinds, strict=True) if one == kind] for kind in _KINDS)
    printer.end(conversation.ask(words, images, printer.show, videos, sounds))
