"""Parse HTML pages, for the tests of all code that writes one."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' {{ 7777*7777 }} </style>"


class Page(HTMLParser):
    """Tags, attributes, text and charts of a page.

    Attributes:
        charts: The data of each chart, in order.
        programs: The text of each executable script.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.programs: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = ""

    def handle_endtag(self, tag: str) -> None:
        if tag != "script" or self._script is None:
            return
        if dict(self.tags[-1][1]).get("type") == "application/json":
            self.charts.append(json.loads(self._script))
        else:
            self.programs.append(self._script)
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.words.append(data)
        else:
            self._script += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def policy(self) -> str:
        """The content security policy."""
        (found,) = (a["content"] for tag, a in self.tags if tag == "meta" and a.get("http-equiv"))
        assert found is not None
        return found

    def runs_its_own_script_alone(self) -> bool:
        """Whether the page has one script and its policy allows only that script, by hash."""
        (program,) = self.programs
        digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
        media = "img-src data:; media-src data:"
        return self.policy == f"default-src 'none'; {media}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
