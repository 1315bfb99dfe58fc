"""What every verb shares: the terminal, figures as text or JSON, progress, and the door through which errors leave.

Figures go to stdout (``emit``), everything meant for a person's eyes (``console``, progress, errors) to stderr, so that
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from data_pipeline.errors import DataConfigError, DataPipelineError, out_of_memory
from mmscale.errors import MMScaleError

T = TypeVar("T")

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""For people: stderr, colours only on a terminal."""

COMPLAINT_VARIABLE = "MMSCALE_COMPLAINT"
"""Number of an inherited file that gets a copy of the error's sentence; ``mmscale launch local`` sets it."""
_PLAIN_INTERVAL_SECONDS = 10.0
"""A log file gets a progress line this often; a terminal gets a moving bar."""


def emit(data: Mapping[str, Any], json: bool = False) -> None:
    """Prints figures to stdout: one JSON object, or one aligned ``key  value`` line a leaf.

    Args:
        data: Possibly nested; nested keys are joined by dots in text form.
        json: The JSON form.
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


def warn(sentences: Iterable[str]) -> None:
    """Prints each sentence as a warning."""
    for sentence in sentences:
        console.print(f"warning: {printable(sentence)}", style="yellow", markup=False)


def printable(text: str) -> str:
    """Text that comes from data, without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


class Meter:
    """Progress of one long piece of work; made by :func:`progress`."""

    def __init__(self, update: Callable[[int, str], None]) -> None:
        self._update = update

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are done; ``note`` (a file name, say) replaces the one shown."""
        self._update(count, note)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Meter]:
    """A moving bar on a terminal, else a plain line every ten seconds and one at the end.

    Args:
        description: What is being done, in a few words.
        total: Units of work; None if unknown.
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


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields ``items`` under a progress bar; ``total`` defaults to their length where they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total) as meter:
        for item in items:
            yield item
            meter.advance()


def leave(code: int) -> NoReturn:
    """Ends the process with ``code``, without Python's finalisation.

    After a run on several ranks threads of gloo may still drop their last tensors. One that asks for the interpreter
    while it is taken down is ended inside of C++, which aborts the process: a run that went well would now and then
    end with SIGABRT.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            pass  # The reader has seen enough.
        except OSError:  # What was printed is not all there.
            code = code or 1
    os._exit(code)


def door(run: Callable[[], None]) -> int:
    """Runs a verb and turns whatever leaves it into an exit code.

    A user's mistake is one sentence on stderr and exit code 1 (the thing failed) or 2 (wrong use). Ctrl-C is 130.
    A failed allocation is a sentence too, with exit code 1. Anything else is a defect of ours: the traceback stays
    visible and the exit code is 1.

    Args:
        run: Ends by returning (0) or by ``SystemExit``.

    Returns:
        The exit code; never raises.
    """
    try:
        run()
    except SystemExit as leave:
        return _exit_code(leave)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except MMScaleError as error:
        return _complain(error, error.exit_code)
    except DataConfigError as error:
        return _complain(error, 2)
    except DataPipelineError as error:
        return _complain(error, 1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            return _bug(error)
        return _complain(f"{error.filename or 'disk'}: {error.strerror}", 1)
    except Exception as error:
        return _bug(error)
    return 0


def _exit_code(leave: SystemExit) -> int:
    if leave.code is None or isinstance(leave.code, int):
        return leave.code or 0
    return _complain(leave.code, 1)


def _complain(what: object, code: int) -> int:
    text = f"mmscale: {what}\n"
    sys.stderr.write(text)
    sys.stderr.flush()
    copy = os.environ.get(COMPLAINT_VARIABLE)
    if copy is not None:
        with suppress(OSError):
            os.write(int(copy), text.encode(errors="replace"))
    return code


def _bug(error: Exception) -> int:
    if (reason := out_of_memory(error)) is not None:
        return _complain(f"out of memory ({reason}): free memory on this machine, or give the command less at once", 1)
    traceback.print_exc()
    return _complain("this is a defect of mmscale, not of your input; please report the lines above", 1)
