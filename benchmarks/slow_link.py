"""A relay that delays each GET, HEAD and PUT like a distant server and counts requests and bytes.

    python -m benchmarks.slow_link PORT MILLISECONDS

It prints its port and answers each line on stdin with the counts since the line before. It runs in a separate process,
so that it takes no CPU time from the measured reader.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK_BYTES = 1 << 18
_REQUESTS = (b"GET ", b"HEAD", b"PUT ")


class _Relay:
    def __init__(self, port: int, seconds: float) -> None:
        self.requests, self.bytes = 0, 0
        self._port, self._seconds = port, seconds

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            await asyncio.gather(self._up(reader, to_server), self._down(from_server, writer))
        except ConnectionError:  # The client has closed the connection.
            pass
        finally:
            writer.close()
            to_server.close()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if data.startswith(_REQUESTS):
                self.requests += 1
                await asyncio.sleep(self._seconds)
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            self.bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()


async def _main(port: int, seconds: float) -> None:
    relay = _Relay(port, seconds)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        print(json.dumps({"requests": relay.requests, "bytes": relay.bytes}), flush=True)
        relay.requests = relay.bytes = 0


class SlowLink:
    """A running relay. Clients connect to ``port``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def counts(self) -> tuple[int, int]:
        """Return the numbers of requests and of bytes from the server since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found = json.loads(self._line())
        return int(found["requests"]), int(found["bytes"])


@contextmanager
def slow_link(port: int, milliseconds: float) -> Iterator[SlowLink]:
    """Run a relay to a port of this machine."""
    command = [sys.executable, "-m", "benchmarks.slow_link", str(port), str(milliseconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield SlowLink(process)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2]) / 1000))
