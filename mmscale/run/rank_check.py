"""Checks before anything is built that all ranks run the same configuration, code and data.

each rank: values, files, code, versions --sha256--> one all-reduce of 96 bytes --equal--> go on
                                                     |
                                                     +--different--> rank 0's values to all, each rank names
                                                                     what differs, all ranks raise
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
from mmscale.dist import World, all_equal, broadcast_bytes, first_complaint
from mmscale.errors import ConfigError
from mmscale.io.software import ROOT, source_files, versions
from mmscale.run.config import RunConfig

_OWN_KEYS = re.compile(r"(?:stages\.\d+\.)?data\.(?:workers|prefetch|storage|cache)(?:\.|$)")
"""Keys that each machine may have its own values of: they change neither the order of the data nor a number."""
_NULL = "null"
_SHOWN = 4
_SHOWN_LETTERS = 40
"""So that a sentence fits into ``first_complaint``."""


def check_ranks(config: RunConfig, world: World) -> None:
    """Compares what decides a run on this rank with the other ranks. All ranks must call, before any other collective.

    Compared are the values of the configuration, the bytes of the local files that it names (manifests, tokenizers,
    lists of samples), our source files, and versions of libraries. Two paths whose files are equal count as equal.

    Raises:
        ConfigError: two ranks differ; every rank raises and names what differs.
    """
    if world.world_size == 1:
        return
    mine = compared_values(config)
    text = json.dumps({"root": str(ROOT), "values": mine}).encode()
    if all_equal(world, hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()):
        return
    first = json.loads(broadcast_bytes(world, text))
    complaint = first_complaint(world, _complaint(mine, first["values"], first["root"]))
    raise ConfigError(f"the ranks of this run differ: {complaint}")


def compared_values(config: RunConfig) -> dict[str, str]:
    """Everything that must be the same on all ranks, as text by a name that a user knows."""
    values = {
        key: json.dumps(value, default=str)
        for path, value in leaves(config)
        if value is not None and not _OWN_KEYS.match(key := ".".join(path))
    }
    # Overrides of a stage are plain values; its data block knows which of them are files.
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
    """The existing files that a configuration names, with their keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _files(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _files(item, (*path, str(index)))
    elif isinstance(value, Path) and value.is_file():
        yield path, value


def _complaint(mine: dict[str, str], first: dict[str, str], root: str) -> str | None:
    """How this rank differs from rank 0; None if it does not."""
    names = [name for name in {**first, **mine} if mine.get(name, _NULL) != first.get(name, _NULL)]
    if not names:
        return None
    shown = "; ".join(
        f"{name} is {shorten(mine.get(name, _NULL), _SHOWN_LETTERS)} here and "
        f"{shorten(first.get(name, _NULL), _SHOWN_LETTERS)} on rank 0"
        for name in names[:_SHOWN]
    )
    more = f"; and {len(names) - _SHOWN} more differences" if len(names) > _SHOWN else ""
    roots = (
        f"; the code is in {ROOT} here and in {root} on rank 0"
        if any(name.startswith("source file ") for name in names)
        else ""
    )
    return f"{shown}{more}{roots}. Start all ranks with the same command, code and files"
