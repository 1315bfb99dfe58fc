"""The order does not depend on ranks, workers or resumes, for remote and streamed shards and with bad samples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import Fault, Request, file_server
from data_pipeline.config import DataConfig
from data_pipeline.history.digest import digest
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec

STEPS = range(6)
WORLDS = (1, 2, 3, 4, 7)
WORKERS = (0, 1, 3)


def _damage(tar: Path) -> None:
    """Flip a bit in each of two images without changing modification times, as bit rot does."""
    times, data = tar.stat(), bytearray(tar.read_bytes())
    for at in (data.index(b"IDAT"), data.rindex(b"IDAT")):
        data[at + 6] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))


def _flaky(number: int, request: Request) -> Fault | None:
    """A server on which every fifth response is an error."""
    return [Fault.ERROR_500, Fault.RESET, Fault.TRUNCATE][number // 5 % 3] if number % 5 == 2 else None


@pytest.fixture
def served(mixture_config: DataConfig, tmp_path: Path) -> Iterator[DataConfig]:
    """Captions from an unreliable server, some damaged; local texts with an index; local pages from plain tars."""
    captions, _, pages = mixture_config.datasets
    _damage(Path(captions.indexed).parent / "part-00001.tar")
    with file_server(tmp_path, _flaky).running() as server:
        raw = mixture_config.model_dump(mode="json")
        raw["lanes"] = 7
        raw["datasets"][0]["manifest"] = f"{server.url}/captions/captions.manifest"
        raw["datasets"][2] |= {"manifest": None, "shards": [f"{Path(pages.indexed).parent}/part-00000.tar"]}
        raw["packing"] |= {"strategy": "best_fit", "look_ahead": 5, "too_long": "split", "max_tokens": 40}
        raw["storage"] = {"timeout_seconds": 2.0, "retry_seconds": 30}
        raw["cache"] = {"folder": str(tmp_path / "cache")}
        yield DataConfig.model_validate(raw)


@pytest.mark.parametrize("pairs", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.long
def test_digests_are_equal_over_ranks_workers_and_resumes_on_other_ranks(
    pairs: str, served: DataConfig, hybrid_spec: MediaSpec
) -> None:
    """``some`` tests every second combination of ranks and workers, so that each number occurs."""
    plain = list(digest(served, hybrid_spec, 1, STEPS))
    assert len({checksum for _, checksum in plain}) == len(STEPS)
    for i, world_size in enumerate(WORLDS):
        for j, workers in enumerate(WORKERS):
            if pairs == "some" and (i + j) % 2:
                continue
            resume_at = 1 + (2 * i + j) % 5
            other = WORLDS[(i + j + 1) % len(WORLDS)]
            again = list(digest(served, hybrid_spec, 1, STEPS, world_size, workers, resume_at, other))
            assert again == plain, (world_size, workers, resume_at, other)


def test_that_test_meets_faults_splits_and_every_data_set(served: DataConfig, hybrid_spec: MediaSpec) -> None:
    with Loader(served, hybrid_spec, seed=1) as loader:
        steps = [next(loader) for _ in STEPS]
    assert any(step.skipped for step in steps)
    assert any(step.num_cut for step in steps)
    names = {origin.dataset for step in steps for micro in step.microbatches for origin in micro.provenance if origin}
    assert names == {dataset.name for dataset in served.datasets}


@pytest.mark.long
def test_a_mixture_with_streamed_shards_resumes_at_every_step(served: DataConfig, hybrid_spec: MediaSpec) -> None:
    plain = list(digest(served, hybrid_spec, 1, STEPS))
    for resume_at in range(1, len(STEPS)):
        assert list(digest(served, hybrid_spec, 1, STEPS, 2, 0, resume_at, 3)) == plain, resume_at
