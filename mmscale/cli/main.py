"""The command ``mmscale``: a table of verbs, each imported only when it is called.

A verb is a file in this folder with ``app = typer.Typer()``. The file has one ``@app.command(epilog=...)``, or several
for a family such as ``mmscale data index``. The epilog is an example. Import heavy modules (torch, DeepSpeed) inside
the functions, so that help is instant. :func:`mmscale.cli.console.exit_code_of` handles the errors of all commands.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, NoReturn, TextIO

import typer

from data_pipeline.io.trusted_code import allow_commands
from mmscale.cli.console import console, exit_code_of, exit_process
from mmscale.cli.run_file import ALLOW_COMMANDS
from mmscale.errors import RequestError


@dataclass(frozen=True)
class Verb:
    """One row of ``mmscale --help``; its commands are in ``mmscale/cli/NAME.py``."""

    name: str
    help: str
    family: bool = False
    """Whether the file has several commands, called as ``mmscale NAME COMMAND``."""

    def load(self) -> typer.Typer:
        """Import the verb's file."""
        app: typer.Typer = import_module(f"mmscale.cli.{self.name}").app
        return app


VERBS = (
    Verb("init", "Write the file of a new run from a model and a data set, with sizes that fit this machine."),
    Verb("check", "Prove before a run that all its ranks make the same collectives, so that they cannot hang."),
    Verb("train", "Train the model of CONFIG, resuming from the run folder's checkpoint if it has one."),
    Verb("plan", "Plan a run on a cluster: memory, time, cost, limits, and what would help."),
    Verb("doctor", "Examine this machine or an allocation: packages, devices, kernels, ranks, storage, limits."),
    Verb("launch", "Start training on several ranks: on this machine or through SLURM.", family=True),
    Verb("compare", "Train variants of a run under equal conditions and write one page that compares them."),
    Verb("eval", "Score a trained model on held-out samples."),
    Verb("generate", "Answer a prompt with a trained model, with or without images."),
    Verb("chat", "Talk with a model in the terminal, with or without images."),
    Verb("params", "Count the parameters of a model: in total, and active for one token."),
    Verb("report", "Write report.html of a run: curves, samples, configuration."),
    Verb("config", "Explain keys, show where values come from, compare files, check a run, or shrink it.", family=True),
    Verb("data", "Create, index, verify and describe the shards that training reads.", family=True),
    Verb("checkpoint", "List, verify, export, import and prune checkpoints.", family=True),
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return the exit code.

    0 is success, 1 a failure, 2 wrong use, 130 an interrupt. ``launch``, ``train`` and ``compare`` document others.
    """
    words = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():  # Restores warnings.showwarning on exit.
        warnings.showwarning = _show_warning
        return exit_code_of(lambda: _run(words))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print warnings of mmscale as messages for the user, without the line of code that raised them."""
    ours = category.__module__.partition(".")[0] in ("mmscale", "data_pipeline")
    text = (
        f"mmscale: warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    )
    (file or sys.stderr).write(text)


def _run(words: list[str]) -> None:
    called = next((word for word in words if not word.startswith("-")), None)
    command = typer.main.get_command(build_app(called))
    try:
        code = command.main(args=words, prog_name="mmscale", standalone_mode=False)
    except _UsageError as error:
        error.show()
        example = error.ctx and error.ctx.command.epilog
        if hint := _key_hint(error, words) or example:
            console.print(hint, markup=False)
        raise SystemExit(error.exit_code) from None
    if isinstance(code, int):  # The exit code of typer.Exit.
        raise SystemExit(code)


_UsageError: Any = typer.BadParameter.__mro__[2]
"""``ClickException``. Some versions of typer contain a copy of click, whose classes differ from those of click."""


def _key_hint(error: Any, words: list[str]) -> str | None:
    """Return how to write an unknown option that is a key of the configuration; None if it is no key.

    None also if the command takes no ``KEY=VALUE``.
    """
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or context is None or not any("KEY=VALUE" in str(p.metavar) for p in context.command.params):
        return None
    from mmscale.cli.config import schema_of
    from mmscale.config.explain import keys_named

    keys = keys_named(schema_of("run"), option.lstrip("-").replace("-", "_"))
    keys.sort(key=lambda key: key.count("."))
    if not keys:
        return None
    place = next(number for number, word in enumerate(words) if word.partition("=")[0] == option)
    given, following = words[place].partition("=")[2], words[place + 1 : place + 2]
    value = given or next((word for word in following if not word.startswith("-") and "=" not in word), "VALUE")
    named = [f"{key.replace('*', '0')}={value}" for key in keys[:_MOST_KEYS]]
    return (
        f"{option} is a key of the configuration: write {' or '.join(named)} (KEY=VALUE, without dashes; "
        f"`mmscale config explain {keys[0]}` describes it)"
    )


_MOST_KEYS = 4


def build_app(called: str | None) -> typer.Typer:
    """Build the command tree. Only the verb ``called`` is imported; the others are just rows of the help."""
    app = typer.Typer(
        name="mmscale",
        help="Train multimodal LLMs: from image-text shards to a resumable run on a laptop or a cluster.",
        epilog="Example: mmscale launch local configs/quickstart.yaml --ranks 2",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # Plain help: rich is not imported, and [KEY=VALUE] is not read as markup.
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
    """Placeholder for a verb that was not called."""


def _print_version(requested: bool) -> None:
    if requested:
        print(f"mmscale {version('mmscale')}")
        raise typer.Exit


_VERSION = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop.")


_LOCAL_RANK = typer.Option(None, "--local_rank", "--local-rank", hidden=True)
"""The deepspeed launcher adds ``--local_rank=N`` before the arguments of a program, unless told ``--no_local_rank``."""


def _root(version_: bool = _VERSION, allowed: bool = ALLOW_COMMANDS, local_rank: int = _LOCAL_RANK) -> None:
    allow_commands.set(allowed)
    if local_rank is not None and os.environ.get("LOCAL_RANK") != str(local_rank):
        raise RequestError(
            f"--local_rank={local_rank}: the rank comes from the variables of the launcher, and LOCAL_RANK is "
            f"{os.environ.get('LOCAL_RANK', 'not set')}; leave the option out"
        )


def entry() -> NoReturn:
    """Run the command ``mmscale`` and exit the process."""
    exit_process(main())


if __name__ == "__main__":
    entry()
