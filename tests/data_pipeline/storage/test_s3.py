"""Objects on an S3 server, behind a proxy that injects faults into its responses."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.servers import Choose, Fault, FaultyServer, Request, proxy
from data_pipeline.errors import AbsentError, StaleError, StorageError
from data_pipeline.storage.config import CacheConfig, StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.objects import PAGE_BYTES
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.storage import Storage
from tests.data_pipeline.storage.conftest import read_ranges

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("s3_account")]

DATA = os.urandom(2 * PAGE_BYTES + 777)
OBJECT = Url("s3://objects/a folder/x=1/data.bin")
Open = Callable[..., tuple[Storage, FaultyServer]]


@pytest.fixture
def opened(tmp_path: Path, s3_port: int) -> Iterator[Open]:
    """Open a storage with an empty cache, which reads ``OBJECT`` from the server through a proxy."""
    with ExitStack() as stack:

        def open_(choose: Choose = lambda number, request: None, **changes: object) -> tuple[Storage, FaultyServer]:
            server = stack.enter_context(proxy(s3_port, choose).running())
            settings = {"timeout_seconds": 20, "retry_seconds": 60, "request_bytes": 400_000, **changes}
            config = StorageConfig.model_validate({"endpoint": server.url, "allow_http": True, **settings})
            patient = StorageConfig(endpoint=f"http://127.0.0.1:{s3_port}", allow_http=True)
            with Storage(patient, CacheConfig(folder=tmp_path / "cache")) as direct:
                direct.store(OBJECT).write(OBJECT, DATA)
            return stack.enter_context(Storage(config, CacheConfig(folder=tmp_path / "cache"))), server

        yield open_


def spoil_first(fault: Fault, times: int = 2) -> Choose:
    """Apply ``fault`` to the first ``times`` responses for each range."""
    seen: dict[str, int] = {}

    def choose(number: int, request: Request) -> Fault | None:
        seen[request.range] = seen.get(request.range, 0) + 1
        return fault if seen[request.range] <= times else None

    return choose


@pytest.mark.parametrize(
    "fault", [Fault.ERROR_500, Fault.BUSY_503, Fault.TOO_MANY_429, Fault.RESET, Fault.TRUNCATE, Fault.SLOW]
)
def test_what_may_pass_is_tried_again_until_the_same_bytes_are_there(opened: Open, fault: Fault) -> None:
    is_slow = fault is Fault.SLOW
    storage, server = opened(spoil_first(fault), **({"timeout_seconds": 0.5} if is_slow else {}))
    wanted = [Range(3, 300_000), Range(1_500_000, 1_500_010)]
    assert read_ranges(storage, OBJECT, wanted) == [DATA[a:b] for a, b in wanted]
    counts = Counter(server.ranges())
    assert counts.keys() == {"bytes=1500000-1500009", "bytes=3-299999"}
    # On a busy machine a sound response may exceed the short limit, too.
    assert all(count == 3 or (is_slow and count > 3) for count in counts.values())


@pytest.mark.parametrize("fault", [Fault.ERROR_500, Fault.BUSY_503, Fault.RESET, Fault.TRUNCATE, Fault.SLOW])
def test_what_does_not_pass_ends_within_the_time_in_an_error_that_names_place_and_setting(
    opened: Open, fault: Fault
) -> None:
    storage, server = opened(lambda number, request: fault, retry_seconds=1, timeout_seconds=0.2)
    with pytest.raises(
        StorageError,
        match=r"s3://objects/a folder/x=1/data.bin bytes 0-10: \d+ attempts in .* s failed .*retry_seconds=1[)]",
    ):
        read_ranges(storage, OBJECT, [Range(0, 10)])
    assert len(server.ranges()) > 1


def test_streams_and_whole_objects_survive_faults_of_every_kind(opened: Open) -> None:
    kinds = [Fault.ERROR_500, Fault.RESET, Fault.TRUNCATE, Fault.BUSY_503]
    storage, _ = opened(lambda number, request: kinds[number // 2 % 4] if number % 2 else None)
    assert b"".join(storage.store(OBJECT).stream(OBJECT)) == DATA
    path = storage.background.run(storage.cached_file(OBJECT))
    assert path.read_bytes()[: len(DATA)] == DATA


@pytest.mark.parametrize("by_answer", [False, True])
def test_an_object_that_is_replaced_while_it_is_read_is_noticed(opened: Open, by_answer: bool) -> None:
    """The server rejects the request (If-Match), or the response ignores the condition and has another etag."""
    stale = [False]
    storage, _ = opened(lambda number, request: Fault.STALE if stale[0] else None)
    remote = storage.remote_object(OBJECT, len(DATA), "v1")
    assert storage.background.run(remote.read([Range(0, 10)])) == [DATA[:10]]
    if by_answer:
        stale[0] = True
    else:
        storage.store(OBJECT).write(OBJECT, DATA[::-1])
    with pytest.raises(StaleError, match=r"data.bin: was replaced while it was read.*mmscale data index"):
        storage.background.run(remote.read([Range(PAGE_BYTES + 5, PAGE_BYTES + 15)]))


def test_an_object_of_another_size_than_was_indexed_is_noticed(opened: Open) -> None:
    storage, _ = opened()
    remote = storage.remote_object(OBJECT, len(DATA) - 1, "v1")
    with pytest.raises(StaleError, match=f"has {len(DATA)} bytes, {len(DATA) - 1} when it was indexed.*mmscale data"):
        storage.background.run(remote.read([Range(0, 10)]))


@pytest.mark.parametrize("url", ["s3://objects/a folder/missing.bin", "s3://no-such-bucket/x.bin"])
def test_an_absent_object_or_bucket_fails_at_once_and_says_what_to_check(opened: Open, url: str) -> None:
    storage, server = opened()
    location = Url(url)
    with pytest.raises(AbsentError, match=f"{url}: there is no such object; check bucket, path and endpoint"):
        read_ranges(storage, location, [Range(0, 10)])
    with pytest.raises(AbsentError, match="there is no such object"):
        storage.background.run(storage.cached_file(location))
    assert len(server.requests) == 2


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_fail_at_once_and_name_their_variables(
    s3_port: int, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "wrong")
    config = StorageConfig(endpoint=f"http://127.0.0.1:{s3_port}", allow_http=True)
    with (
        Storage(config) as storage,
        pytest.raises(StorageError, match=r"access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
    ):
        read_ranges(storage, OBJECT, [Range(0, 10)])
    assert storage.num_requests == 1


def test_an_endpoint_without_encryption_must_be_allowed(s3_port: int) -> None:
    with (
        Storage(StorageConfig(endpoint=f"http://127.0.0.1:{s3_port}", retry_seconds=0)) as storage,
        pytest.raises(StorageError, match=r"set data.storage.allow_http"),
    ):
        read_ranges(storage, OBJECT, [Range(0, 10)])


def test_objects_are_listed_in_order_and_only_below_their_folder(opened: Open) -> None:
    storage, _ = opened()
    store = storage.store(OBJECT)
    for name in ("list/b.tar", "list/a.tar", "list/deep/c.tar", "listed.tar"):
        store.write(Url(f"s3://objects/{name}"), b"x")
    names = list(store.names(Url("s3://objects/list")))
    assert names == [f"s3://objects/list/{name}" for name in ("a.tar", "b.tar", "deep/c.tar")]
