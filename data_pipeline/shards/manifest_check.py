"""Reject files and folders that cannot be a manifest, with a message that names the command to create one.

``columns`` and ``manifest`` check files that may be manifests for damage.
"""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import ManifestError
from data_pipeline.io.missing import no_such_file
from data_pipeline.io.retry import retry_io
from data_pipeline.io.untrusted import open_regular

_PROBE_BYTES = 512
_HEADER_AT, _USTAR_AT = 8, 257
_MAGIC = {
    b"\x1f\x8b": "data compressed with gzip",
    b"BZh": "data compressed with bzip2",
    b"\xfd7zXZ": "data compressed with xz",
    b"\x28\xb5\x2f\xfd": "data compressed with zstd",
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a ZIP archive",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"RIFF": "an image, a sound or a video",
    b"\x80": "a pickle",
}
_INGEST = "store its samples as shards, which also writes a manifest, with: mmscale data ingest"


def reject_non_manifest(file: Path, display_name: str, key: str = "", *, takes_tar: bool = False) -> None:
    """Raise if ``file`` cannot be a manifest, judged by its first bytes. A damaged manifest does not raise here.

    Args:
        file: The file or folder to check, possibly a local copy.
        display_name: Its name in messages.
        key: The configuration key that names it, for messages: ``data.datasets.0.manifest``.
        takes_tar: Whether a tar is accepted too.

    Raises:
        ManifestError: it is a folder, a tar, or a file of another known kind, or it cannot be read. The message names
            the kind and the remedy.
    """
    label = f"{key}={display_name}" if key else display_name
    expected = "expected a manifest or a tar" if takes_tar else "expected a manifest"

    def beginning() -> bytes:
        with open_regular(file) as opened:
            return opened.read(_PROBE_BYTES)

    try:
        if retry_io(file.is_dir):
            raise ManifestError(f"{label}: this is a folder, {expected}; {_remedy_of_folder(file, display_name)}")
        start = retry_io(beginning)
    except FileNotFoundError as error:
        raise ManifestError(f"{label}: {no_such_file(file)}; make a manifest with: mmscale data index") from error
    except OSError as error:
        raise ManifestError(f"{label}: cannot be read: {error.strerror}") from error
    # A manifest is a column file: eight bytes of length, then a JSON header.
    if start[_HEADER_AT : _HEADER_AT + 1] == b"{" and not start.startswith((b"{", b"[")):
        return
    if start[_USTAR_AT : _USTAR_AT + 5] == b"ustar":
        if takes_tar:
            return
        remedy = f"index it with: mmscale data index {display_name} --manifest FILE.manifest, and give FILE.manifest"
        raise ManifestError(f"{label}: this is a tar, expected a manifest; {remedy}")
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None) or _kind_of_text(start)
    if kind is not None:
        raise ManifestError(f"{label}: this is {kind}, {expected}; {_remedy_of(kind)}")


def _kind_of_text(start: bytes) -> str | None:
    text = start.decode(errors="ignore")
    if not text or not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    if text.lstrip().startswith(("{", "[")):
        return "JSON"
    return "YAML or another text"


def _remedy_of(kind: str) -> str:
    if kind.startswith("YAML"):
        return "give the manifest that data.datasets names, or make one with: mmscale data ingest or index"
    return f"{_INGEST} SOURCE --output FOLDER"


def _remedy_of_folder(folder: Path, display_name: str) -> str:
    manifests = sorted(folder.glob("*.manifest"))
    if manifests:
        return f"it contains {', '.join(path.name for path in manifests[:4])}: give {manifests[0]}"
    if any(folder.glob("*.tar")):
        command = f"mmscale data index {display_name}/*.tar --manifest {display_name}/all.manifest"
        return f"make one for its tars with: {command}"
    return f"{_INGEST} {display_name} --output FOLDER"
