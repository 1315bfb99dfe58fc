"""A hub on the loopback interface: the endpoints that ``huggingface_hub`` calls to list, download and upload files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The state of the server.

    Attributes:
        files: Content by repository and file name.
        private: Visibility that the client requested for each new repository.
        downloads: Names of the files that were downloaded.
        tokens: Values of the ``Authorization`` header of uploads.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.downloads: list[str] = []
        self.tokens: set[str] = set()
        self.url = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, value: Any, status: int = 200) -> None:
            self._send(json.dumps(value).encode(), status, Content_Type="application/json")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            words = self.path.split("?")[0].strip("/").split("/")
            is_api = words[:2] == ["api", "models"]
            words = words[2:] if is_api else words
            name, action = "/".join(words[:2]), words[2] if len(words) > 2 else "revision"
            files = hub.files.get(name)
            if files is None:
                self._send(b"{}", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif is_api and action == "revision":
                self._json({"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]})
            elif is_api and action == "tree":
                oid = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
                self._json([{"type": "file", "path": f, "size": len(files[f]), "oid": oid[f]} for f in files])
            else:
                content = files[words[-1]]
                if self.command == "GET":
                    hub.downloads.append(words[-1])
                etag = hashlib.sha1(content).hexdigest()
                self._send(content, ETag=f'"{etag}"', X_Repo_Commit=SHA)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization", ""))
            if self.path.endswith("/repos/create"):
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.files.setdefault(name, {})
                hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
                self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                self._json({"files": modes})
            else:
                name = "/".join(self.path.split("/")[3:5])
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._json({"commitUrl": f"{hub.url}/{name}/commit/{SHA}", "commitOid": SHA, "success": True})

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
