"""Print the test files that import the modules given as file paths.

    python -m tests.near data_pipeline/packing/packer.py mmscale/nn/rope.py

A test file counts if it imports a module directly, or a test helper that does. A test file that is given counts itself.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def near(changed: Iterable[Path], root: Path = REPO) -> list[Path]:
    """Return the test files under ``root / "tests"`` that import a changed file, relative to ``root``, sorted.

    Args:
        changed: Python files, relative to ``root``.
        root: The repository.

    Raises:
        FileNotFoundError: there is no such file.
    """
    wanted = set()
    for path in changed:
        if not (root / path).is_file():
            raise FileNotFoundError(f"{path}: no such file in {root}")
        wanted.add(_module(path))
    imports = {path.relative_to(root): imported_by(path, root) for path in sorted((root / "tests").rglob("*.py"))}
    known = {_module(path): path for path in imports}
    found: set[Path] = {known[name] for name in wanted if name in known}
    while True:  # A helper of the tests passes on what it imports.
        names = wanted | {_module(path) for path in found}
        more = {path for path, imported in imports.items() if imported & names} - found
        if not more:
            return sorted(path for path in found if path.name.startswith("test_"))
        found |= more


def imported_by(path: Path, root: Path = REPO) -> set[str]:
    """Return the names of all modules that a file may import, also inside of functions.

    ``from a import b`` gives both ``a`` and ``a.b``, because ``b`` may be a module.
    """
    package = _module(path.relative_to(root)).split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("give the files that changed: make test-near FILES='mmscale/nn/rope.py'")
    try:
        found = near(map(Path, sys.argv[1:]))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    if not found:
        raise SystemExit(f"no test file imports {' '.join(sys.argv[1:])}; run make test")
    print(*found)


if __name__ == "__main__":
    main()
