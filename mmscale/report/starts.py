"""Write and read ``starts/starts.jsonl``: one line per start of a run, with the changes since the start before."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, ValidationError

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.strict import StrictConfig
from mmscale.config.trust import STARTS_FILE

_MOST_BYTES = 1 << 26
"""``read_starts`` reads at most this many bytes at the end of the file. Ten thousand starts take 10 MB."""


class StartRecord(StrictConfig):
    """One start of a run: the processes of all ranks, from the command to its end.

    Attributes:
        start: Number of the start, from 1.
        time: Time at which training began, UTC.
        step: Number of steps that the run had completed before.
        world_size: Number of ranks.
        config: File of the configuration, relative to the run folder. Starts with equal values share a file.
        changed: Old and new value, as text, of each key that differs from the start before.
        versions: Versions of mmscale, Python and libraries.
        code: sha256 of the source files of mmscale.
        commit: Git commit of the code; null if git does not track it.
        commit_changed: Whether tracked files differed from that commit; null without a commit.
        host: Machine of rank 0.
        pid: Process of rank 0.
    """

    start: int
    time: str
    step: int
    world_size: int
    config: str = Field(pattern=r"^starts/config-\d{4,}\.yaml$")
    changed: dict[str, tuple[str, str]]
    versions: dict[str, str]
    code: str
    commit: str | None
    commit_changed: bool | None
    host: str
    pid: int

    @property
    def code_name(self) -> str:
        """Version and commit (or code digest) as text for a person."""
        version = self.versions.get("mmscale", "")
        if self.commit is None:
            return f"{version}, code {self.code[:10]}"
        return f"{version}, commit {self.commit[:10]}{' with changes' if self.commit_changed else ''}"


def changes_of(before: StartRecord | None, start: StartRecord) -> list[tuple[str, str, str]]:
    """Return (what, old, new) of everything that differs from the start before: ranks, machine, code, configuration."""
    if before is None:
        return []
    names = {**before.versions, **start.versions}
    compared = [
        ("ranks", str(before.world_size), str(start.world_size)),
        ("machine", before.host, start.host),
        ("code", _code(before), _code(start)),
        *((name, before.versions.get(name, "none"), start.versions.get(name, "none")) for name in names),
    ]
    changed = [(what, old, new) for what, old, new in compared if old != new]
    return changed + [(key, old, new) for key, (old, new) in start.changed.items()]


def _code(start: StartRecord) -> str:
    """Return the commit, or with uncommitted changes also the digest of the code, which tells two of them apart."""
    if start.commit is None:
        return start.code[:10]
    return start.commit[:10] + (f" with changes ({start.code[:10]})" if start.commit_changed else "")


def read_starts(run_dir: Path) -> list[StartRecord]:
    """Return the starts of a run, oldest first, without damaged lines; empty without the file.

    The oldest starts are missing if the file is larger than 64 MiB: only its last 64 MiB are read.
    """
    path = run_dir / STARTS_FILE
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST_BYTES))
        content = file.read(_MOST_BYTES)
    records = []
    for line in content.splitlines():
        try:
            records.append(StartRecord.model_validate_json(line))
        except ValidationError:
            continue
    return records


def add_start(run_dir: Path, record: StartRecord) -> None:
    """Append a start. The file is replaced atomically.

    The new file has the starts that ``read_starts`` returns, and ``record``: damaged lines and the oldest starts of a
    file above 64 MiB are dropped.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [json.dumps(each.model_dump(mode="json"), ensure_ascii=False) for each in [*read_starts(run_dir), record]]
    write_whole(run_dir / STARTS_FILE, "".join(f"{line}\n" for line in lines).encode(), parents=True)
