"""Messages of validation errors: path and reason of each error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from data_pipeline.io.strict import StrictConfig, faults_of, first_fault


class Small(StrictConfig):
    """One variant of a block."""

    kind: Literal["small"] = "small"
    width: int = Field(1, ge=1)


class Large(StrictConfig):
    """The other variant."""

    kind: Literal["large"] = "large"
    depth: int


class Whole(StrictConfig):
    """A block of blocks."""

    part: Annotated[Small | Large, Field(discriminator="kind")] = Small()
    rows: tuple[Small, ...] = ()


def refused(value: dict[str, Any]) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(value)
    return caught.value


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"part": {"kind": "small", "width": 0}}, "part.width: must be at least 1"),
        ({"part": {"kind": "large"}}, "part.depth: required, and missing"),
        ({"rows": ({"width": "x"},)}, "rows.0.width: expected a whole number"),
        ({"rows": [{}, {"widht": 1}]}, "rows.1.widht: unknown key"),
    ],
)
def test_the_path_holds_the_keys_and_no_names_of_variants(value: dict[str, Any], fault: str) -> None:
    error = refused(value)
    assert first_fault(error, value) == fault
    assert faults_of(error, value) == [fault]
    assert faults_of(error, value, "stages.1 (b).model") == [f"stages.1 (b).model.{fault}"]


def test_every_fault_is_returned_and_without_the_value_the_path_is_pydantics() -> None:
    value = {"part": {"kind": "small", "width": 0}, "rows": 3}
    error = refused(value)
    assert faults_of(error, value) == ["part.width: must be at least 1", "rows: expected a list"]
    assert first_fault(error) == "part.small.width: must be at least 1"
