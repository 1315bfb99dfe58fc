"""Objects on an HTTP server whose responses have faults."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.servers import Choose, Fault, FaultyServer, Request, file_server
from data_pipeline.errors import ManifestError, StaleError, StorageError
from data_pipeline.storage.config import CacheConfig, StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.objects import PAGE_BYTES
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.storage import Storage
from data_pipeline.storage.store import LocalStore, ObjectInfo
from tests.data_pipeline.storage.conftest import read_ranges

pytestmark = pytest.mark.fault

DATA = os.urandom(3 * PAGE_BYTES + 1234)
CONFIG = StorageConfig(timeout_seconds=20, retry_seconds=60, gap_bytes=1000, request_bytes=400_000)
Open = Callable[..., tuple[Storage, Url, FaultyServer]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Open an HTTP server of one file, and a storage with an empty cache."""
    with ExitStack() as stack:

        def open_(
            choose: Choose = lambda number, request: None, config: StorageConfig = CONFIG
        ) -> tuple[Storage, Url, FaultyServer]:
            folder = tmp_path / "served"
            folder.mkdir(exist_ok=True)
            (folder / "a file.bin").write_bytes(DATA)
            server = stack.enter_context(file_server(folder, choose).running())
            storage = stack.enter_context(Storage(config, CacheConfig(folder=tmp_path / "cache")))
            return storage, Url(f"{server.url}/a%20file.bin"), server

        yield open_


def spoil_first(fault: Fault, times: int = 1) -> Choose:
    """Apply ``fault`` to the first ``times`` responses for each range."""
    seen: dict[str, int] = {}

    def choose(number: int, request: Request) -> Fault | None:
        seen[request.range] = seen.get(request.range, 0) + 1
        return fault if seen[request.range] <= times else None

    return choose


def test_neighbours_are_one_request_and_long_ranges_several(opened: Open) -> None:
    storage, url, server = opened()
    wanted = [Range(5000, 5100), Range(10, 20), Range(4100, 4200), Range(20, 30), Range(7, 7)]
    assert read_ranges(storage, url, wanted) == [DATA[a:b] for a, b in wanted]
    assert sorted(server.ranges()) == ["bytes=10-29", "bytes=4100-5099"]
    server.requests.clear()
    assert read_ranges(storage, url, [Range(100, 1_000_100)]) == [DATA[100:1_000_100]]
    assert len(server.ranges()) == 3  # 1,000,000 bytes in requests of at most 400,000.


@pytest.mark.parametrize(
    "fault",
    [Fault.ERROR_500, Fault.BUSY_503, Fault.TOO_MANY_429, Fault.RESET, Fault.TRUNCATE, Fault.SLOW],
)
def test_what_may_pass_is_tried_again(opened: Open, fault: Fault) -> None:
    is_slow = fault is Fault.SLOW
    config = CONFIG.model_copy(update={"timeout_seconds": 0.5}) if is_slow else CONFIG
    storage, url, server = opened(spoil_first(fault), config)
    assert read_ranges(storage, url, [Range(3, 300_000)]) == [DATA[3:300_000]]
    # On a busy machine a sound response may exceed the short limit, too.
    assert server.ranges() == ["bytes=3-299999"] * (max(2, len(server.ranges())) if is_slow else 2)


def test_a_server_that_stays_down_is_an_error_with_a_reason(opened: Open) -> None:
    config = CONFIG.model_copy(update={"retry_seconds": 1})
    storage, url, server = opened(lambda number, request: Fault.BUSY_503, config)
    with pytest.raises(StorageError, match=r"a%20file.bin.*attempts.*retry_seconds=1[)].*503"):
        read_ranges(storage, url, [Range(0, 10)])
    assert len(server.ranges()) > 1


@pytest.mark.parametrize(
    ("path", "complaint"),
    [("missing.bin", "no such object; check bucket, path"), ("forbidden/x.bin", "access denied; check the address")],
)
def test_what_cannot_pass_fails_at_once_and_says_what_to_check(opened: Open, path: str, complaint: str) -> None:
    storage, url, server = opened()
    with pytest.raises(StorageError, match=complaint):
        read_ranges(storage, url.parent.child(path), [Range(0, 10)])
    with pytest.raises(StorageError, match=complaint):
        storage.store(url).stat(url.parent.child(path))
    assert len(server.requests) == 2


