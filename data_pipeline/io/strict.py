"""Base classes of all pydantic models: frozen, without unknown keys, with finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

LARGEST_INT = 2**53
"""Largest absolute value of an integer setting. Larger integers are not exact in float64."""
LARGEST_FLOAT = 1e38
"""Largest absolute value of a float setting. Values above 3.4e38 are infinite in float32."""


class StrictRecord(BaseModel):
    """A validated record of a file. Unknown keys and non-finite floats are errors; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class StrictConfig(StrictRecord):
    """A configuration block: a record whose numbers are within ``LARGEST_INT`` and ``LARGEST_FLOAT``, also in mappings.

    The string under a field is its documentation: meaning, unit, legal range.
    """

    @field_validator("*", mode="after")
    @classmethod
    def _check_numbers(cls, value: Any) -> Any:
        waiting = [value]
        while waiting:  # Children are pushed in reverse, so the first number out of bounds is reported.
            item = waiting.pop()
            if isinstance(item, int | float):
                largest = LARGEST_INT if isinstance(item, int) else LARGEST_FLOAT
                if not abs(item) <= largest:  # Also true for NaN.
                    raise ValueError(f"{item:.6g}: expected a finite number within ±{largest:.6g}")
            elif isinstance(item, dict):
                waiting.extend(reversed(item.values()))
            elif isinstance(item, list | tuple):
                waiting.extend(reversed(item))
        return value


_REASONS = {
    "missing": "required, and missing",
    "extra_forbidden": "unknown key",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "too_short": "give at least {min_length}, not {actual_length}",
    "too_long": "give at most {max_length}, not {actual_length}",
    "string_pattern_mismatch": "must match {pattern}",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "expected a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "expected a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false"),
    **dict.fromkeys(("string_type", "string_sub_type"), "expected a text"),
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), "expected a list"),
    **dict.fromkeys(("dict_type", "mapping_type"), "expected a mapping of keys to values"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dataclass_type"), "expected a block of keys"),
    "path_type": "expected a path",
}
"""Replacements for pydantic's messages, which name Python types instead of those of a configuration file."""


def reason_of(detail: Mapping[str, Any]) -> str:
    """Return the reason for an item of ``ValidationError.errors()``, in the terms of configuration files."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short" and context["min_length"] == 1:
        return "give at least one"
    if kind in _REASONS:
        return _REASONS[kind].format(**context)
    message: str = detail["msg"]
    return f"{message[:1].lower()}{message[1:]}"


def first_fault(error: ValidationError, value: Any = None) -> str:
    """Return path and reason of the first error; see ``faults_of``."""
    return faults_of(error, value)[0]


def faults_of(error: ValidationError, value: Any = None, prefix: str = "") -> list[str]:
    """Return path and reason of each error: ``heldout.a.score: expected a number``.

    Args:
        error: The exception of pydantic.
        value: The validated value. It is used to remove from each path the names of union members that pydantic
            inserts. None keeps pydantic's path.
        prefix: Path of ``value`` itself, prepended to each path.
    """
    return [_sentence(detail, value, prefix) for detail in error.errors(include_url=False)]


def _sentence(detail: Mapping[str, Any], value: Any, prefix: str) -> str:
    path = [prefix]
    known_value = value is not None
    for word in detail["loc"]:
        known = word in value if isinstance(value, dict) else isinstance(value, list | tuple) and isinstance(word, int)
        if known or not known_value:
            path.append(str(word))
        value = value[word] if known else value
    if detail["type"] == "missing" and detail["loc"] and known_value:
        path.append(str(detail["loc"][-1]))
    return ": ".join([*filter(None, [".".join(filter(None, path))]), reason_of(detail)])
