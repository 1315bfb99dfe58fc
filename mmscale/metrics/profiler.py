"""Record every operation of every thread during a few steps, for a trace viewer.

    with profile_steps(...) as profiler:
        for each step: ...; profiler.step()        -->  RUN/profile/rank-00000-steps-4-6.json

The phases of ``engine.step_clock`` and the wait for data are ranges in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import profiler

from mmscale.errors import MMScaleError
from mmscale.metrics.config import MetricsConfig

PROFILE = "profile"


@contextmanager
def profile_steps(
    run_dir: Path,
    config: MetricsConfig,
    rank: int,
    start_step: int,
    print_line: Callable[[str], None],
    *,
    enabled: bool,
) -> Iterator[profiler.profile | None]:
    """Record the steps that ``config`` names on this rank. Yield the profiler, or None unless ``enabled``.

    Args:
        run_dir: The run folder.
        config: The ``metrics`` block. Recording begins after ``profile_after_steps`` steps of this start; the profiler
            warms up in the last of them.
        rank: This rank. Each rank writes its own file.
        start_step: Finished steps.
        print_line: Prints a line on the terminal.
        enabled: Whether to record.

    Raises:
        MMScaleError: the trace cannot be written.
    """
    if not enabled:
        yield None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # Otherwise Kineto prints lines at start and stop.
    first = start_step + config.profile_after_steps + 1
    written: list[Path] = []

    def write(recorded: profiler.profile) -> None:
        last = start_step + recorded.step_num
        if last >= first:
            written.append(_export(recorded, run_dir / PROFILE, f"rank-{rank:05d}-steps-{first}-{last}.json"))
            print_line(f"wrote the trace of steps {first} to {last}: {written[0]} (open it in https://ui.perfetto.dev)")

    schedule = profiler.schedule(wait=config.profile_after_steps - 1, warmup=1, active=config.profile_steps, repeat=1)
    with profiler.profile(activities=_activities(), schedule=schedule, on_trace_ready=write) as recorded:
        yield recorded
    if not written:
        print_line(f"no trace was written: the run ended before step {first} (metrics.profile_after_steps)")


def _activities() -> list[Any]:
    kinds = [profiler.ProfilerActivity.CPU]
    return [*kinds, profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else kinds


def _export(recorded: profiler.profile, folder: Path, name: str) -> Path:
    """Write the trace under a temporary name, then rename it: a file with the final name is complete."""
    path, temporary = folder / name, folder / f".{name}"
    try:
        folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise MMScaleError(f"the trace cannot be written: {path}: {error}") from error
    return path