def test_a_range_behind_the_end_names_the_size(opened: Open) -> None:
    storage, url, _ = opened()
    with pytest.raises(StorageError, match=f"has {len(DATA)} bytes"):
        read_ranges(storage, url, [Range(len(DATA) - 5, len(DATA) + 5)])
    with pytest.raises(StorageError, match="ends before"):
        read_ranges(storage, url, [Range(len(DATA) + 5, len(DATA) + 15)])


@pytest.mark.parametrize("by_answer", [False, True])
def test_a_replaced_object_is_an_error_that_names_it(opened: Open, tmp_path: Path, by_answer: bool) -> None:
    """The server rejects the request (If-Match), or ignores the condition and sends another etag."""
    spoiled = [False]
    storage, url, _ = opened(lambda number, request: Fault.STALE if spoiled[0] else None)
    store = storage.store(url)
    info = store.stat(url)
    assert read_ranges(storage, url, [Range(0, 10)], info) == [DATA[:10]]
    if by_answer:
        spoiled[0] = True
    else:
        (tmp_path / "served" / "a file.bin").write_bytes(DATA[::-1])
    with pytest.raises(StaleError, match=r"a%20file.bin: was replaced"):
        read_ranges(storage, url, [Range(0, 10)], info)


def test_streaming_gives_the_bytes_of_the_file_through_faults(opened: Open, tmp_path: Path) -> None:
    storage, url, _ = opened(lambda number, request: Fault.TRUNCATE if number % 3 == 1 else None)
    chunks = list(storage.store(url).stream(url))
    assert b"".join(chunks) == DATA
    local = LocalStore()
    path = tmp_path / "served" / "a file.bin"
    assert b"".join(local.stream(path)) == DATA
    with pytest.raises(StaleError, match="was replaced"):
        list(local.stream(path, ObjectInfo(1, "other")))


def test_requests_at_the_same_time_are_bounded(opened: Open) -> None:
    import threading

    lock, now, most = threading.Lock(), [0], [0]
    release = threading.Event()

    def choose(number: int, request: Request) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 3:
                release.set()
        release.wait(60)  # Wait for three simultaneous requests: this is the limit, and a fourth would be counted.
        with lock:
            now[0] -= 1

    config = CONFIG.model_copy(update={"max_concurrency": 3, "request_bytes": 100_000, "timeout_seconds": 100})
    storage, url, server = opened(choose, config)
    info = ObjectInfo(*_stat(storage, url))
    assert read_ranges(storage, url, [Range(0, 2_000_000)], info) == [DATA[:2_000_000]]
    assert len(server.ranges()) == 20
    assert most[0] == 3


def _stat(storage: Storage, url: Url) -> tuple[int, str]:
    info = storage.store(url).stat(url)
    return info.size, info.etag


def read(storage: Storage, url: Url, ranges: list[Range], identity: str = "v1", fresh: bool = False) -> list[bytes]:
    remote = storage.remote_object(url, len(DATA), identity)
    return storage.background.run(remote.read(ranges, fresh=fresh))


def test_pages_serve_later_reads_without_a_request(opened: Open, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"request_bytes": 8 * PAGE_BYTES})
    storage, url, server = opened(config=config)
    wanted = [Range(PAGE_BYTES - 10, PAGE_BYTES + 10), Range(5, 9)]
    assert read(storage, url, wanted) == [DATA[a:b] for a, b in wanted]
    assert server.ranges() == [f"bytes=0-{2 * PAGE_BYTES - 1}"]
    with Storage(config, CacheConfig(folder=tmp_path / "cache")) as later:  # As in another process.
        assert read(later, url, [Range(100, 2 * PAGE_BYTES)]) == [DATA[100 : 2 * PAGE_BYTES]]
        assert later.num_requests == 0
        assert read(later, url, [Range(0, len(DATA))]) == [DATA]
        assert later.num_requests == 1  # One request for the missing pages.
        assert read(later, url, [Range(0, 10)], identity="v2") == [DATA[:10]]
        assert later.num_requests == 2  # Pages of another version are separate.
        assert read(later, url, [Range(0, 10)], fresh=True) == [DATA[:10]]
        assert later.num_requests == 3


