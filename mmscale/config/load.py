"""The one way from a YAML file to a validated configuration, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel

from mmscale.config.layers import apply_overrides, read_layers
from mmscale.config.tree import DEFAULT, ConfigDumper, Entry, Origin
from mmscale.config.validate import validate

S = TypeVar("S", bound=BaseModel)


class DroppedKeyWarning(UserWarning):
    """A switched ``kind`` left keys of the file without a meaning."""


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """A validated configuration.

    Attributes:
        value: The configuration object.
        origins: Origin of every leaf by dotted path, in the order of the schema.
        notes: A sentence for each key that a switched ``kind`` dropped.
    """

    value: S
    origins: dict[str, Origin]
    notes: tuple[str, ...] = ()


def load(path: str | Path, overrides: list[str], schema: type[S]) -> Loaded[S]:
    """Reads, merges, overrides and validates.

    Args:
        path: A YAML file; its ``base:`` key may name another one to start from.
        overrides: ``key=value`` words, as on the command line.
        schema: Class of the whole configuration.

    Raises:
        ConfigError: every error found, each with file, line, key and value.
    """
    return load_tree(apply_overrides(read_layers(Path(path)), overrides), schema, str(path))


def load_tree(root: Entry, schema: type[S], name: str) -> Loaded[S]:
    """Validates a tree that is merged already; what a switched ``kind`` orphans is removed from it.

    Args:
        root: The merged tree.
        schema: Class of the whole configuration.
        name: How the file is called in messages.

    Raises:
        ConfigError: every error found, each with file, line, key and value.
    """
    value, notes = validate(root, schema, name)
    for note in notes:
        warnings.warn(note, DroppedKeyWarning, stacklevel=3)
    origins = {".".join(key): _origin(root, key) for key, _ in leaves(value)}
    return Loaded(value, origins, tuple(notes))


def leaves(value: BaseModel) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every scalar, list of scalars and empty block of a configuration, with its path."""
    yield from _leaves((), _plain(value.model_dump()))


def _plain(value: Any) -> Any:
    # Not pydantic's mode="json": it turns an infinity in a free mapping into null.
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, PurePath) else value


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves((*path, str(key)), item)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _leaves((*path, str(index)), item)
    else:
        yield path, value


def _origin(root: Entry, path: tuple[str, ...]) -> Origin:
    entry = root
    for key in path:
        child = entry.child(key)
        if child is None:
            # Below a scalar or a list the schema itself spread the value (a shorthand); below a block it filled in.
            return DEFAULT if isinstance(entry.value, dict) else entry.origin
        entry = child
    origins = [leaf.origin for leaf in entry.leaves()] or [entry.origin]
    files = tuple(dict.fromkeys(file for origin in origins for file in origin.files))
    return replace(max(origins, key=lambda origin: origin.layer), files=files)


def dump(value: BaseModel) -> str:
    """A configuration as YAML, every default written out, that loads to an equal value."""
    return yaml.dump(_plain(value.model_dump()), Dumper=_BlockDumper, sort_keys=False, allow_unicode=True, width=100)


class _BlockDumper(ConfigDumper):
    """Blocks for mappings, ``[a, b]`` for lists of scalars, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Outside double quotes PyYAML writes NEL and other line separators bare, and reading folds them into blanks.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_BlockDumper.add_representer(list, _represent_list)
_BlockDumper.add_representer(str, _represent_text)
_BlockDumper.add_multi_representer(str, _represent_text)  # A URL is a string of a class of its own.
