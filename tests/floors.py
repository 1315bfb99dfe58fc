"""Name the floors of pyproject.toml that a resolution of the lowest versions did not install.

    python -m tests.floors .venv-lowest/versions.txt

Another package may require a later version than pyproject.toml. The tests then say nothing about the declared floor, so
it must be raised to what was installed. ``make test-floors`` calls this before its tests.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

REPO = Path(__file__).resolve().parents[1]
TRIED = ("dependencies", "hf", "dev")
"""The lists of requirements that ``make test-floors`` installs."""


def requirements(text: str) -> dict[str, Requirement]:
    """Return the requirements of the lists in ``TRIED``, by normalised name."""
    lists = re.findall(r"^(\w+) = \[(.*?)\](?:  #[^\n]*)?$", text, re.MULTILINE | re.DOTALL)
    lines = [line for name, body in lists if name in TRIED for line in re.findall(r'"([^"]+)"', body)]
    return {_normal(each.name): each for each in map(Requirement, lines)}


def untried_floors(text: str, versions: str) -> list[str]:
    """Return a sentence for each floor that differs from the installed version."""
    installed = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", versions, re.MULTILINE))
    found = []
    for name, requirement in requirements(text).items():
        floors = [Version(each.version) for each in requirement.specifier if each.operator in (">=", "==")]
        version = Version(installed[name])
        # The lowest release of a floor like 0.19 may be 0.19.2, if earlier ones were never published for this Python.
        if not floors or version.release[: len(floors[0].release)] != floors[0].release:
            found.append(f"{requirement}: {version} was installed")
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    untried = untried_floors((REPO / "pyproject.toml").read_text(), Path(sys.argv[1]).read_text())
    print(
        "\n".join(["Floors that were not tried; raise them:", *untried] if untried else ["Every floor is installed."])
    )
    raise SystemExit(bool(untried))
