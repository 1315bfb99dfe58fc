"""The loader with S3 and HTTP servers: batches equal those of local files, despite faults, kills and a small cache."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.servers import Choose, Fault, FaultyServer, Request, file_server, proxy
from data_pipeline.config import DataConfig
from data_pipeline.errors import FaultKind, ShardError, StorageError
from data_pipeline.history.digest import digest
from data_pipeline.loader.loader import Loader, LoaderState
from data_pipeline.media_spec import MediaSpec
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage.config import StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage
from tests.data_pipeline.conftest import plain_text
from tests.engine.fork_server import Child, fork_program

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("s3_account")]

STEPS = range(7)
SETTINGS = {"allow_http": True, "timeout_seconds": 2.0, "retry_seconds": 20, "gap_bytes": 1000}
Lines = list[tuple[int, str]]


def upload(config: DataConfig, folder: str, port: int) -> str:
    """Upload all data sets to a folder of a bucket."""
    with Storage(StorageConfig(endpoint=f"http://127.0.0.1:{port}", allow_http=True)) as storage:
        for dataset in config.datasets:
            for path in sorted(Path(dataset.manifest).parent.iterdir()):
                url = Url(f"{folder}/{dataset.name}/{path.name}")
                storage.store(url).write(url, path.read_bytes())
    return folder


@pytest.fixture
def bucket(mixture_config: DataConfig, tmp_path: Path, s3_port: int) -> str:
    """Upload the three data sets to a bucket. A fixture that damages local files must come before this one."""
    return upload(mixture_config, f"s3://mixtures/{tmp_path.name}", s3_port)


def at(
    config: DataConfig,
    folder: str,
    cache: Path,
    server: FaultyServer,
    *,
    kept: dict[str, object] | None = None,
    faults: dict[str, object] | None = None,
    **changes: object,
) -> DataConfig:
    """Return the configuration with its data sets below a URL, and with other cache, faults and storage settings."""
    raw = config.model_dump(mode="json")
    for dataset in raw["datasets"]:
        dataset["manifest"] = f"{folder}/{dataset['name']}/{dataset['name']}.manifest"
    raw["storage"] = {**SETTINGS, "endpoint": server.url, **changes}
    raw["cache"] = {"folder": str(cache), **(kept or {})}
    raw["faults"] |= faults or {}
    return DataConfig.model_validate(raw)


def every_third() -> Choose:
    """Return faults for every third response, of all kinds in turn."""
    kinds = [Fault.ERROR_500, Fault.RESET, Fault.BUSY_503, Fault.TRUNCATE, Fault.TOO_MANY_429]
    return lambda number, request: kinds[number // 3 % 5] if number % 3 == 1 else None


def damage(config: DataConfig) -> None:
    """Flip a bit of an image without changing the file's times, like a failing disk."""
    path = Path(config.datasets[0].manifest).parent / "part-00001.tar"
    times, data = path.stat(), bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def local(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> Lines:
    """Digests of the batches of local files, one image of which is damaged."""
    damage(mixture_config)
    return list(digest(mixture_config, hybrid_spec, 1, STEPS))


def tars(server: FaultyServer) -> list[Request]:
    """Return the requests for shard content."""
    return [r for r in server.requests if r.method == "GET" and r.path.partition("?")[0].endswith(".tar")]


def test_batches_of_s3_are_those_of_local_files_through_faults_at_any_ranks_workers_and_resume(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, local: Lines, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    with proxy(s3_port, every_third()).running() as server:
        for world_size, workers, resume_at in ((1, 0, None), (2, 2, 3), (3, 0, 4)):
            config = at(mixture_config, bucket, tmp_path / f"cache-{world_size}", server)
            before = len(tars(server))
            again = list(digest(config, hybrid_spec, 1, STEPS, world_size, workers, resume_at))
            assert again == local, (world_size, workers, resume_at)
            assert len(tars(server)) > before


def test_without_read_ahead_or_cached_pages_the_batches_are_the_same(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, local: Lines, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    with proxy(s3_port).running() as server:
        for ahead, keep in ((0, "all"), (10_000, "indexes"), (2**28, "indexes")):
            cache = tmp_path / f"{ahead}-{keep}"
            config = at(mixture_config, bucket, cache, server, kept={"keep": keep}, read_ahead_bytes=ahead)
            assert list(digest(config, hybrid_spec, 1, STEPS)) == local, (ahead, keep)


def test_a_warm_cache_answers_everything_but_whether_manifests_changed(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    local = list(digest(mixture_config, hybrid_spec, 1, STEPS))
    with proxy(s3_port).running() as server:
        config = at(mixture_config, bucket, tmp_path / "cache", server)
        long = list(digest(config, hybrid_spec, 1, range(15)))
        assert long[: len(local)] == local
        server.requests.clear()
        assert list(digest(config, hybrid_spec, 1, STEPS, world_size=2)) == local
        assert [request for request in server.requests if request.method != "HEAD"] == []
        assert all(request.path.endswith(".manifest") for request in server.requests)


def test_a_bit_that_flips_in_the_cache_is_noticed_and_fetched_anew(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, local: Lines, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    with proxy(s3_port).running() as server:
        config = at(mixture_config, bucket, tmp_path / "cache", server)
        assert list(digest(config, hybrid_spec, 1, STEPS)) == local
        first = len(tars(server))
        entries = [p for p in (tmp_path / "cache" / "v1").glob("??/*") if p.is_file()]
        for path in entries:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 8
            path.write_bytes(data)
        assert len(entries) > 10
        assert list(digest(config, hybrid_spec, 1, STEPS)) == local
        assert len(tars(server)) > first


def skipped(config: DataConfig, spec: MediaSpec) -> set[tuple[FaultKind, str, str]]:
    """Return kind, file name of the shard and key of all skipped samples."""
    with Loader(config, spec, seed=1) as loader:
        steps = [next(loader) for _ in STEPS]
    return {(s.kind, s.shard.rpartition("/")[2], s.key) for step in steps for s in step.skipped}


def test_a_bit_that_flips_on_the_way_is_read_again_and_one_of_the_server_is_a_fault_of_its_sample(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, local: Lines, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    seen: set[str] = set()

    def flip_first(number: int, request: Request) -> Fault | None:
        """Change the first byte, which belongs to a sample, of the first response for each shard."""
        path = request.path.partition("?")[0]
        if not path.endswith(".tar") or path in seen:
            return None
        seen.add(path)
        return Fault.FLIP

    with proxy(s3_port, flip_first).running() as server:
        config = at(mixture_config, bucket, tmp_path / "cache", server, kept={"keep": "indexes"})
        assert list(digest(config, hybrid_spec, 1, STEPS)) == local
        found = skipped(config, hybrid_spec)
    assert len(seen) > 4
    assert found == skipped(mixture_config, hybrid_spec)
    ((kind, shard, _),) = found
    assert (kind, shard) == (FaultKind.CHECKSUM, "part-00001.tar")


_RUN = """
import json, sys
from data_pipeline.config import DataConfig
from data_pipeline.history.digest import digest
from data_pipeline.media_spec import MediaSpec, Placement

config = DataConfig.model_validate_json(sys.argv[1])
spec = MediaSpec(Placement.HYBRID, patch_size=8, fixed_grid=(2, 2))
print(json.dumps(list(digest(config, spec, 1, range(int(sys.argv[2]))))))
"""


def start(config: DataConfig, log: Path) -> Child:
    """Start a process that prints the digests."""
    return fork_program(_RUN, config.model_dump_json(), str(len(STEPS)), log=log)


def lines_of(process: Child) -> Lines:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return [(step, value) for step, value in json.loads(out)]


def test_two_runs_share_a_cache_that_is_too_small_for_the_data(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, local: Lines, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    most = 30_000
    with proxy(s3_port).running() as server:
        config = at(mixture_config, bucket, tmp_path / "cache", server, kept={"max_bytes": most})
        assert [lines_of(one) for one in [start(config, tmp_path / f"{n}.log") for n in range(2)]] == [local, local]
    used = sum(p.stat().st_size for p in (tmp_path / "cache" / "v1").glob("??/*") if p.is_file())
    stored = sum(p.stat().st_size for d in mixture_config.datasets for p in Path(d.manifest).parent.iterdir())
    assert 0 < used <= most < stored


@contextmanager
def stalled(port: int, suffix: str) -> Iterator[tuple[FaultyServer, threading.Event, threading.Event]]:
    """Run a proxy that holds the third response for objects with a suffix until the last event is set."""
    reached, go_on, count = threading.Event(), threading.Event(), [0]

    def choose(number: int, request: Request) -> None:
        if request.path.partition("?")[0].endswith(suffix):
            count[0] += 1
            if count[0] == 3:
                reached.set()
                go_on.wait(60)

    with proxy(port, choose).running() as server:
        yield server, reached, go_on
        go_on.set()


def test_a_run_killed_in_the_middle_of_a_cache_write_leaves_a_cache_that_works(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path, s3_port: int
) -> None:
    folder = Path(mixture_config.datasets[1].manifest).parent
    with ShardWriter(folder, "long") as writer:
        for number in range(400):
            writer.write(f"{number:06d}", plain_text(number))
    write_manifest(folder / "text.manifest", writer.shards)
    local = list(digest(mixture_config, hybrid_spec, 1, STEPS))
    bucket = upload(mixture_config, f"s3://mixtures/{tmp_path.name}", s3_port)
    with stalled(s3_port, "long-00000.tar.index") as (server, reached, go_on):
        # With small requests, the index is partly written when the third one gets no response.
        config = at(mixture_config, bucket, tmp_path / "cache", server, request_bytes=4096, timeout_seconds=100)
        process = start(config, tmp_path / "log")
        assert reached.wait(30)
        process.send_signal(signal.SIGKILL)
        process.wait()
        go_on.set()
        halves = [p for p in (tmp_path / "cache" / "v1" / "tmp").iterdir() if p.stat().st_size]
        assert halves
        assert list(digest(config, hybrid_spec, 1, STEPS)) == local
        assert not any((tmp_path / "cache" / "v1" / "tmp").iterdir())


def test_a_shard_that_is_gone_ends_the_run_or_is_left_out_as_a_local_one(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    import obstore
    from obstore.store import S3Store

    gone = Path(mixture_config.datasets[0].manifest).parent / "part-00002.tar"
    gone.unlink()
    with proxy(s3_port).running() as server:
        url = f"{bucket}/captions/part-00002.tar"
        settings = {"endpoint": server.url, "region": "us-east-1"}
        store = S3Store("mixtures", config=settings, client_options={"allow_http": True})  # type: ignore[arg-type]
        obstore.delete(store, Url(url).path)
        config = at(mixture_config, bucket, tmp_path / "cache", server)
        with pytest.raises(ShardError, match=f"{url}: there is no such object; check bucket"):
            list(digest(config, hybrid_spec, 1, range(30)))

        skipping: dict[str, object] = {"shard": "skip", "max_share": 0.5}
        config = at(mixture_config, bucket, tmp_path / "cache", server, faults=skipping)
        plain = mixture_config.model_copy(update={"faults": config.faults})
        assert list(digest(config, hybrid_spec, 1, STEPS)) == list(digest(plain, hybrid_spec, 1, STEPS))


def test_a_server_that_goes_down_ends_the_run_which_a_resume_takes_up(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, local: Lines, bucket: str, tmp_path: Path, s3_port: int
) -> None:
    """Also if damaged shards are skipped, because a server failure does not mean that a shard is damaged."""
    down = [False]
    with proxy(s3_port, lambda number, request: Fault.BUSY_503 if down[0] else None).running() as server:
        skipping: dict[str, object] = {"shard": "skip"}
        kept: dict[str, object] = {"keep": "indexes"}
        cache = tmp_path / "cache"
        changes = {"retry_seconds": 0.5, "read_ahead_bytes": 0}
        config = at(mixture_config, bucket, cache, server, kept=kept, faults=skipping, **changes)
        with Loader(config, hybrid_spec, seed=1) as loader:
            state = [next(loader) for _ in range(3)][-1].state
            down[0] = True
            with pytest.raises(StorageError, match=r"attempts in .* failed \(data.storage.retry_seconds=0.5\).*503"):
                next(loader)
        down[0] = False
        with Loader(config, hybrid_spec, seed=1, state=LoaderState.from_json(state.to_json())) as loader:
            resumed = [next(loader) for _ in range(2)]
        with Loader(mixture_config, hybrid_spec, seed=1) as plain:
            expected = [next(plain) for _ in range(5)][3:]
        assert [step.state.lanes for step in resumed] == [step.state.lanes for step in expected]


def test_batches_of_a_web_server_are_those_of_local_files(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, local: Lines, tmp_path: Path
) -> None:
    folder = Path(mixture_config.datasets[0].manifest).parent.parent
    with file_server(folder, every_third()).running() as server:
        config = at(mixture_config, server.url, tmp_path / "cache", server)
        assert list(digest(config, hybrid_spec, 1, STEPS)) == local
