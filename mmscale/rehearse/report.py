"""The result of a rehearsal: figures, each with its basis, and findings.

real       the project's code ran for every rank of the big run, and the value was counted or measured here
scaled     the project's code ran for some ranks or steps, and the value was multiplied up to the big run
simulated  a model computed the value; nothing of the big run was executed
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Basis(StrEnum):
    """How a figure was found."""

    REAL = "real"
    SCALED = "scaled"
    SIMULATED = "simulated"


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    Attributes:
        part: Part of the control plane, for example ``data order``.
        name: Name of the value.
        value: The value; a text where there is no number.
        unit: Unit of a number; empty for a text.
        basis: How the value was found.
    """

    part: str
    name: str
    value: float | int | str | bool
    unit: str
    basis: Basis


@dataclass(frozen=True)
class Finding:
    """Something that would break or slow the big run.

    Attributes:
        name: Stable identifier, for example ``lanes-below-ranks``.
        seen: The value.
        limit: The limit that it exceeds.
        message: A sentence with the place and the remedy.
    """

    name: str
    seen: float
    limit: float
    message: str


@dataclass
class Report:
    """Figures and findings, in the order in which the parts added them."""

    figures: list[Figure] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(
        self, part: str, name: str, value: float | int | str | bool, unit: str = "", basis: Basis = Basis.REAL
    ) -> None:
        """Add a figure."""
        self.figures.append(Figure(part, name, value, unit, basis))

    def limit(self, name: str, seen: float, limit: float, message: str) -> None:
        """Add a finding if ``seen`` exceeds ``limit``."""
        if seen > limit:
            self.findings.append(Finding(name, seen, limit, message))

    def timed(self, part: str, name: str, work: Callable[[], Any], basis: Basis = Basis.REAL) -> Any:
        """Call ``work``, add its wall time in seconds as a figure, and return its result."""
        start = time.perf_counter()
        result = work()
        self.add(part, name, time.perf_counter() - start, "s", basis)
        return result

    def value(self, part: str, name: str) -> Any:
        """Return the value of a figure that was added before.

        Raises:
            KeyError: there is no such figure.
        """
        for figure in self.figures:
            if (figure.part, figure.name) == (part, name):
                return figure.value
        raise KeyError(f"{part}: {name}")

    def to_json(self) -> dict[str, Any]:
        """Return figures and findings as JSON values. Infinity becomes null."""
        figures = [asdict(figure) for figure in self.figures]
        return {
            "figures": [{**each, "value": None if each["value"] == math.inf else each["value"]} for each in figures],
            "findings": [asdict(finding) for finding in self.findings],
        }