def test_a_damaged_page_is_fetched_again(opened: Open, tmp_path: Path) -> None:
    storage, url, _ = opened()
    read(storage, url, [Range(0, 10)])
    (page,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > PAGE_BYTES]
    damaged = bytearray(page.read_bytes())
    damaged[5] ^= 1
    page.write_bytes(damaged)
    before = storage.num_requests
    assert read(storage, url, [Range(0, 10)]) == [DATA[:10]]
    assert storage.num_requests > before


def test_an_object_of_another_size_is_stale(opened: Open) -> None:
    storage, url, _ = opened()
    remote = storage.remote_object(url, len(DATA) + 1, "v1")
    with pytest.raises(StaleError, match=f"has {len(DATA)} bytes, {len(DATA) + 1} when it was indexed"):
        storage.background.run(remote.read([Range(0, 10)]))


def test_whole_objects_are_fetched_once_and_mapped_from_the_cache(opened: Open, tmp_path: Path) -> None:
    storage, url, server = opened()
    path = storage.background.run(storage.cached_file(url, "v1"))
    assert path.read_bytes()[: len(DATA)] == DATA
    count = len(server.ranges())
    with Storage(CONFIG, CacheConfig(folder=tmp_path / "cache")) as later:
        assert later.background.run(later.cached_file(url, "v1")) == path
        assert later.num_requests == 0
        later.background.run(
            later.cached_file(url)
        )  # Without an identity, the storage asks the server for the version.
    assert len(server.ranges()) == 2 * count
    assert [request.method for request in server.requests].count("HEAD") == 1


def test_an_object_that_is_evicted_before_it_is_opened_is_fetched_again(opened: Open) -> None:
    storage, url, _ = opened()
    evictions = [3]

    def open_evicted(path: Path) -> bytes:
        if evictions[0]:
            evictions[0] -= 1
            path.unlink()  # As another process that shares a full cache.
        if not path.exists():
            raise ManifestError("cannot be read: No such file")
        return path.read_bytes()[: len(DATA)]

    assert storage.background.run(storage.map_cached(url, open_evicted, "v1")) == DATA
    evictions[0] = 100
    with pytest.raises(StorageError, match=r"evicted from the cache .* 8 times .*raise data\.cache\.max_bytes"):
        storage.background.run(storage.map_cached(url, open_evicted, "v1"))


def test_a_cache_too_small_for_an_index_says_so(opened: Open, tmp_path: Path) -> None:
    _, url, _ = opened()
    with (
        Storage(CONFIG, CacheConfig(folder=tmp_path / "small", max_bytes=1000)) as storage,
        pytest.raises(StorageError, match=r"do not fit into the cache .*max_bytes=1000"),
    ):
        storage.background.run(storage.cached_file(url, "v1"))


def test_a_server_without_ranges_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(DATA[:1000])
    with _plain_server(tmp_path) as root, Storage(CONFIG) as storage:
        url = Url(f"{root}/x.bin")
        with pytest.raises(StorageError, match="sends no byte ranges"):
            read_ranges(storage, url, [Range(5, 10)])


@contextmanager
def _plain_server(folder: Path) -> Iterator[str]:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


_FORKING = """
import os, sys
from data_pipeline.errors import StorageError
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage

url = Url(sys.argv[1])
Storage().store(url).stat(url)
if os.fork() == 0:
    try:
        Storage().store(url).stat(url)
        os._exit(1)
    except StorageError as error:
        os._exit(7 if "forkserver" in str(error) else 2)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_child_is_told_instead_of_hanging(opened: Open) -> None:
    _, url, _ = opened()
    done = subprocess.run([sys.executable, "-c", _FORKING, url], timeout=60, check=False)
    assert done.returncode == 7


def test_closing_ends_a_slow_read_at_once(opened: Open) -> None:
    import threading

    config = CONFIG.model_copy(update={"timeout_seconds": 1000})
    asked = threading.Event()

    def choose(number: int, request: Request) -> Fault:
        asked.set()
        return Fault.SLOW

    storage, url, _ = opened(choose, config)
    errors: list[BaseException] = []

    def reading() -> None:
        try:
            read_ranges(storage, url, [Range(0, 10)])
        except StorageError as error:
            errors.append(error)

    thread = threading.Thread(target=reading)
    thread.start()
    assert asked.wait(20)
    storage.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "closed" in str(errors[0])
