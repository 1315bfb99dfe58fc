"""The YAML text of a run file with a comment next to each value."""

from __future__ import annotations

import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from mmscale.config.tree import ConfigDumper

_WIDTH = 118


class CommentedYaml:
    """Lines of a YAML file.

    Comments follow their value. If the line would be too long, the comment is on a line before it.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []

    def comment(self, text: str) -> None:
        """Add lines of comment."""
        self._lines += textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)

    def blank(self) -> None:
        """Add an empty line."""
        self._lines.append("")

    def block(self, depth: int, key: str, reason: str = "") -> None:
        """Begin a block; its values have one more ``depth``. ``key`` may begin with ``- `` for an item of a list."""
        self._line(depth, f"{key}:", reason)

    def value(self, depth: int, key: str, value: Any, reason: str = "") -> None:
        """Add a value on one line. ``key`` may begin with ``- `` for the first key of an item of a list."""
        self._line(depth, f"{key}: {flow(value)}", reason)

    def _line(self, depth: int, text: str, reason: str) -> None:
        line = "  " * depth + text
        if reason and len(line) + len(reason) + 4 > _WIDTH:
            self._lines.append("  " * depth + f"# {reason}")
            reason = ""
        self._lines.append(f"{line}  # {reason}" if reason else line)

    def text(self) -> str:
        """Return the file."""
        return "\n".join(self._lines) + "\n"


def flow(value: Any) -> str:
    """Return a value as YAML on one line, as the configuration reads it."""
    text = yaml.dump(
        [value], Dumper=ConfigDumper, default_flow_style=True, allow_unicode=True, width=1 << 20, sort_keys=False
    )
    return text.strip()[1:-1]


def compact(value: Any) -> Any:
    """Return a configuration as values of JSON without those that equal their default; ``kind`` is kept."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = {name: getattr(value, name) for name in fields}
        return {
            name: compact(each)
            for name, each in kept.items()
            if name == "kind" or each != fields[name].get_default(call_default_factory=True)
        }
    if isinstance(value, dict):
        return {key: compact(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [compact(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
