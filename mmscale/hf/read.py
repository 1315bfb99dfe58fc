"""A folder of Hugging Face: its configuration, and its tensors, which stay on the disk.

    FOLDER/config.json
    FOLDER/model.safetensors, or model.safetensors.index.json and the files that it names

Nothing is trusted: files are safetensors only, whose library checks every range against the file's size, and the index
must name what is there. A tensor is a view of a mapped file, so reading a model takes no memory beyond what the reader
keeps of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.io.untrusted import UntrustedError, open_regular, read_json
from mmscale.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_MOST_JSON_BYTES = 256 << 20
BESIDE = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
"""Files that go with the weights: the tokenizer's, the image processor's, and how to sample."""
PREPROCESSOR = "preprocessor_config"
"""Key of a folder's configuration under which its image processor stands, whichever file describes it."""
_PROCESSOR, _NESTED = "processor_config.json", "image_processor"


class HfFolder:
    """An open folder.

    Args:
        path: The folder, not one of its files.
        spelled: From the names in the files to those by which they are asked for.

    Raises:
        CheckpointError: it is none, or its files are damaged or do not belong together.
    """

    def __init__(self, path: Path, spelled: Callable[[str], str] = str) -> None:
        self.path = path
        self._files: dict[str, tuple[Any, str]] = {}
        for file, listed in _listing(path).items():
            opened = _open(path / file)
            there = set(opened.keys())
            if listed is not None and listed != there:
                odd = sorted(listed ^ there)
                raise CheckpointError(f"{path / file}: {odd[0]} is not both in {INDEX} and in the file")
            for name in sorted(there):
                if spelled(name) in self._files:
                    raise CheckpointError(f"{path}: {name} is in two files")
                self._files[spelled(name)] = (opened, name)

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    @property
    def beside(self) -> list[Path]:
        """The tokenizer's files and the like, those that there are."""
        return beside(self.path)

    def tensor(self, name: str) -> Tensor:
        """A view of the file, in its shape and number format.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            file, stored = self._files[name]
            return file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder, and under ``preprocessor_config`` its image processor, if there is one.

    Version 5 of transformers nests the image processor in ``processor_config.json``. As there, it then counts before
    ``preprocessor_config.json``.

    Raises:
        CheckpointError: there is none, or it is none.
    """
    values = _read_json(path / CONFIG)
    if not isinstance(values.get("model_type"), str):
        raise CheckpointError(f"{path / CONFIG}: no model_type: not a model of Hugging Face's transformers")
    nested = _read_json(path / _PROCESSOR).get(_NESTED) if (path / _PROCESSOR).is_file() else None
    if nested is not None and not isinstance(nested, dict):
        raise CheckpointError(f"{path / _PROCESSOR}: {_NESTED} is no JSON object")
    if nested is None and (path / f"{PREPROCESSOR}.json").is_file():
        nested = _read_json(path / f"{PREPROCESSOR}.json")
    if nested is not None:
        values[PREPROCESSOR] = nested
    return values


def require_no_folder(path: Path, remedy: str) -> None:
    """Refuse a Hugging Face folder where something else is expected.

    Args:
        path: What was given; it may not exist.
        remedy: What to do instead.

    Raises:
        CheckpointError: ``path`` holds a ``config.json`` of transformers.
    """
    try:
        family = read_config(path)["model_type"]
    except CheckpointError:
        return
    raise CheckpointError(f"{path} is a Hugging Face folder (model_type={family!r} in its {CONFIG}); {remedy}")


def beside(path: Path) -> list[Path]:
    """The files of ``BESIDE`` that a folder has."""
    return [path / name for name in BESIDE if (path / name).is_file()]


def _listing(path: Path) -> dict[str, set[str] | None]:
    """File -> the tensors that the index says are in it; None without an index."""
    if (path / INDEX).is_file():
        table = _read_json(path / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{path / INDEX}: no weight_map")
        found: dict[str, set[str] | None] = {}
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{path / INDEX}: {name} lies in {file!r}, which is no file of this folder")
            names = found.setdefault(file, set())
            assert names is not None
            names.add(name)
        return found
    if (path / _WHOLE).is_file():
        return {_WHOLE: None}
    pickled = " It has pickled weights, which are not read: save them again as safetensors." * any(path.glob("*.bin"))
    raise CheckpointError(f"{path} has neither {_WHOLE} nor {INDEX}.{pickled}")


def _open(file: Path) -> Any:
    try:
        open_regular(file).close()  # The library blocks on a FIFO.
        return safe_open(file, "pt")
    except (SafetensorError, UntrustedError, OSError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file, most_bytes=_MOST_JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); give a folder of Hugging Face") from error
    except UntrustedError as error:
        raise CheckpointError(f"{file} is {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is no JSON object")
    return values
