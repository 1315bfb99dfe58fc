"""The configuration as a table: every value of a run with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmscale.config.tree import ConfigLoader
from mmscale.report.result import write_whole

ORIGINS_FILE = "report/origins.json"
"""The origin of each value of ``config.yaml`` by its dotted key."""


@dataclass(frozen=True)
class Setting:
    """One value. ``origin`` is ``default``, ``file.yaml:14``, ``override 2 (key=value)``, or empty if not known."""

    key: str
    value: str
    origin: str

    @property
    def chosen(self) -> bool:
        """Whether somebody wrote it, rather than the code's default."""
        return self.origin not in ("", "default")


def save_origins(run_dir: Path, origins: Mapping[str, Any]) -> Path:
    """Keeps where each value of ``config.yaml`` came from (``Loaded.origins``). Rank 0 only.

    Returns:
        The path of the file.
    """
    path = run_dir / ORIGINS_FILE
    data = {key: str(origin) for key, origin in origins.items()}
    write_whole(path, json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n")
    return path


def read_configuration(run_dir: Path) -> dict[str, list[Setting]]:
    """The settings of ``config.yaml`` by top-level key; empty if there is no such file."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=ConfigLoader)
    origins_path = run_dir / ORIGINS_FILE
    origins = json.loads(origins_path.read_bytes()) if origins_path.is_file() else {}
    blocks: dict[str, list[Setting]] = {}
    for key, value in _leaves(config or {}, ()):
        text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
        name = ".".join(key)
        top = key[0] if len(key) > 1 else "run"
        blocks.setdefault(top, []).append(Setting(name, text, origins.get(name, "")))
    return dict(sorted(blocks.items(), key=lambda block: block[0] != "run"))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield path, value
