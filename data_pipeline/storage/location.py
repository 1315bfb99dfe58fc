"""Parse the location of data: a local path or a URL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import core_schema

from data_pipeline.errors import DataConfigError

_WEB = ("http", "https")
SCHEMES = ("s3", "gs", "az", *_WEB)
_FOLDED = tuple((f"{scheme}:",) for scheme in SCHEMES)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Url(str):
    """The URL of an object or folder: ``scheme://host-or-bucket/path``. ``Path`` would merge the two slashes."""

    @property
    def scheme(self) -> str:
        return self.partition("://")[0]

    @property
    def root(self) -> str:
        """Scheme and host or bucket. One store serves all URLs of a root."""
        return "/".join(self.split("/", 3)[:3])

    @property
    def path(self) -> str:
        """The part after the host or bucket, without the leading slash."""
        return "".join(self.split("/", 3)[3:])

    @property
    def key(self) -> str:
        """Name of the object on the server. HTTP URLs are percent-decoded; bucket URLs are used as they are."""
        return unquote(self.path) if self.scheme in _WEB else self.path

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The extension, as ``.tar`` for ``.../x.tar``; empty if the name has none."""
        stem, dot, end = self.name.rpartition(".")
        return dot + end if stem else ""

    @property
    def parent(self) -> Url:
        """The folder that contains this object."""
        return Url(self.rpartition("/")[0])

    def child(self, relative: str) -> Url:
        """Return the URL of ``relative`` below this folder."""
        return Url(f"{self}/{quote(relative) if self.scheme in _WEB else relative}")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


def parse_location(value: Any) -> Path | Url:
    """Return ``value`` as a ``Path`` or a ``Url``. ``file://`` URLs become paths.

    A URL that was converted to a ``Path``, which merges its slashes, is recognised too.

    Raises:
        DataConfigError: ``value`` has another type, the scheme is unknown, the URL has no host or path, or it contains
            a user name, a password, a query, a fragment, ``..`` or an empty part.
    """
    if isinstance(value, Url):
        return value
    if isinstance(value, Path):
        if value.parts[:1] not in _FOLDED:
            return value
        value = str(value).replace(":/", "://", 1)
    if not isinstance(value, str):
        raise DataConfigError(f"{value!r}: expected a path or a URL")
    match = _URL.fullmatch(value)
    if match is None:
        return Path(value)
    scheme = match[1].lower()
    if scheme == "file":
        return Path(f"/{match[2].partition('/')[2]}")
    if scheme not in SCHEMES:
        raise DataConfigError(f"{value}: unknown scheme {match[1]}://; known are file:// and {', '.join(SCHEMES)}://")
    url = Url(f"{scheme}://{match[2]}")
    host = url.root.partition("://")[2]
    if not host or not url.path:
        raise DataConfigError(
            f"{value}: expected {scheme}://{'BUCKET' if scheme in ('s3', 'gs', 'az') else 'HOST'}/PATH"
        )
    if "@" in host:
        raise DataConfigError(
            f"{scheme}://{host.rpartition('@')[2]}/...: a URL must contain no name or password; see docs/data.md"
        )
    if "?" in url or "#" in url or ".." in url.path.split("/") or "//" in url.path:
        raise DataConfigError(f"{value}: expected a plain path, without ?, #, '..' or an empty part")
    return url


def local_path(value: Any, use: str) -> Path:
    """Return ``value`` as a local path.

    Args:
        value: As for ``parse_location``.
        use: The operation, for the message: ``ingest reads``.

    Raises:
        DataConfigError: it is a URL, or as ``parse_location``.
    """
    location = parse_location(value)
    if isinstance(location, Url):
        raise DataConfigError(f"{location}: {use} local files only; docs/data.md lists the commands that take URLs")
    return location


def _validate(value: Any) -> Path | Url:
    try:
        return parse_location(value)
    except DataConfigError as error:
        raise ValueError(str(error)) from error


Location = Annotated[
    Path | Url,
    PlainValidator(_validate),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "path-or-url"}),
]
"""A location in a configuration: a path, or a URL with one of ``SCHEMES``."""
