"""Check that all ranks have the same configuration, code and data, before any rank builds a model.

each rank: values, files, code, versions --sha256--> one all-reduce of 96 bytes --equal--> continue
                                                     |
                                                     +--different--> broadcast rank 0's values, each rank lists the
                                                                     differences, all ranks raise
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.io.checksums import sha256_of
from mmscale.config import leaves, shorten
from mmscale.dist import World, all_equal, broadcast_bytes, lowest_rank_error
from mmscale.errors import ConfigError
from mmscale.io.software import ROOT, source_files, versions
from mmscale.run.config import RunConfig

_OWN_KEYS = re.compile(r"(?:stages\.\d+\.)?data\.(?:workers|prefetch|storage|cache)(?:\.|$)")
"""Keys that may differ between ranks: they change neither the order of the data nor a computed value."""
_NULL = "null"
_MOST_NAMED = 4
_MOST_CHARACTERS = 40
"""Limits that keep the message within the bytes that ``lowest_rank_error`` sends."""


def check_ranks(config: RunConfig, world: World) -> None:
    """Compare this rank's configuration, files and code with rank 0's. All ranks must call, before other collectives.

    The check covers the values of the configuration, the bytes of the local files that it names (manifests, tokenizers,
    lists of samples), the source files of this project, and the versions of libraries. Two paths count as equal if
    their files are equal.

    Raises:
        ConfigError: two ranks differ; every rank raises, with the differences of the lowest rank that differs.
    """
    if world.world_size == 1:
        return
    mine = compared_values(config)
    text = json.dumps({"root": str(ROOT), "values": mine}).encode()
    if all_equal(world, hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()):
        return
    first = json.loads(broadcast_bytes(world, text))
    difference = lowest_rank_error(world, _difference(mine, first["values"], first["root"]))
    raise ConfigError(f"the ranks of this run differ: {difference}")


def compared_values(config: RunConfig) -> dict[str, str]:
    """Return all values that must be equal on all ranks, as text, by a name for messages."""
    values = {
        key: json.dumps(value, default=str)
        for path, value in leaves(config)
        if value is not None and not _OWN_KEYS.match(key := ".".join(path))
    }
    # A stage's overrides are plain values. Only its merged data block has typed paths.
    blocks = {"": config.model_dump()} | {
        f"stages.{number}.": {"data": config.stage_data(number).model_dump()}
        for number, stage in enumerate(config.stages)
        if stage.data
    }
    for place, block in blocks.items():
        for path, file in _files(block, ()):
            values[place + ".".join(path)] = f"a file with sha256 {sha256_of(file)}"
    code = {f"source file {name}": digest for name, digest in source_files().items()}
    return values | code | {f"version of {name}": number for name, number in versions().items()}


def _files(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yield the key and path of each existing file that a configuration names."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _files(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _files(item, (*path, str(index)))
    elif isinstance(value, Path) and value.is_file():
        yield path, value


def _difference(mine: dict[str, str], first: dict[str, str], root: str) -> str | None:
    """Return a sentence with the differences of this rank from rank 0, or None."""
    names = [name for name in {**first, **mine} if mine.get(name, _NULL) != first.get(name, _NULL)]
    if not names:
        return None
    listed = "; ".join(
        f"{name} is {shorten(mine.get(name, _NULL), _MOST_CHARACTERS)} here and "
        f"{shorten(first.get(name, _NULL), _MOST_CHARACTERS)} on rank 0"
        for name in names[:_MOST_NAMED]
    )
    more = f"; and {len(names) - _MOST_NAMED} more differences" if len(names) > _MOST_NAMED else ""
    roots = (
        f"; the code is in {ROOT} here and in {root} on rank 0"
        if any(name.startswith("source file ") for name in names)
        else ""
    )
    return f"{listed}{more}{roots}. Start all ranks with the same command, code and files"
