"""Copy the tokenizer and processor files of a Hugging Face folder into a run folder, with their checksums.

RUN/hf_files/config.json tokenizer.json preprocessor_config.json ...
RUN/hf_files/files.json     {"source", "sha256": {name: checksum}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.io.untrusted import UntrustedError, read_bytes, read_json
from mmscale.errors import CheckpointError
from mmscale.hf.read import CONFIG, companion_files
from mmscale.io.files import new_folder, write_file

HF_FILES = "hf_files"
"""Folder of the files in a run folder."""
_LIST = "files.json"
_MOST_BYTES = 256 << 20


def keep_files(source: Path, run: Path, files: Iterable[Path]) -> Path:
    """Write ``run/hf_files`` with copies of ``config.json`` and of ``files``; the folder appears whole or not at all.

    Raises:
        CheckpointError: a file cannot be read or written, or the folder exists.
    """
    folder = run / HF_FILES
    sums = {}
    try:
        with new_folder(folder) as partial:
            for file in (source / CONFIG, *files):
                content = read_bytes(file, most_bytes=_MOST_BYTES)
                sums[file.name] = hashlib.sha256(content).hexdigest()
                write_file(partial / file.name, [memoryview(content)])
            text = json.dumps({"source": str(source), "sha256": sums}, indent=2) + "\n"
            write_file(partial / _LIST, [memoryview(text.encode())])
    except (UntrustedError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    return folder


def kept_folder(path: Path) -> Path | None:
    """Return the ``hf_files`` folder that contains a tokenizer; None if the tokenizer is elsewhere.

    Raises:
        CheckpointError: a file of the folder is damaged or missing, by the checksums of the import.
    """
    folder = path.parent
    if folder.name != HF_FILES or not (folder / _LIST).is_file():
        return None
    try:
        sums = read_json(folder / _LIST)["sha256"]
        for name, checksum in sums.items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder / _LIST}: {name!r} is not a plain file name")
            found = hashlib.sha256(read_bytes(folder / name, most_bytes=_MOST_BYTES)).hexdigest()
            if found != checksum:
                raise CheckpointError(
                    f"{folder / name} has changed since the import, by its checksum in {_LIST}; import the model again"
                )
    except (UntrustedError, OSError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error}); import the model again") from error
    unlisted = [file.name for file in companion_files(folder) if file.name not in sums]
    if unlisted:
        raise CheckpointError(f"{folder} holds files that the import did not write: {', '.join(unlisted)}; remove them")
    return folder
