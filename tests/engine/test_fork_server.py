from __future__ import annotations

import socket
from pathlib import Path

from tests.engine.fork_server import fork_program, fork_server


def test_a_client_that_dies_leaves_the_server_to_the_others(tmp_path: Path) -> None:
    server, log = fork_server(0), tmp_path / "log"
    for sent in (b"", b'{"poll": ', b'{"poll": 1}\n', b"junk\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server._address))
            client.sendall(sent)
    for program, code in (("raise SystemExit", 0), ("raise SystemExit(3)", 3), ("raise SystemExit('no')", 1)):
        assert fork_program(program, log=log).wait() == code
    assert log.read_text() == "no\n"
