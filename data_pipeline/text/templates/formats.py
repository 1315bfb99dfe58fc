"""Format strings over the fields of a sample: ``{name}`` and ``{name.inner}``, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from string import Formatter
from typing import Any

from data_pipeline.errors import FaultKind, SampleError


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> tuple[tuple[str, str | None], ...]:
    """Literal text and field name pairs.

    Raises:
        ValueError: unbalanced braces, an unnamed field, a conversion or a format specification.
    """
    parsed = []
    for literal, name, specification, conversion in Formatter().parse(text):
        if name is not None and (not name.replace(".", "").replace("_", "").isalnum() or specification or conversion):
            raise ValueError(f"format string {text!r}: expected {{name}} or {{name.inner}}, nothing else in braces")
        parsed.append((literal, name))
    return tuple(parsed)


def look_up(name: str, fields: Mapping[str, Any]) -> Any:
    """The value of a field; ``a.b`` is field b of the object a.

    Raises:
        SampleError: there is none, or it is null.
    """
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise SampleError(
                f"field {name!r} is missing; the sample has {', '.join(sorted(fields)) or 'no fields'}",
                kind=FaultKind.TEXT,
            )
        value = value[key]
    return value


def fill(text: str, fields: Mapping[str, Any]) -> str:
    """The format string with its fields filled in; a list is joined with commas.

    Raises:
        SampleError: a field is missing.
    """
    out = []
    for literal, name in parse(text):
        out.append(literal)
        if name is not None:
            value = look_up(name, fields)
            out.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "".join(out)
