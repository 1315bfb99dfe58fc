"""Read JSON and YAML that this project did not write, within bounds.

    file --check type and size--> text --check levels and nodes--> plain values

A parser without bounds lets a small file run for minutes, fill the memory or exhaust the stack: a pipe never ends,
``[[[[...`` nests a million levels, and nine levels of ten YAML aliases each expand to a billion values. Every reader
here raises ``UntrustedError`` instead, whose message does not name the file: the caller adds it.

A parsed number may still be NaN, infinite or very large, and any value may have the wrong type: the caller checks both.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from yaml.composer import ComposerError

MOST_DEPTH = 64
"""Levels of lists and mappings inside one another."""
MOST_YAML_NODES = 200_000
"""Values of a YAML text after its aliases are expanded; PyYAML reads some 20,000 a second."""
MOST_BYTES = 64 << 20
"""Size of a file of JSON, and of one line of a JSON Lines file."""
MOST_YAML_BYTES = 4 << 20

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_QUOTED = re.compile(r'"[^"]*"?')
_ONLY_BRACKETS = re.compile(r"[^][{}]+")


class UntrustedError(ValueError):
    """A file or text is too large, too deep, not a regular file, or not what its format requires."""


class IrregularFileError(OSError, UntrustedError):
    """A path names a folder, a FIFO, a socket or a device.

    Handlers of ``OSError`` (unreadable files) and of ``UntrustedError`` (damaged files) both catch it.
    """

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading. A FIFO or a device raises instead of blocking.

    Raises:
        IrregularFileError: the path names something that is not a regular file.
        OSError: a system call fails.
    """
    return os.fdopen(regular_descriptor(path, os.O_RDONLY), "rb")


