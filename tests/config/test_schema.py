"""The class of a block: which keys a message may offer."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field

from data_pipeline.io.strict import StrictConfig
from mmscale.config.schema import model_at


class Once(StrictConfig):
    at: int


class Every(StrictConfig):
    steps: int
    offset: int = 0


class Tagged(StrictConfig):
    kind: Literal["a"] = "a"
    width: int = 1


class Required(StrictConfig):
    kind: Literal["b"]
    depth: int = 1


class Whole(StrictConfig):
    untagged: Once | Every | int = 1
    tagged: Required | Tagged = Field(default=Tagged(), discriminator="kind")


@pytest.mark.parametrize(
    ("key", "block", "model"),
    [
        ("untagged", {"at": 1, "x": 2}, Once),
        ("untagged", {"steps": 1, "x": 2}, Every),  # No tag: the member with most of these keys.
        ("untagged", {"steps": 1, "offset": 2, "at": 3}, Every),
        ("untagged", 3, None),
        ("tagged", {"kind": "b"}, Required),
        ("tagged", {"depth": 3}, Tagged),  # The only member with a default tag, whatever the keys are.
        ("tagged", {"kind": "c"}, None),
    ],
)
def test_model_at(key: str, block: Any, model: type[StrictConfig] | None) -> None:
    assert model_at(Whole, {key: block}, (key,)) is model
