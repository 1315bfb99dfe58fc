"""A configuration before validation: plain values that remember where each was written.

    files --read--> Entry tree --merge, overrides--> Entry tree --plain--> dict for pydantic

Scalars follow YAML 1.2: ``1e-3`` is a number and ``no`` is a word, neither of which holds in the YAML 1.1 that PyYAML
reads by default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.io.untrusted import MOST_YAML_BYTES, BoundedYamlLoader, UntrustedError, YamlBoundsError, read_bytes
from mmscale.errors import ConfigError

Scalar = str | int | float | bool | None
BASE_KEY = "base"
"""Top-level key that names another file to start from."""


@dataclass(frozen=True)
class Origin:
    """Where a value came from.

    Attributes:
        kind: ``default``, ``file`` or ``override``.
        place: ``configs/x.yaml:14``, ``override 3 (key=value)``, or ``default``.
        layer: Later layers win: base files first, then the file, then each override.
        files: The file, after those whose ``base`` led to it; none for another kind.
    """

    kind: str
    place: str
    layer: int
    files: tuple[Path, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return self.place


DEFAULT = Origin("default", "default", -1)


@dataclass
class Entry:
    """One node of the tree.

    Attributes:
        value: Mapping, list or scalar.
        origin: Where it was written; for a mapping, where its key stands.
        replaced: What an earlier layer had here, where a scalar was replaced by a different one.
    """

    value: dict[str, Entry] | list[Entry] | Scalar
    origin: Origin
    replaced: Scalar = field(default=None)

    def child(self, key: str) -> Entry | None:
        """The entry under a key or a list index; None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and key.isdigit() and int(key) < len(self.value):
            return self.value[int(key)]
        return None

    def leaves(self) -> Iterator[Entry]:
        """This entry if it is a scalar, else all scalars below."""
        children = list(self.value.values()) if isinstance(self.value, dict) else self.value
        if not isinstance(children, list):
            yield self
            return
        for child in children:
            yield from child.leaves()


def plain(entry: Entry) -> Any:
    """The tree as dicts, lists and scalars."""
    if isinstance(entry.value, dict):
        return {key: plain(child) for key, child in entry.value.items()}
    if isinstance(entry.value, list):
        return [plain(child) for child in entry.value]
    return entry.value


class ConfigLoader(BoundedYamlLoader):
    """PyYAML's safe loader within bounds, with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own protocol


class ConfigDumper(yaml.SafeDumper):
    """Its counterpart: quotes exactly the strings that :class:`ConfigLoader` would read as something else."""

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
    raise ConfigError(f"{origin}: tag {node.tag} is not understood; write plain YAML values")


def checked_text(text: str, place: object) -> str:
    """Return the text. Refuse one that neither a path nor a UTF-8 file can hold.

    Raises:
        ConfigError: it holds NUL or a lone surrogate.
    """
    found = _UNSTORABLE.search(text)
    if found is not None:
        shown = f"{place}: {text[:60]!a}"
        raise ConfigError(
            f"{shown.encode(errors='backslashreplace').decode()}: character {found.start() + 1} is "
            f"U+{ord(found[0]):04X}, which no path and no UTF-8 text holds; expected text without NUL and surrogates"
        )
    return text


def read_file(path: Path, layer: int, chain: tuple[Path, ...]) -> Entry:
    """One YAML file, without following ``base``; ``chain`` ends with it, after the files whose ``base`` led to it.

    Raises:
        ConfigError: no such file, broken YAML, a key written twice, or no mapping at the top.
    """
    try:
        text = read_bytes(path, most_bytes=MOST_YAML_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file in UTF-8 (byte {error.start + 1} cannot be read); expected a YAML file"
        ) from None
    except (OSError, UntrustedError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    entry = parse(text, lambda line: Origin("file", f"{path}:{line}", layer, chain), str(path))
    if not isinstance(entry.value, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this is {_kind(entry)}")
    return entry


def _kind(entry: Entry) -> str:
    if entry.value is None:
        return "an empty file"
    return "a list" if isinstance(entry.value, list) else f"the single value {entry.value!r}"


def shown(value: Any) -> str:
    """A scalar as a file writes it, cut where it is longer than a message should be."""
    return shorten("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))


def shorten(text: str, most_letters: int = 80) -> str:
    """A text for a message, cut with ``...`` if it has more than ``most_letters``."""
    return text if len(text) <= most_letters else f"{text[:most_letters]}..."


def parse(text: str, origin_of_line: Callable[[int], Origin], name: str) -> Entry:
    """YAML text as a tree; ``origin_of_line(line)`` gives each entry its origin, lines from 1."""
    loader = ConfigLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        what = "" if isinstance(error, YamlBoundsError) else "not valid YAML: "
        raise ConfigError(f"{place}: {what}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if node is None:
        return Entry(None, origin_of_line(1))
    return _convert(node, node.start_mark.line + 1, origin_of_line)


def _convert(node: yaml.Node, line: int, origin_of_line: Callable[[int], Origin]) -> Entry:
    origin = origin_of_line(line)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, item.start_mark.line + 1, origin_of_line) for item in node.value]
        return Entry(items, origin)
    if isinstance(node, yaml.MappingNode):
        return Entry(_mapping(node, origin_of_line), origin)
    try:
        return Entry(_scalar(node, origin), origin)
    except ValueError:  # The tag was written by hand (!!int x), or the number has over 4300 digits.
        kind = node.tag.rpartition(":")[2]
        raise ConfigError(f"{origin}: {node.value[:60]!r} is not a number that can be read as {kind}") from None


def _mapping(node: yaml.MappingNode, origin_of_line: Callable[[int], Origin]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{origin_of_line(line)}: a key must be a word")
        key = checked_text(key_node.value, origin_of_line(line))
        if key == "<<":
            raise ConfigError(f"{origin_of_line(line)}: YAML merge keys are not read; use a '{BASE_KEY}:' file instead")
        if key in entries:
            raise ConfigError(f"{origin_of_line(line)} {key}: written twice, first at {entries[key].origin}")
        entries[key] = _convert(value_node, line, origin_of_line)
    return entries
