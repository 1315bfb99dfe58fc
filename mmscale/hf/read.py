"""Read the configuration and tensors of a Hugging Face folder.

    FOLDER/config.json
    FOLDER/model.safetensors, or model.safetensors.index.json and the files that it names

The folder is untrusted input. Only safetensors files are read; their library checks every range against the size of
the file. The index must list exactly the tensors of the files. A tensor is a view of a memory-mapped file, so reading a
model needs no memory beyond the tensors that the caller copies.
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
COMPANION_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
"""Files that belong to the weights: tokenizer, image processor and sampling options."""
PREPROCESSOR = "preprocessor_config"
"""Key that ``read_config`` adds for the values of the image processor and of the feature extractor of sounds, from
whichever file holds them. Their keys differ."""
VIDEO_PROCESSOR = "video_processor"
"""Key of the values of the video processor in what ``read_processor`` returns."""
_PROCESSOR, _VIDEO = "processor_config.json", "video_preprocessor_config.json"
_NESTED = ("feature_extractor", "image_processor")


class HfFolder:
    """An open Hugging Face folder.

    Args:
        path: The folder, not one of its files.
        current_name: Maps a tensor name in the files to the name that ``tensor`` expects.

    Raises:
        CheckpointError: the path is not such a folder, a file is damaged, or index and files disagree.
    """

    def __init__(self, path: Path, current_name: Callable[[str], str] = str) -> None:
        self.path = path
        self._files: dict[str, tuple[Any, str]] = {}
        for file, listed in _listing(path).items():
            opened = _open(path / file)
            held = set(opened.keys())
            if listed is not None and listed != held:
                differing = sorted(listed ^ held)
                raise CheckpointError(f"{path / file}: {differing[0]} is not both in {INDEX} and in the file")
            for name in sorted(held):
                if current_name(name) in self._files:
                    raise CheckpointError(f"{path}: {name} is in two files")
                self._files[current_name(name)] = (opened, name)

    @property
    def names(self) -> set[str]:
        """Names of all tensors, as ``current_name`` returns them."""
        return set(self._files)

    @property
    def companion_files(self) -> list[Path]:
        """Files of ``COMPANION_FILES`` that exist in the folder."""
        return companion_files(self.path)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file, with the file's shape and dtype.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            file, stored = self._files[name]
            return file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder, with the values of its processors under ``preprocessor_config`` if any.

    Version 5 of transformers nests image processor and feature extractor in ``processor_config.json``. These nested
    values take precedence over ``preprocessor_config.json``, as in transformers.

    Raises:
        CheckpointError: ``config.json`` is missing or has no ``model_type``, or a file is damaged.
    """
    values = _read_json(path / CONFIG)
    if not isinstance(values.get("model_type"), str):
        raise CheckpointError(f"{path / CONFIG}: no model_type: not a model of Hugging Face's transformers")
    processor = read_processor(path)
    nested = {name: processor[name] for name in _NESTED if processor.get(name) is not None}
    for name, block in nested.items():
        if not isinstance(block, dict):
            raise CheckpointError(f"{path / _PROCESSOR}: {name} is no JSON object")
    if nested:
        values[PREPROCESSOR] = {key: value for block in nested.values() for key, value in block.items()}
    elif (path / f"{PREPROCESSOR}.json").is_file():
        values[PREPROCESSOR] = _read_json(path / f"{PREPROCESSOR}.json")
    return values


def read_processor(path: Path) -> dict[str, Any]:
    """Return ``processor_config.json`` of a folder, with the video processor under ``video_processor`` if any.

    A folder without a nested one may have it in ``video_preprocessor_config.json``, as in transformers.

    Raises:
        CheckpointError: a file is damaged.
    """
    values = _read_json(path / _PROCESSOR) if (path / _PROCESSOR).is_file() else {}
    if values.get(VIDEO_PROCESSOR) is None and (path / _VIDEO).is_file():
        values[VIDEO_PROCESSOR] = _read_json(path / _VIDEO)
    return values


def require_no_folder(path: Path, remedy: str) -> None:
    """Raise if the user gave a Hugging Face folder where another kind of path is expected.

    Args:
        path: Path that the user gave; it may not exist.
        remedy: End of the message: what the user should do instead.

    Raises:
        CheckpointError: ``path`` holds a ``config.json`` with a ``model_type``.
    """
    try:
        family = read_config(path)["model_type"]
    except CheckpointError:
        return
    raise CheckpointError(f"{path} is a Hugging Face folder (model_type={family!r} in its {CONFIG}); {remedy}")


def companion_files(path: Path) -> list[Path]:
    """Return the files of ``COMPANION_FILES`` that exist in a folder."""
    return [path / name for name in COMPANION_FILES if (path / name).is_file()]


def _listing(path: Path) -> dict[str, set[str] | None]:
    """Return file name -> tensor names by the index; None in place of the names if there is no index."""
    if (path / INDEX).is_file():
        table = _read_json(path / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{path / INDEX}: no weight_map")
        found: dict[str, set[str] | None] = {}
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{path / INDEX}: {name} is listed in {file!r}, which is not a plain file name")
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
        open_regular(file).close()  # Reject a FIFO first: safe_open would block on it.
        return safe_open(file, "pt")
    except (SafetensorError, UntrustedError, OSError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file, "give a folder of Hugging Face", _MOST_JSON_BYTES)


def read_json_object(file: Path, remedy: str, most_bytes: int) -> dict[str, Any]:
    """Return the JSON object in an untrusted file.

    Args:
        file: The file.
        remedy: End of the message if the file cannot be read: what the user should do instead.
        most_bytes: Largest size of the file.

    Raises:
        CheckpointError: the file cannot be read, is too large, or holds no JSON object.
    """
    try:
        values = read_json(file, most_bytes=most_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {remedy}") from error
    except UntrustedError as error:
        raise CheckpointError(f"{file} is {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is no JSON object")
    return values
