"""A configuration before validation: a tree of plain values with the origin (file and line) of each.

    files --read--> ConfigNode --merge, overrides--> ConfigNode --plain--> dict for pydantic

Scalars follow YAML 1.2: ``1e-3`` is a number and ``no`` is a string. PyYAML's default, YAML 1.1, reads ``1e-3`` as a
string and ``no`` as false.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.io.missing import no_such_file
from data_pipeline.io.untrusted import (
    MOST_YAML_BYTES,
    BoundedYamlLoader,
    UntrustedError,
    YamlBoundsError,
    read_bytes,
)
from mmscale.errors import ConfigError

Scalar = str | int | float | bool | None
BASE_KEY = "base"
"""Key of a file or block that names another file to merge over."""


@dataclass(frozen=True)
class Origin:
    """The source of a value.

    Attributes:
        kind: ``default``, ``file`` or ``override``.
        location: ``configs/x.yaml:14``, ``override 3 (key=value)``, or ``default``.
        layer: Number of the layer. Higher layers replace lower ones: base files, then the file, then each override.
        files: The chain of ``base`` files that led to the file, ending with the file; empty for other kinds.
    """

    kind: str
    location: str
    layer: int
    files: tuple[Path, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return self.location


DEFAULT = Origin("default", "default", -1)


@dataclass
class ConfigNode:
    """One node of the tree.

    Attributes:
        value: Mapping, list or scalar.
        origin: Origin of the value; for a mapping, the line of its key.
        replaced: The scalar of a lower layer, if this layer replaced it by a different value.
    """

    value: dict[str, ConfigNode] | list[ConfigNode] | Scalar
    origin: Origin
    replaced: Scalar = field(default=None)

    def child(self, key: str) -> ConfigNode | None:
        """Return the entry at a key or list index; None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and key.isdigit() and int(key) < len(self.value):
            return self.value[int(key)]
        return None

    def on_layer(self, layer: int) -> ConfigNode:
        """Return the tree with another layer number in all origins."""
        value = self.value
        if isinstance(value, dict):
            value = {key: child.on_layer(layer) for key, child in value.items()}
        elif isinstance(value, list):
            value = [child.on_layer(layer) for child in value]
        return replace(self, value=value, origin=replace(self.origin, layer=layer))

    def leaves(self) -> Iterator[ConfigNode]:
        """Yield this entry if it is a scalar, else all scalars below it."""
        children = list(self.value.values()) if isinstance(self.value, dict) else self.value
        if not isinstance(children, list):
            yield self
            return
        for child in children:
            yield from child.leaves()


def plain(entry: ConfigNode) -> Any:
    """Return the tree as dicts, lists and scalars."""
    if isinstance(entry.value, dict):
        return {key: plain(child) for key, child in entry.value.items()}
    if isinstance(entry.value, list):
        return [plain(child) for child in entry.value]
    return entry.value


class ConfigLoader(BoundedYamlLoader):
    """PyYAML's safe loader with bounds on size and nesting, and with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own protocol


class ConfigDumper(yaml.SafeDumper):
    """The counterpart of :class:`ConfigLoader`: quotes the strings that the loader would read as another type."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own protocol


