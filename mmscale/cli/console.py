"""Output and error handling of every command: the terminal, results as text or JSON, progress, and exit codes.

Results go to stdout (``emit``). Messages for a person (``console``, progress, errors) go to stderr, so that
``mmscale VERB --json | jq`` always works.
"""

from __future__ import annotations

import atexit
import errno
import json as json_module
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from data_pipeline.errors import DataConfigError, DataPipelineError, out_of_memory
from data_pipeline.io.missing import no_such_file
from mmscale.errors import MMScaleError

T = TypeVar("T")

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Messages for a person: stderr, with colours only on a terminal."""

COMPLAINT_VARIABLE = "MMSCALE_COMPLAINT"
"""Environment variable with an inherited file descriptor that gets a copy of an error's message.

``mmscale launch local`` sets it.
"""
_PLAIN_INTERVAL_SECONDS = 10.0
"""Interval between progress lines when stderr is not a terminal."""


def emit(data: Mapping[str, Any], json: bool = False) -> None:
    """Print results to stdout: one JSON object, or one aligned ``key  value`` line per value.

    Args:
        data: The results. The text form joins nested keys by dots.
        json: Whether to print JSON.
    """
    if json:
        print(json_module.dumps(data, indent=2, ensure_ascii=False, default=str), flush=True)
        return
    rows = list(_leaves(data, ""))
    width = max((len(key) for key, _ in rows), default=0)
    for key, value in rows:
        print(f"{key:<{width}}  {_text(value)}".rstrip())
    sys.stdout.flush()


def _leaves(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json_module.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple | dict):
        return json_module.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows to stdout: a table with borders on a terminal that is wide enough, else aligned columns of text.

    Numbers are aligned to the right. A missing or null value is a dash.

    Args:
        rows: Values by heading of the column.
    """
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    is_number = [
        all(isinstance(row.get(key), int | float | None) and not isinstance(row.get(key), bool) for row in rows)
        for key in columns
    ]
    lines = [columns, *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    output = Console(highlight=False)
    if output.is_terminal and sum(widths) + 3 * len(widths) < output.width:  # Broken cells would be hard to read.
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for heading, right in zip(columns, is_number, strict=True):
            table.add_column(heading, justify="right" if right else "left")
        for row in cells:
            table.add_row(*map(Text, row))
        output.print(table)
        return
    for line in lines:
        padded = zip(line, widths, is_number, strict=True)
        print("  ".join(f"{cell:>{width}}" if right else f"{cell:<{width}}" for cell, width, right in padded).rstrip())
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4g}"
    return printable(_text(value))


def warn(sentences: Iterable[str]) -> None:
    """Print each sentence as a warning to stderr."""
    for sentence in sentences:
        console.print(f"warning: {printable(sentence)}", style="yellow", markup=False)


def printable(text: str) -> str:
    """Replace the unprintable characters of a text from data, which could control the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


class Meter:
    """Progress of one long task; created by :func:`progress`."""

    def __init__(self, update: Callable[[int, str], None]) -> None:
        self._update = update

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add ``count`` finished units.

        A terminal displays a ``note``, such as a file name, until the next one. Otherwise the note is printed only if a
        progress line is due.
        """
        self._update(count, note)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Meter]:
    """Display progress: a bar on a terminal, else a plain line at most every ten seconds and one at the end.

    Args:
        description: Name of the task in a few words.
        total: Number of units; None if unknown.
    """
    if console.is_terminal:
        with _bar(description, total) as meter:
            yield meter
        return
    start = last = time.monotonic()
    done = 0
    of = "" if total is None else f"/{total}"

    def update(count: int, note: str) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _PLAIN_INTERVAL_SECONDS:
            last = now
            print(f"{description}: {done}{of} in {now - start:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)

    yield Meter(update)
    print(f"{description}: {done}{of} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Meter]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def update(count: int, note: str) -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield Meter(update)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield ``items`` and display progress."""
    with progress(description, len(items)) as meter:
        for item in items:
            yield item
            meter.advance()


def exit_process(code: int) -> NoReturn:
    """Exit the process with ``code`` after the exit handlers, but without Python's finalisation.

    After a run on several ranks, gloo threads may still release their last tensors. A thread that requests the
    interpreter lock during finalisation is terminated inside C++ code, which aborts the process. A successful run would
    then sometimes exit with SIGABRT.

    If stdout or stderr cannot be flushed, exit code 0 becomes 1, except if the reader closed the pipe.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            pass  # The reader closed the pipe on purpose, as ``head`` does.
        except OSError:  # The output is incomplete.
            code = code or 1
    os._exit(code)


def exit_code_of(run: Callable[[], None]) -> int:
    """Run a command, print its error if it fails, and return the exit code.

    An expected error prints one message without a traceback; the exit code is 1 (the command failed) or 2 (wrong use).
    An ``OSError`` is expected if it names a file or the disk is full. Ctrl-C is 130. Out of memory prints a message,
    with exit code 1. Any other exception is a defect of mmscale: the traceback is printed, with exit code 1.

    Args:
        run: The command. It returns (exit code 0) or raises ``SystemExit`` or an error.
    """
    try:
        run()
    except SystemExit as exit_request:
        return _exit_code(exit_request)
    except KeyboardInterrupt:
        return _print_error("interrupted", 130)
    except MMScaleError as error:
        return _print_error(error, error.exit_code)
    except DataConfigError as error:
        return _print_error(error, 2)
    except DataPipelineError as error:
        return _print_error(error, 1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            return _print_defect(error)
        if isinstance(error, FileNotFoundError) and isinstance(error.filename, str | Path):
            return _print_error(f"{error.filename}: {no_such_file(Path(error.filename))}", 1)
        remedy = "; free space, then start the same command again" if error.errno == errno.ENOSPC else ""
        return _print_error(f"{error.filename or 'disk'}: {error.strerror}{remedy}", 1)
    except Exception as error:
        return _print_defect(error)
    return 0


def _exit_code(exit_request: SystemExit) -> int:
    if exit_request.code is None or isinstance(exit_request.code, int):
        return exit_request.code or 0
    return _print_error(exit_request.code, 1)


def _print_error(message: object, code: int) -> int:
    text = f"mmscale: {message}\n"
    sys.stderr.write(text)
    sys.stderr.flush()
    copy = os.environ.get(COMPLAINT_VARIABLE)
    if copy is not None:
        with suppress(OSError):
            os.write(int(copy), text.encode(errors="replace"))
    return code


def _print_defect(error: Exception) -> int:
    if (reason := out_of_memory(error)) is not None:
        return _print_error(
            f"out of memory ({reason}): free memory on this machine, or reduce what the command processes at once", 1
        )
    traceback.print_exc()
    return _print_error("this is a defect of mmscale, not of your input; please report the lines above", 1)