def append_regular(path: Path) -> IO[bytes]:
    """Open a regular file for appending; create it if it is absent. A FIFO or a device raises instead of blocking.

    Raises:
        IrregularFileError: the path names something that is not a regular file.
        OSError: a system call fails.
    """
    return os.fdopen(regular_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def regular_descriptor(path: Path, flags: int) -> int:
    """Return a descriptor of a regular file, as ``os.open``. A FIFO or a device raises instead of blocking.

    Raises:
        IrregularFileError: the path names something that is not a regular file.
        OSError: a system call fails.
    """
    # Without O_NONBLOCK, open() waits for the other end if the path is a FIFO. Regular files ignore the flag.
    try:
        handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # A FIFO without a reader, a socket; a folder.
            reason = "a folder, expected a file" if error.errno == errno.EISDIR else "not a regular file"
            raise IrregularFileError(errno.EINVAL, reason, str(path)) from error
        raise
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            reason = "a folder, expected a file" if stat.S_ISDIR(mode) else "not a regular file"
            raise IrregularFileError(errno.EINVAL, reason, str(path))
        return handle
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path, *, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        UntrustedError: the path names no regular file, or one of more than ``most_bytes``.
        OSError: a system call fails.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UntrustedError(f"larger than {most_bytes} bytes")
    return content


def read_lines(path: Path, *, most_bytes: int = MOST_BYTES) -> Iterator[bytes]:
    """Yield the lines of a regular file with their line ends; the last one may lack it.

    Raises:
        UntrustedError: the path names no regular file, or a line has more than ``most_bytes``.
        OSError: a system call fails.
    """
    with open_regular(path) as file:
        while line := file.readline(most_bytes + 1):
            if len(line) > most_bytes:
                raise UntrustedError(f"a line is longer than {most_bytes} bytes")
            yield line


def read_json(path: Path, *, most_bytes: int = MOST_BYTES) -> Any:
    """Return the value of a JSON file; see ``parse_json``.

    Raises:
        UntrustedError: it is not a regular file, is too large, or is not valid JSON.
        OSError: a system call fails.
    """
    return parse_json(read_bytes(path, most_bytes=most_bytes))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Bytes are UTF-8, with or without a byte order mark. If a key occurs twice, the last value counts, as in common JSON
    libraries. ``NaN`` and ``Infinity`` are accepted, because Python's own writer emits them.

    Raises:
        UntrustedError: it is not valid JSON, nests deeper than ``MOST_DEPTH``, or holds an integer of over 4300 digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if text.count("[") + text.count("{") > MOST_DEPTH and _depth(text) > MOST_DEPTH:
            raise UntrustedError(f"not read: lists and objects nest deeper than {MOST_DEPTH} levels")
        return json.loads(text)
    except UntrustedError:
        raise
    except (ValueError, RecursionError) as error:
        raise UntrustedError(f"not valid JSON: {error}") from error


def _depth(text: str) -> int:
    """Return the levels of nesting, in linear time. The number is arbitrary if the text is not valid JSON."""
    brackets = _ONLY_BRACKETS.sub("", _QUOTED.sub("", _ESCAPED.sub("", text)))
    marks = np.frombuffer(brackets.encode("ascii"), np.uint8)
    opening = (marks == ord("[")) | (marks == ord("{"))
    return int(np.cumsum(np.where(opening, 1, -1)).max(initial=0))


class YamlBoundsError(ComposerError):
    """A YAML text that nests too deep, has too many values, or a value that contains itself. It may be valid YAML."""


class BoundedYamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which raises on texts that nest too deep or expand to too many values.

    An alias counts as all values that it expands to. Beyond the bounds, the loader raises ``YamlBoundsError``, with the
    line.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._num_composed = 0
        # By id of a finished node: its number of values and its levels, with aliases expanded.
        self._expanded: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose one value; PyYAML calls this for each value, key and alias."""
        mark = self.peek_event().start_mark
        self._depth += 1
        self._num_composed += 1
        # This check bounds PyYAML's recursion.
        if self._depth <= MOST_DEPTH and self._num_composed <= MOST_YAML_NODES:
            node = super().compose_node(parent, index)
            assert node is not None, "PyYAML calls this where there is a node"
            if id(node) not in self._expanded:
                self._expanded[id(node)] = self._measure(node)
            size, height = self._expanded[id(node)]
            self._depth -= 1
            if self._depth + height <= MOST_DEPTH and size <= MOST_YAML_NODES:
                return node
        raise YamlBoundsError(
            None, None, f"nests deeper than {MOST_DEPTH} levels, or holds more than {MOST_YAML_NODES} values", mark
        )

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        # The children of a finished node are measured; a node that is not yet finished contains its own alias.
        if node.end_mark is None:
            raise YamlBoundsError(None, None, "an alias that contains itself", node.start_mark)
        sizes = [self._expanded[id(child)] for child in children]
        return 1 + sum(size for size, _ in sizes), 1 + max((height for _, height in sizes), default=0)


def read_yaml(path: Path, *, most_bytes: int = MOST_YAML_BYTES) -> Any:
    """Return the value of a YAML file of one document, by YAML 1.1 as PyYAML reads it.

    Raises:
        UntrustedError: it is not a regular file, is too large, or is not valid YAML within the bounds of
            ``BoundedYamlLoader``.
        OSError: a system call fails.
    """
    return parse_yaml(read_bytes(path, most_bytes=most_bytes), BoundedYamlLoader)


def parse_yaml(text: bytes, loader: type[BoundedYamlLoader]) -> Any:
    """Return the value of a YAML text of one document.

    Raises:
        UntrustedError: it is not valid UTF-8, or not valid YAML within the bounds of ``BoundedYamlLoader``.
    """
    try:
        return yaml.load(text.decode("utf-8-sig"), Loader=loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        what = "YAML that is not read" if isinstance(error, YamlBoundsError) else "not valid YAML"
        raise UntrustedError(f"{what}{line}: {error.problem or error.context}") from error
    # PyYAML's constructors of explicit tags do not check their text: !!timestamp x, !!bool x, !!int "".
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UntrustedError(f"not valid YAML: {error}") from error
