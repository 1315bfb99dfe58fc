"""The command ``mmscale``: one table of verbs, each loaded only when it is called.

A verb is a file in this folder with ``app = typer.Typer()``. A file of one verb has one ``@app.command(epilog=...)``; a
family (``mmscale data index``) has one command for each. The epilog is an example, and heavy imports (torch, DeepSpeed)
stand inside the functions, so that help is instant. Errors are not caught here: they leave through
:func:`mmscale.cli.console.door`.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn, TextIO

import typer

from mmscale.cli.console import door, leave
from mmscale.cli.run_file import ALLOW_COMMANDS, allow_commands


@dataclass(frozen=True)
class Verb:
    """One row of ``mmscale --help``; ``mmscale/cli/NAME.py`` holds it."""

    name: str
    help: str
    family: bool = False
    """Whether the file holds several commands, called as ``mmscale NAME COMMAND``."""

    def load(self) -> typer.Typer:
        """Imports the verb's file, and no other's."""
        app: typer.Typer = import_module(f"mmscale.cli.{self.name}").app
        return app


VERBS = (
    Verb("train", "Train a model as CONFIG says, or go on where the run folder left off."),
    Verb("launch", "Start training on several ranks: on this machine or through SLURM.", family=True),
    Verb("compare", "Train variants of a run from one start on equal terms, and write one page about them."),
    Verb("eval", "Score a trained model on held-out samples."),
    Verb("generate", "Describe an image with a trained model."),
    Verb("params", "Count the parameters of a model, in all and in use for one token."),
    Verb("report", "Write report.html of a run: curves, samples, configuration."),
    Verb("config", "Show where each value of a configuration comes from, or check it.", family=True),
    Verb("data", "Make, index, check and describe the shards that training reads.", family=True),
    Verb("checkpoint", "List, verify, export, import and prune checkpoints.", family=True),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code (0 done, 1 it failed, 2 wrong use, 130 interrupted)."""
    words = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():  # Restores what the next line replaces.
        warnings.showwarning = _show_warning
        return door(lambda: _run(words))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are sentences for a user, without the place in our code that gave them."""
    ours = category.__module__.partition(".")[0] in ("mmscale", "data_pipeline")
    text = (
        f"mmscale: warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    )
    (file or sys.stderr).write(text)


def _run(words: list[str]) -> None:
    called = next((word for word in words if not word.startswith("-")), None)
    command = typer.main.get_command(build_app(called))
    command.main(args=words, prog_name="mmscale")


def build_app(called: str | None) -> typer.Typer:
    """The command tree with the verb ``called`` loaded and the others as rows of the help only."""
    app = typer.Typer(
        name="mmscale",
        help="Train multimodal LLMs: from image-text shards to a resumable run on a laptop or a cluster.",
        epilog="Example: mmscale launch local configs/quickstart.yaml --ranks 2",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # Plain help: no rich import, and [key=value] is no markup.
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    app.callback()(_root)
    for verb in VERBS:
        if verb.name == called:
            _add(app, verb)
        else:
            app.command(verb.name, short_help=verb.help)(_row)
    return app


def _add(app: typer.Typer, verb: Verb) -> None:
    loaded = verb.load()
    if verb.family:
        app.add_typer(
            loaded, name=verb.name, help=verb.help, no_args_is_help=True, epilog=f"Example: mmscale {verb.name} --help"
        )
        return
    (command,) = loaded.registered_commands
    command.name = verb.name
    app.registered_commands.append(command)


def _row() -> None:
    """Stands for a verb that was not called."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mmscale {version('mmscale')}")
        raise typer.Exit


_VERSION = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop.")


def _root(version_: bool = _VERSION, allowed: bool = ALLOW_COMMANDS) -> None:
    allow_commands.set(allowed)


def entry() -> NoReturn:
    """The command ``mmscale``."""
    leave(main())


if __name__ == "__main__":
    entry()
