"""Says what a file or folder is that was given as a manifest and is none, and which command makes a manifest of it.

Not for: damage inside a manifest (``columns``).
"""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import ManifestError
from data_pipeline.io.untrusted import open_regular

_LOOKED_AT_BYTES = 512
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
_INGEST = "store samples as shards, which gives a manifest, with: mmscale data ingest"


def refuse_no_manifest(file: Path, shown: str, key: str = "", *, takes_tar: bool = False) -> None:
    """Refuses what cannot be a manifest by its first bytes; a file that might be one, damaged or not, passes.

    Args:
        file: What was given, or a copy of it.
        shown: What messages call it.
        key: What named it, ``data.datasets.0.manifest``.
        takes_tar: Whether a tar is as good as a manifest.

    Raises:
        ManifestError: it is a folder, a tar, or a file of another known kind. Names the kind and the remedy.
    """
    place = f"{key}={shown}" if key else shown
    expected = "expected a manifest or a tar" if takes_tar else "expected a manifest"
    if file.is_dir():
        raise ManifestError(f"{place}: this is a folder, {expected}; {_remedy_of_folder(file, shown)}")
    try:
        with open_regular(file) as opened:
            start = opened.read(_LOOKED_AT_BYTES)
    except OSError as error:
        raise ManifestError(f"{place}: cannot be read: {error.strerror}") from error
    if start[_HEADER_AT : _HEADER_AT + 1] == b"{" and not start.startswith((b"{", b"[")):
        return
    if start[_USTAR_AT : _USTAR_AT + 5] == b"ustar":
        if takes_tar:
            return
        remedy = f"index it with: mmscale data index {shown} --manifest FILE.manifest, and give that FILE.manifest"
        raise ManifestError(f"{place}: this is a tar, expected a manifest; {remedy}")
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None) or _kind_of_text(start)
    if kind is not None:
        raise ManifestError(f"{place}: this is {kind}, {expected}; {_remedy_of(kind)}")


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


def _remedy_of_folder(folder: Path, shown: str) -> str:
    manifests = sorted(folder.glob("*.manifest"))
    if manifests:
        return f"it holds {', '.join(path.name for path in manifests[:4])}: give {manifests[0]}"
    if any(folder.glob("*.tar")):
        return f"make one of its tars with: mmscale data index {shown}/*.tar --manifest {shown}/all.manifest"
    return f"{_INGEST} {shown} --output FOLDER"