_RULES = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)
for _tag, _pattern, _first in _RULES:
    for _class in (ConfigLoader, ConfigDumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def _scalar(node: yaml.Node, origin: Origin) -> Scalar:
    tag, text = node.tag.rpartition(":")[2], node.value
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        return int(text.replace("_", ""))
    if tag == "float":
        word = text.replace("_", "").lower()
        return float(word.replace(".inf", "inf").replace(".nan", "nan"))
    if tag == "str":
        return checked_text(text, origin)
    raise ConfigError(f"{origin}: the tag {node.tag} is not supported; write plain YAML values")


def checked_text(text: str, location: object) -> str:
    """Return the text if a path and a UTF-8 file can contain it.

    Raises:
        ConfigError: it contains NUL or a lone surrogate.
    """
    found = _UNSTORABLE.search(text)
    if found is not None:
        beginning = f"{location}: {text[:60]!a}"
        raise ConfigError(
            f"{beginning.encode(errors='backslashreplace').decode()}: character {found.start() + 1} is "
            f"U+{ord(found[0]):04X}, which no path and no UTF-8 text can contain; remove NUL and surrogates"
        )
    return text


def read_file(path: Path, chain: tuple[Path, ...]) -> ConfigNode:
    """Read one YAML file as a tree on layer 0, without its base files.

    Args:
        path: The file.
        chain: The files whose ``base`` led to this file, ending with this file.

    Raises:
        ConfigError: the file is missing or not valid YAML, repeats a key, or is not a mapping.
    """
    if path.is_dir():
        run = path / "config.yaml"
        which = f"; the run folder's file is {run}" if run.is_file() else ""
        raise ConfigError(f"{path}: a folder, expected a YAML file{which}")
    try:
        text = read_bytes(path, most_bytes=MOST_YAML_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: {no_such_file(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file in UTF-8 (byte {error.start + 1} cannot be read); expected a YAML file"
        ) from None
    except (OSError, UntrustedError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    entry = parse(text, lambda line: Origin("file", f"{path}:{line}", 0, chain), str(path))
    if not isinstance(entry.value, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this is {_kind(entry)}")
    return entry


def _kind(entry: ConfigNode) -> str:
    if entry.value is None:
        return "an empty file"
    return "a list" if isinstance(entry.value, list) else f"the single value {entry.value!r}"


def display(value: Any) -> str:
    """Return a scalar as a YAML file spells it, shortened for a message."""
    return shorten("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))


def shorten(text: str, most_letters: int = 80) -> str:
    """Return the first ``most_letters`` characters of a text, followed by ``...`` if it has more."""
    return text if len(text) <= most_letters else f"{text[:most_letters]}..."


def parse(text: str, origin_of_line: Callable[[int], Origin], name: str) -> ConfigNode:
    """Parse YAML text as a tree. ``origin_of_line(line)`` returns the origin of an entry; lines count from 1.

    Raises:
        ConfigError: the text is not valid YAML or exceeds a bound, or a key or scalar is not supported.
    """
    loader = ConfigLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        location = f"{name}:{mark.line + 1}" if mark is not None else name
        what = "" if isinstance(error, YamlBoundsError) else "not valid YAML: "
        raise ConfigError(f"{location}: {what}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if node is None:
        return ConfigNode(None, origin_of_line(1))
    return _convert(node, node.start_mark.line + 1, origin_of_line)


def _convert(node: yaml.Node, line: int, origin_of_line: Callable[[int], Origin]) -> ConfigNode:
    origin = origin_of_line(line)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, item.start_mark.line + 1, origin_of_line) for item in node.value]
        return ConfigNode(items, origin)
    if isinstance(node, yaml.MappingNode):
        return ConfigNode(_mapping(node, origin_of_line), origin)
    try:
        return ConfigNode(_scalar(node, origin), origin)
    except ValueError:  # The file has an explicit tag (!!int x), or the number has over 4300 digits.
        kind = node.tag.rpartition(":")[2]
        raise ConfigError(f"{origin}: {node.value[:60]!r} is not a number that can be read as {kind}") from None


def _mapping(node: yaml.MappingNode, origin_of_line: Callable[[int], Origin]) -> dict[str, ConfigNode]:
    entries: dict[str, ConfigNode] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{origin_of_line(line)}: a key must be a single word, not a list or mapping")
        key = checked_text(key_node.value, origin_of_line(line))
        if key == "<<":
            raise ConfigError(
                f"{origin_of_line(line)}: YAML merge keys are not supported; use a '{BASE_KEY}:' file instead"
            )
        if key in entries:
            raise ConfigError(f"{origin_of_line(line)} {key}: written twice, first at {entries[key].origin}")
        entries[key] = _convert(value_node, line, origin_of_line)
    return entries
