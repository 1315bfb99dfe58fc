"""The trackers of a run, and the facts that they get about it."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mmscale.config import leaves
from mmscale.dist import World
from mmscale.metrics.trackers.trackers import RunFacts, Trackers
from mmscale.report.build import REPORT_FILE
from mmscale.report.starts import read_starts
from mmscale.run.config import RunConfig

HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(r"(password|passwd|secret|credentials?|api_key|(access|auth|api|hf)_token)$")


def open_trackers(config: RunConfig, world: World) -> Trackers:
    """Return the trackers of a run on rank 0, and an empty set of trackers on other ranks."""
    trackers = config.metrics.trackers if world.is_main else ()
    return Trackers(config.run_dir, trackers, config.metrics.log_every)


def run_facts(config: RunConfig) -> RunFacts:
    """Return what trackers show about a run. Call it on rank 0, after the start is recorded."""
    folder = config.run_dir.resolve()
    starts = read_starts(folder)
    facts: dict[str, Any] = {"report": str(folder / REPORT_FILE), "start": len(starts)}
    commit = None
    if starts:
        newest = starts[-1]
        commit = newest.commit
        facts |= {
            "start": newest.start,
            "git_commit": newest.commit or "",
            "git_dirty": bool(newest.commit_changed),
            "code": newest.code,
            "world_size": newest.world_size,
            "host": newest.host,
            **{f"version_{name}": version for name, version in newest.versions.items()},
        }
    return RunFacts(folder.name, public_values(config), commit, facts)


def public_values(config: RunConfig) -> dict[str, Any]:
    """Return the values of a configuration by dotted key, without secrets.

    Shell commands, values whose key names a secret, and the user name, password and query of a URL are hidden: a query
    may hold the signature of a private object.
    """
    return {".".join(key): _public(key[-1], value) for key, value in leaves(config)}


def _public(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_public(key, item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return f"pipe:{HIDDEN}"
    if _SECRET_KEY.search(key):
        return HIDDEN
    if "://" not in value:
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        return HIDDEN
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{HIDDEN}@{host}" if "@" in parts.netloc else host
    return urlunsplit((parts.scheme, netloc, parts.path, HIDDEN if parts.query else "", ""))
