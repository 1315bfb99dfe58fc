"""The configuration as a table: every value of a run with its origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.io.untrusted import MOST_YAML_BYTES, parse_yaml, read_bytes, read_json
from mmscale.config.tree import ConfigLoader
from mmscale.errors import MMScaleError

ORIGINS_FILE = "report/origins.json"
"""File with the origin of each value of ``config.yaml``, by dotted key."""


@dataclass(frozen=True)
class Setting:
    """One value. ``origin`` is ``default``, ``file.yaml:14``, ``override 2 (key=value)``, or empty if not known."""

    key: str
    value: str
    origin: str

    @property
    def chosen(self) -> bool:
        """Whether the value has a known origin other than the code's default."""
        return self.origin not in ("", "default")


def save_origins(run_dir: Path, origins: Mapping[str, Any]) -> Path:
    """Write the origin of each value of ``config.yaml`` (``Loaded.origins``). Call it on rank 0 only.

    Returns:
        The path of the file.
    """
    path = run_dir / ORIGINS_FILE
    data = {key: str(origin) for key, origin in origins.items()}
    write_whole(path, as_utf8(json.dumps(data, indent=1, ensure_ascii=False) + "\n"), parents=True)
    return path


def read_origins(run_dir: Path) -> dict[str, str]:
    """Return the origin of each value of ``config.yaml`` by dotted key; empty if the folder has no such file.

    Raises:
        MMScaleError: the file cannot be read, or is damaged.
    """
    path = run_dir / ORIGINS_FILE
    try:
        origins = read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
    if not isinstance(origins, dict):
        raise MMScaleError(f"{path} is damaged: it holds a {type(origins).__name__}, expected a mapping")
    return {key: str(origin) for key, origin in origins.items()}


def read_configuration(run_dir: Path) -> dict[str, list[Setting]]:
    """Return the settings of ``config.yaml`` by top-level key; empty if there is no such file.

    Top-level values without nested keys are under ``run``, which is first.

    Raises:
        MMScaleError: ``config.yaml`` or the file of origins cannot be read, or is damaged.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = parse_yaml(read_bytes(path, most_bytes=MOST_YAML_BYTES), ConfigLoader)
    except (OSError, ValueError) as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
    origins = read_origins(run_dir)
    if not isinstance(config, dict | None):
        raise MMScaleError(f"{path} is damaged: it holds a {type(config).__name__}, expected a mapping")
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
