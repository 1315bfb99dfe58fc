"""Load a YAML file as a validated configuration, and dump a configuration as YAML."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel

from data_pipeline.errors import DataConfigError, ManifestError
from mmscale.config.layers import apply_overrides, read_layers
from mmscale.config.tree import DEFAULT, ConfigDumper, ConfigNode, Origin
from mmscale.config.trust import trust_own_kinds
from mmscale.config.validate import validate
from mmscale.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


class DroppedKeyWarning(UserWarning):
    """Keys of a file were dropped, because a later layer changed the ``kind`` of their block."""


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """A validated configuration.

    Attributes:
        value: The configuration object.
        origins: Origin of each leaf by dotted path, in the order of the schema.
        notes: A sentence for each key that was dropped because a later layer changed the ``kind`` of its block.
    """

    value: S
    origins: dict[str, Origin]
    notes: tuple[str, ...] = ()


def load(path: str | Path, overrides: list[str], schema: type[S]) -> Loaded[S]:
    """Read a file and its bases, apply overrides, and validate. Warns with ``DroppedKeyWarning`` for each dropped key.

    Args:
        path: A YAML file; its ``base:`` key may name another file to merge over.
        overrides: ``key=value`` words, as on the command line.
        schema: Class of the whole configuration.

    Raises:
        ConfigError: a file or an override cannot be read; otherwise lists all validation errors, each with file, line,
            key and value.
    """
    return load_tree(apply_overrides(read_layers(Path(path)), overrides), schema, str(path))


def load_tree(root: ConfigNode, schema: type[S], name: str) -> Loaded[S]:
    """Validate a merged tree. Warns with ``DroppedKeyWarning`` for each dropped key.

    Args:
        root: The merged tree, mutated: dropped keys are removed.
        schema: Class of the whole configuration.
        name: Name of the file in messages.

    Raises:
        ConfigError: lists all validation errors, each with file, line, key and value; or a file in a run folder names
            Python code (``mmscale.config.trust``).
    """
    trust_own_kinds(root)
    value, notes = validate(root, schema, name)
    for note in notes:
        warnings.warn(note, DroppedKeyWarning, stacklevel=3)
    origins = {".".join(key): _origin(root, key) for key, _ in leaves(value)}
    return Loaded(value, origins, tuple(notes))


@contextmanager
def located(loaded: Loaded[Any]) -> Iterator[None]:
    """Add the origin of a value to errors of checks that begin with ``key=value``, where ``key`` is a key of the file.

    If the message is about a missing file that exists next to the configuration's file, it also says how to name it.
    """
    try:
        yield
    except (ConfigError, DataConfigError, ManifestError) as error:
        key = str(error).partition("=")[0]
        origin = loaded.origins.get(key)
        if origin is None:
            raise
        name = str(dict(leaves(loaded.value))[tuple(key.split("."))])
        beside = [file.parent / name for file in origin.files[-1:] if (file.parent / name).exists()]
        hint = (
            f"; paths in a configuration are relative to the working directory: write {beside[0]}"
            if beside and not Path(name).exists()
            else ""
        )
        raise type(error)(f"{origin} {error}{hint}") from error


def leaves(value: BaseModel) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every scalar, list of scalars and empty block of a configuration."""
    yield from _leaves((), _plain(value.model_dump()))


def _plain(value: Any) -> Any:
    # pydantic's mode="json" would convert an infinity in a free mapping to null.
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


def _origin(root: ConfigNode, path: tuple[str, ...]) -> Origin:
    entry = root
    for key in path:
        child = entry.child(key)
        if child is None:
            # Below a scalar or list, the schema expanded a shorthand value. Below a block, it filled in a default.
            return DEFAULT if isinstance(entry.value, dict) else entry.origin
        entry = child
    origins = [leaf.origin for leaf in entry.leaves()] or [entry.origin]
    files = tuple(dict.fromkeys(file for origin in origins for file in origin.files))
    return replace(max(origins, key=lambda origin: origin.layer), files=files)


def dump(value: BaseModel) -> str:
    """Return a configuration as YAML with all defaults. It loads to an equal value."""
    return to_yaml(value.model_dump())


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return values as YAML, in the form of a configuration file."""
    return yaml.dump(_plain(values), Dumper=_BlockDumper, sort_keys=False, allow_unicode=True, width=100)


class _BlockDumper(ConfigDumper):
    """Blocks for mappings, ``[a, b]`` for lists of scalars, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Without double quotes PyYAML writes NEL and other line separators unescaped, and reads them back as blanks.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_BlockDumper.add_representer(list, _represent_list)
_BlockDumper.add_representer(str, _represent_text)
_BlockDumper.add_multi_representer(str, _represent_text)  # URLs are instances of a subclass of str.
