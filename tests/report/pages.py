"""Reading pages back, for the tests of everything that writes one."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' {{ 7777*7777 }} </style>"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
