"""``load`` reads the output of ``dump`` as an equal value, for any strings and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from data_pipeline.io.strict import LARGEST_FLOAT, LARGEST_INT, StrictConfig
from data_pipeline.storage.location import Location
from mmscale.config import dump, load


class Left(StrictConfig):
    kind: Literal["left"] = "left"
    numbers: tuple[float, ...] = ()


class Right(StrictConfig):
    kind: Literal["right"] = "right"
    words: list[str] = []
    table: dict[str, int | str | None] = {}


class Root(StrictConfig):
    word: str
    path: Path
    number: float
    count: int | None
    flag: bool
    free: dict[str, Any] = {}
    sides: list[Annotated[Left | Right, Field(discriminator="kind")]] = []


# Text that a configuration may contain: no lone surrogates and no NUL. Other control characters are escaped.
words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")) | st.sampled_from(
    [
        "1e-3",
        "no",
        "true",
        "null",
        "~",
        "",
        "0x10",
        "010",
        "1_000",
        ".inf",
        "- a",
        "a: b",
        "#",
        "'",
        "2024-01-01",
        "=",
        "<<",
    ]
)
floats = st.floats(-LARGEST_FLOAT, LARGEST_FLOAT)
integers = st.integers(-LARGEST_INT, LARGEST_INT)
keys = words.filter(lambda word: word != "<<")
free = st.recursive(
    st.none() | st.booleans() | integers | floats | words,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
    max_leaves=8,
)
sides = st.builds(Left, numbers=st.lists(floats).map(tuple)) | st.builds(
    Right, words=st.lists(words), table=st.dictionaries(keys, st.none() | integers | words)
)
roots = st.builds(
    Root,
    word=words,
    path=st.just(Path("runs/a")),
    number=floats,
    count=st.none() | integers,
    flag=st.booleans(),
    free=st.dictionaries(keys, free),
    sides=st.lists(sides),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dump")


@given(root=roots)
@pytest.mark.long
def test_dump_loads_to_an_equal_value(folder: Path, root: Root) -> None:
    path = folder / "dumped.yaml"
    path.write_text(dump(root), encoding="utf-8", newline="")
    assert load(path, [], Root).value == root


def test_dump_is_readable() -> None:
    root = Root(word="no", path=Path("a"), number=1e-5, count=None, flag=True, sides=[Left(numbers=(0.9, 0.95))])
    assert dump(root) == (
        "word: no\npath: a\nnumber: 1.0e-05\ncount: null\nflag: true\nfree: {}\n"
        "sides:\n- kind: left\n  numbers: [0.9, 0.95]\n"
    )


class _WithLocation(StrictConfig):
    location: Location


@pytest.mark.parametrize("location", ["s3://bucket/a b/x.manifest", "https://host/x.manifest", "folder/x.manifest"])
def test_locations_survive(tmp_path: Path, location: str) -> None:
    value = _WithLocation.model_validate({"location": location})
    (tmp_path / "x.yaml").write_text(dump(value))
    assert load(tmp_path / "x.yaml", [], _WithLocation).value == value
