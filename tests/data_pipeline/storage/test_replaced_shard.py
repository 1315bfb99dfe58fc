"""A remote tar that was replaced by another of equal size counts as one stale shard, not as bad samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.servers import file_server
from data_pipeline.config import DataConfig
from data_pipeline.errors import FaultKind, ReplacedError
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.conftest import WriteSet, captioned

pytestmark = pytest.mark.fault


def change(tar: Path, rows: range) -> None:
    """Change a byte of every member of some samples, without changing the size of the tar."""
    index, data = ShardIndex.open(tar), bytearray(tar.read_bytes())
    for row in rows:
        for member in index.row(row).members:
            data[member.offset + member.size // 2] ^= 1
    tar.write_bytes(data)


def epoch(base: DataConfig, spec: MediaSpec, url: str, cache: Path, **faults: object) -> tuple[int, list[Skipped]]:
    """Return the number of samples of one epoch, and the skipped samples."""
    changes = {
        "datasets": [{"name": "only", "manifest": url, "max_epochs": 1}],
        "lanes": 1,
        "packing": {"max_tokens": 90},
        "faults": {"max_share": 0.9, **faults},
        "storage": {"allow_http": True, "timeout_seconds": 2.0, "retry_seconds": 5},
        "cache": {"folder": cache},
    }
    found, skipped = 0, list[Skipped]()
    with Loader(DataConfig.model_validate(base.model_dump() | changes), spec, seed=1) as loader:
        for step in loader:
            found += step.num_samples
            skipped += step.skipped
            if step.exhausted:
                return found, skipped
    raise AssertionError("unreachable")


def test_a_replaced_tar_is_a_stale_shard_and_a_damaged_sample_is_a_sample(
    tmp_path: Path, write_set: WriteSet, mixture_config: DataConfig, hybrid_spec: MediaSpec
) -> None:
    manifest = Manifest.open(write_set("only", [captioned(number) for number in range(39)]))
    tar = manifest.shard_path(1)
    whole = tar.read_bytes()
    with file_server(tmp_path).running() as server:
        url = f"{server.url}/only/only.manifest"
        change(tar, range(13))
        with pytest.raises(ReplacedError, match=r"part-00001\.tar: its index is stale: the tar was replaced"):
            epoch(mixture_config, hybrid_spec, url, tmp_path / "a")
        found, skipped = epoch(mixture_config, hybrid_spec, url, tmp_path / "b", shard="skip")
        assert found == 26
        assert {skip.kind for skip in skipped} == {FaultKind.SHARD}
        assert [skip.recalled for skip in skipped] == [False] + [True] * 12  # Only the first sample was read.

        tar.write_bytes(whole)
        change(tar, range(4))
        found, skipped = epoch(mixture_config, hybrid_spec, url, tmp_path / "c")
        assert found == 35
        assert {(skip.kind, skip.key) for skip in skipped} == {
            (FaultKind.CHECKSUM, f"{number:06d}") for number in range(13, 17)
        }
