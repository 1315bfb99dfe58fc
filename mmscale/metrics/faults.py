"""The lists of skipped samples in the run folder, for users and for the loader's quarantine.

    StepBatch.skipped --FaultList, one file for each rank--> RUN/faults/rank-00000.jsonl

Lines are written in the step in which a sample is skipped, so the list is complete if the run ends because of faults. A
resumed run first removes the lines of steps after its checkpoint, since it repeats those steps. Not for: the treatment
of faults (``data_pipeline.order.fault_policy``), or counts of faults (``step_counts``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import FaultKind
from data_pipeline.io.atomic import append_whole
from data_pipeline.io.retry import explain_io
from data_pipeline.io.untrusted import open_regular, parse_json
from data_pipeline.order.fault_policy import FaultConfig, Skipped
from mmscale.dist import World, raise_on_any_rank
from mmscale.errors import MMScaleError

_MOST_REASONS = 20
"""Different reasons that a process prints on the terminal. The list contains every sample."""
_OF_ONE_SAMPLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{8,}\b|\d+")
"""The parts of a reason that differ between samples with the same fault: names, checksums and numbers."""


class FaultList:
    """The list of this rank. All ranks must create one.

    Args:
        folder: ``RUN/faults``, on a file system that all ranks share.
        world: This rank.
        step: Finished steps. Lines of later steps are removed from all lists, since those steps are repeated.
        print_line: Prints a line on the terminal.

    Raises:
        MMScaleError: the folder cannot be changed; every rank raises.
    """

    def __init__(self, folder: Path, world: World, step: int, print_line: Callable[[str], None]) -> None:
        self._path = folder / f"rank-{world.rank:05d}.jsonl"
        self._print_line, self._counts = print_line, dict[tuple[FaultKind, str], int]()
        message = None
        if world.is_main:
            try:
                folder.mkdir(exist_ok=True)
                for path in fault_lists(folder):
                    _cut_back(path, step)
            except OSError as error:
                message = f"the list of faults cannot be written: {error.filename or folder}: {error.strerror}"
        raise_on_any_rank(world, message, MMScaleError)

    def record(self, step: int, skipped: Sequence[Skipped]) -> None:
        """Write the samples that this rank skipped in ``step``, which is numbered as in ``metrics.jsonl``.

        Samples that ``data.faults.exclude`` names are already on a list and are not written again.

        Raises:
            MMScaleError: the list cannot be written.
        """
        new = [skip for skip in skipped if skip.kind is not FaultKind.EXCLUDED]
        if not new:
            return
        lines = "".join(
            json.dumps({"step": step, **skip.record(), "action": skip.action.value}, ensure_ascii=False) + "\n"
            for skip in new
        )
        try:
            append_whole(self._path, lines.encode(errors="backslashreplace"))
        except OSError as error:
            raise MMScaleError(f"the list of faults cannot be written: {self._path}: {explain_io(error)}") from error
        self._print_reasons(new)

    def _print_reasons(self, skipped: Sequence[Skipped]) -> None:
        """Print each reason with its first sample, then its count at 10, 100, 1,000, ... samples."""
        for skip in skipped:
            reason = (skip.kind, _OF_ONE_SAMPLE.sub("*", skip.reason))
            if reason not in self._counts:
                if len(self._counts) > _MOST_REASONS:
                    continue
                if len(self._counts) == _MOST_REASONS:
                    self._print_line(f"skipped samples with further reasons are listed in {self._path} only")
                else:
                    self._print_line(f"skipped {skip.shard}/{skip.key}: {skip.reason}")
            count = self._counts[reason] = self._counts.get(reason, 0) + 1
            if count > 1 and str(count).strip("0") == "1":
                self._print_line(
                    f"skipped {count:,} samples for this reason so far: {skip.reason} (listed in {self._path})"
                )


def fault_lists(folder: Path) -> list[Path]:
    """Return the lists in ``RUN/faults``, also those of ranks of earlier starts."""
    return sorted(folder.glob("rank-*.jsonl"))


def quarantine_lists(folder: Path, config: FaultConfig) -> list[Path]:
    """Return the lists from which a loader reads quarantined samples; none if no kind of fault is quarantined."""
    return fault_lists(folder) if any(config.quarantines(kind) for kind in FaultKind) else []


def _cut_back(path: Path, step: int) -> None:
    """Truncate a list after the last whole line of a step up to ``step``. Lines are in order of steps."""
    end = 0
    with open_regular(path) as file:
        for line in file:
            try:
                number = parse_json(line)["step"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                number = None
            if not isinstance(number, int) or number > step:
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
