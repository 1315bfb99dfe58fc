"""One line of the doctor, and the lines of all ranks as one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_pipeline.io.untrusted import parse_json

Status = Literal["ok", "warning", "failure"]
_STATUSES: tuple[Status, ...] = ("ok", "warning", "failure")
_MOST_LINES = 1000


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Attributes:
        name: What was checked.
        status: ``failure``: a run would fail or compute wrong values. ``warning``: it would work, but badly.
        found: What was found, in one phrase.
        remedy: What to do; empty if the status is ``ok``.
        ranks: The ranks that found it.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    ranks: tuple[int, ...] = (0,)


def read_lines(data: bytes) -> list[Line]:
    """Return the lines that a rank sent as JSON.

    Raises:
        UntrustedError, ValueError, TypeError, KeyError: the bytes are no such list.
    """
    lines = [
        Line(each["name"], _STATUSES[_STATUSES.index(each["status"])], each["found"], each["remedy"])
        for each in parse_json(data)
    ]
    if len(lines) > _MOST_LINES:
        raise ValueError(f"{len(lines)} lines")
    return lines


def merge(lines_of_ranks: Sequence[Sequence[Line]]) -> list[Line]:
    """Return the lines of all ranks in the order of the checks, equal ones once with all their ranks."""
    ranks: dict[Line, list[int]] = {}
    order: dict[str, int] = {}
    for rank, lines in enumerate(lines_of_ranks):
        for line in lines:
            order.setdefault(line.name, len(order))
            ranks.setdefault(Line(line.name, line.status, line.found, line.remedy), []).append(rank)
    merged = [Line(e.name, e.status, e.found, e.remedy, tuple(found)) for e, found in ranks.items()]
    return sorted(merged, key=lambda line: (order[line.name], line.ranks))


def worst(lines: Sequence[Line]) -> Status:
    """Return the worst status of all lines."""
    return _STATUSES[max((_STATUSES.index(line.status) for line in lines), default=0)]
