"""Duplicates and statistics of a data set on a server: what they are of the same files here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import Fault, file_server
from data_pipeline.prepare.dedup.find import DedupOptions, NamedSet, find_duplicates
from data_pipeline.prepare.stats.count import ManifestLocation, count
from data_pipeline.prepare.stats.gallery import gallery
from data_pipeline.shards.manifest import Manifest
from data_pipeline.storage.config import CacheConfig, StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage
from tests.data_pipeline.conftest import WriteSet, captioned

pytestmark = pytest.mark.fault


def listed(path: Path) -> list[dict[str, Any]]:
    """The lines of a list without the places of the shards."""
    return [{**json.loads(line), "shard": ""} for line in path.read_text().splitlines()]


def test_a_server_that_fails_now_and_then_changes_nothing(
    write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMSCALE_CACHE", str(tmp_path / "own"))
    local = write_set("a", [captioned(number % 25) for number in range(40)])
    kinds = [Fault.ERROR_500, Fault.RESET, Fault.TRUNCATE]
    server = file_server(local.parent, lambda number, request: kinds[number // 4 % 3] if number % 4 == 1 else None)
    with server.running() as running:
        url = Url(f"{running.url}/{local.name}")
        settings = StorageConfig(timeout_seconds=1.0, retry_seconds=20), CacheConfig(folder=tmp_path / "cache")
        counted = count(ManifestLocation(url, *settings)).summary
        with Storage(*settings) as storage:
            remote = Manifest.open(url, storage)
            shown = list(gallery(remote, 5))
            find_duplicates([NamedSet("a", remote)], tmp_path / "r.jsonl", DedupOptions(), signatures=tmp_path / "r")
    assert counted == count(local).summary
    here = Manifest.open(local)
    assert shown == list(gallery(here, 5))
    find_duplicates([NamedSet("a", here)], tmp_path / "l.jsonl", DedupOptions(), signatures=tmp_path / "l")
    assert listed(tmp_path / "r.jsonl") == listed(tmp_path / "l.jsonl")
    assert len(listed(tmp_path / "r.jsonl")) == 15
