"""Read the elements of a large JSON array one at a time, within bounds.

    file --chunks--> find where each element ends (brackets and strings) --bytes of one element--> the caller parses it

Other datasets' tools (LLaVA, ShareGPT) write one array of a million objects. ``json.load`` would hold all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.io.untrusted import MOST_BYTES, UntrustedError, open_regular

_CHUNK_BYTES = 1 << 20
_STRUCTURE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'["\\]')
_OPENING, _CLOSING = b"[{", b"]}"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_array(path: Path, *, most_bytes: int = MOST_BYTES) -> Iterator[bytes]:
    """Yield the text of each element of the array in a JSON file, in order. The elements are not parsed.

    At most one element and one chunk of 1 MiB are in memory.

    Raises:
        UntrustedError: the path names no regular file, the file holds no array or ends within it, or an element has
            more than ``most_bytes``.
        OSError: a system call fails.
    """
    with open_regular(path) as file:
        buffer = bytearray(file.read(_CHUNK_BYTES))
        start = len(_BYTE_ORDER_MARK) if buffer.startswith(_BYTE_ORDER_MARK) else 0
        first = bytes(buffer[start : start + 4096].lstrip()[:1])
        if first != b"[":
            found = {b"": "nothing", b"{": "an object"}.get(first, repr(first.decode("latin-1")))
            raise UntrustedError(f"expected a JSON array, which begins with [, found {found}")
        begin = at = buffer.index(b"[") + 1
        depth, number, in_string, comma = 1, 0, False, False
        while depth:
            match = (_IN_STRING if in_string else _STRUCTURE).search(buffer, at)
            # A backslash may be the last byte of the chunk: then the byte that it escapes is not there yet.
            if match is None or (match[0] == b"\\" and match.end() == len(buffer)):
                at = len(buffer) if match is None else match.start()
                match = None  # It holds the buffer, which could not grow.
                del buffer[:begin]
                at, begin = at - begin, 0
                if len(buffer) > most_bytes:
                    raise UntrustedError(f"element {number + 1} is longer than {most_bytes} bytes")
                chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    raise UntrustedError(f"not valid JSON: the file ends within element {number + 1} of the array")
                buffer += chunk
                continue
            mark, at = match[0], match.end()
            match = None
            if mark == b"\\":
                at += 1
            elif mark == b'"':
                in_string = not in_string
            elif mark in _OPENING:
                depth += 1
            elif mark in _CLOSING:
                depth -= 1
            if (depth == 1 and mark == b",") or not depth:
                element = bytes(buffer[begin : at - 1]).strip()
                if element:
                    number += 1
                    yield element
                elif depth or comma:
                    raise UntrustedError(f"not valid JSON: no element after element {number} of the array")
                begin, comma = at, depth > 0
        rest = bytes(buffer[at:]).strip() or file.read(_CHUNK_BYTES).strip()
        if rest:
            raise UntrustedError("not valid JSON: the file goes on after the end of the array")
