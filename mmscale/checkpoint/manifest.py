"""What a checkpoint folder says about itself.

    checkpoints/step-00000123/
        rank-00000.safetensors   this rank's ranges: NAME|master, |frozen, the optimizer's (|exp_avg, ...), |ema;
                                 of rank 0 also what is kept whole: |buffer, Adafactor's |exp_avg_sq_row, ...
        rank-00000.json          of each of them range, format, place and CRC-32; the loader's lanes, random state
        manifest.json            written last: everything that is true of the whole, and the CRC-32 of every file

A folder with this name is whole. While it is being written it is called ``step-00000123.partial``; a checkpoint that
was refused is renamed to ``step-00000123.damaged``. The manifest begins with its own CRC-32, so every byte of a
checkpoint is covered by one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import StateError
from data_pipeline.io.strict import StrictConfig, StrictRecord, first_fault
from data_pipeline.io.untrusted import UntrustedError, read_bytes
from data_pipeline.order.state import LoaderState
from mmscale.errors import CheckpointError
from mmscale.hf.read import require_no_folder
from mmscale.models.config import AnyModelConfig, read_model_config

FORMAT = 2
MANIFEST = "manifest.json"
PARTIAL = ".partial"
DAMAGED = ".damaged"
_FOLDER = re.compile(r"step-([0-9]{8,})")
_SET_ASIDE = re.compile(rf"step-[0-9]{{8,}}{re.escape(DAMAGED)}(-[0-9]+)?")
_SEAL = re.compile(rb'\{"crc32":"([0-9a-f]{8})",\n')
_MOST_JSON_BYTES = 1 << 30
"""A larger file of JSON is not read; a million parameters take a tenth of it."""


def folder_name(step: int) -> str:
    """Name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(path.name.partition("-")[2])


def rank_files(rank: int) -> tuple[str, str]:
    """Names of the tensors and of the notes of one rank."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, apart from weights and optimizer.

    Attributes:
        step: Optimizer steps of the run so far, over all stages.
        stage_index: Index of the stage in the configuration.
        stage_step: Steps taken within that stage.
        tokens: Valid tokens seen.
        samples: Samples seen.
        loader: State of the data after ``step``: of this rank's lanes when saving, of all lanes after loading.
        extra: Whatever else the run wants back; JSON values, equal on all ranks.
    """

    step: int = 0
    stage_index: int = 0
    stage_step: int = 0
    tokens: int = 0
    samples: int = 0
    loader: LoaderState | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class SavedState(StrictConfig):
    """The part of TrainState that is the same on every rank."""

    step: int = Field(ge=0)
    stage_index: int = Field(ge=0)
    stage_step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    samples: int = Field(ge=0)
    extra: dict[str, Any]


Side = Annotated[int, Field(ge=0, lt=2**63)]
"""One number of a shape."""


class FileEntry(StrictRecord):
    """A file beside the manifest."""

    bytes: int = Field(ge=0)
    crc32: int = Field(ge=0)


class ParameterEntry(StrictRecord):
    """A parameter of the model."""

    shape: tuple[Side, ...]
    trained: bool


class Manifest(StrictConfig):
    """Everything that is true of the whole checkpoint."""

    format: int
    state: SavedState
    stage: str
    world_size: int = Field(ge=1)
    zero_stage: int
    precision: str
    optimizer: str = "adamw"
    """Kind of the optimizer, and of how many bits; it decides what is kept beside each master."""
    ema: bool = False
    """Whether the average of the trained weights is kept too, as ``NAME|ema``."""
    loss_scaler: dict[str, float] | None = None
    """fp16: the scale of the loss and what its next change depends on."""
    optimizer_steps: int = Field(ge=0)
    parameters: dict[str, ParameterEntry]
    buffers: dict[str, tuple[Side, ...]]
    tied: dict[str, str]
    """Second name of a parameter -> the name under which it is stored."""
    model_config_values: dict[str, Any] | None
    """The model's configuration, if it has one."""
    files: dict[str, FileEntry]
    versions: dict[str, str]

    def stored_name(self, name: str) -> str | None:
        """The name under which a parameter is stored: its own, or that of the one it is tied to; None if absent."""
        owner = self.tied.get(name, name)
        return owner if owner in self.parameters else None


class TensorEntry(StrictRecord):
    """A tensor in the file of one rank."""

    start: int = Field(ge=0)
    """First value, in the flattened parameter."""
    stop: int = Field(ge=0)
    """One past the last."""
    whole: bool = False
    """No range of a parameter, but a tensor that rank 0 keeps for all."""
    dtype: str
    """As safetensors calls it."""
    offset: int = Field(ge=0)
    """First byte, in the file."""
    crc32: int = Field(ge=0)


class RankNotes(StrictConfig):
    """What one rank says about its file of tensors."""

    rank: int = Field(ge=0)
    tensors: dict[str, TensorEntry]
    """By ``NAME|kind``."""
    loader: str | None
    random_state: dict[str, str]
    """State of torch's generators, hexadecimal, by device type."""


def seal(manifest: Manifest) -> str:
    """The text of a manifest, its own checksum first."""
    rest = manifest.model_dump_json(indent=1).removeprefix("{\n")
    return f'{{"crc32":"{crc32(rest.encode()):08x}",\n{rest}'


def _unseal(text: bytes) -> bytes | None:
    """The JSON under the seal; None if the checksum is not that of the text."""
    seal = _SEAL.match(text)
    if seal is None or int(seal[1], 16) != crc32(text[seal.end() :]):
        return None
    return b"{" + text[seal.end() :]


def read_manifest(path: Path) -> Manifest:
    """Reads and checks the manifest of the checkpoint folder ``path``.

    Raises:
        CheckpointError: there is none, it is damaged, another format wrote it, or the folder has the name of another
            step.
    """
    manifest = _read_manifest(path)
    if (problem := _misnamed(path, manifest)) is not None:
        raise CheckpointError(problem)
    return manifest


def misnamed(path: Path) -> str | None:
    """Why ``path`` does not count as the checkpoint that its name says, although its manifest is good; else None."""
    try:
        return _misnamed(path, _read_manifest(path))
    except CheckpointError:
        return None


def _misnamed(path: Path, manifest: Manifest) -> str | None:
    step = manifest.state.step
    if _FOLDER.fullmatch(path.name) is None or step_of(path) == step:
        return None  # A folder with a name of the user's own may hold any step.
    return (
        f"{path} holds the checkpoint of step {step}: the folder was copied or renamed, and it does not count as a "
        f"checkpoint of this run; remove it, or name it {folder_name(step)} if there is no such folder"
    )


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        text = _read_json(file)
    except OSError as error:
        raise CheckpointError(f"{path} is no checkpoint: {MANIFEST} cannot be read ({error.strerror})") from error
    found = re.search(rb'"format"\s*:\s*(\d{1,9})', text)
    if found and int(found[1]) != FORMAT:
        raise CheckpointError(f"{path} has format {int(found[1])}, this version reads {FORMAT}")
    inside = _unseal(text)
    if inside is None:
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its text")
    try:
        manifest = Manifest.model_validate_json(inside)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {first_fault(error)}") from error
    count = manifest.world_size
    if len(manifest.files) != 2 * count or any(set(rank_files(rank)) - manifest.files.keys() for rank in range(count)):
        raise CheckpointError(f"{file} is damaged: its {len(manifest.files)} files are not those of {count} ranks")
    return manifest


def model_config_of(manifest: Manifest, path: Path) -> AnyModelConfig:
    """What to build for the weights of the checkpoint at ``path``.

    Raises:
        CheckpointError: the checkpoint does not say, or says what is not legal.
    """
    if manifest.model_config_values is None:
        raise CheckpointError(f"{path} does not know its model's configuration; save it from a run of mmscale")
    try:
        return read_model_config(manifest.model_config_values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its model's configuration is not legal: {first_fault(error)}") from error


def manifest_checksum(path: Path) -> str:
    """The manifest's own checksum, which stands for every byte of the checkpoint: it covers those of all files.

    Raises:
        CheckpointError: there is no manifest, or none with a checksum.
    """
    try:
        seal = _SEAL.match(_read_json(path / MANIFEST))
    except OSError as error:
        raise CheckpointError(f"{path} is no checkpoint: {MANIFEST} cannot be read ({error.strerror})") from error
    if seal is None:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it does not begin with its checksum")
    return seal[1].decode()


def read_notes(path: Path, rank: int) -> RankNotes:
    """Reads the notes of one rank.

    Raises:
        CheckpointError: missing or damaged.
    """
    file = path / rank_files(rank)[1]
    try:
        return RankNotes.model_validate_json(_read_json(file))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {first_fault(error)}") from error


def _read_json(file: Path) -> bytes:
    try:
        return read_bytes(file, most_bytes=_MOST_JSON_BYTES)
    except UntrustedError as error:
        raise CheckpointError(f"{file}: {error}") from error


def missing_or_cut(path: Path, manifest: Manifest) -> str | None:
    """The first file that is missing or has another size than the manifest says; None if all are there."""
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} has {size} bytes, {entry.bytes} were written"
    return None


def is_whole(path: Path) -> bool:
    """Whether the manifest reads and every file has its size."""
    try:
        return missing_or_cut(path, read_manifest(path)) is None
    except CheckpointError:
        return False


def list_checkpoints(directory: Path) -> list[Path]:
    """Folders that are named like checkpoints, oldest step first.

    Half-written folders and those that were set aside have other names.
    """
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if _FOLDER.fullmatch(p.name) and p.name == folder_name(step_of(p))]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def list_set_aside(directory: Path) -> list[Path]:
    """Folders of refused checkpoints that were set aside, by name."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _SET_ASIDE.fullmatch(path.name) and path.is_dir())


def find_latest(directory: Path) -> Path | None:
    """The newest whole checkpoint below ``directory``; a damaged one is passed over (see ``load.choose``)."""
    return next((path for path in reversed(list_checkpoints(directory)) if is_whole(path)), None)


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoints that ``path`` means, a run folder, its ``checkpoints`` or one of them; whole or not.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        damaged = list_set_aside(path / "checkpoints") or list_set_aside(path)
        require_no_folder(path, f"make a checkpoint of it with: mmscale checkpoint import {path} RUN --from hf")
        raise CheckpointError(
            f"{path} has no checkpoints; give a run folder, its checkpoints folder, or one checkpoint"
            + (f" (damaged ones were set aside: {', '.join(folder.name for folder in damaged)})" if damaged else "")
        )
    return found


def newest_of(path: Path) -> Path:
    """The checkpoint that ``path`` names, or the newest whole one below it.

    Raises:
        CheckpointError: none is whole.
    """
    folders = checkpoints_of(path)
    if folders == [path]:
        return path
    newest = find_latest(folders[0].parent)
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint is whole; `mmscale checkpoint list {path}` says why")
    return newest


def read_state(path: Path) -> TrainState:
    """Where the run stood, with the loader's state of all lanes merged. Reads no tensors.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks a rank's position although the run has seen samples.
    """
    manifest = read_manifest(path)
    saved, states, loader = manifest.state, list[LoaderState](), None
    texts = [read_notes(path, rank).loader for rank in range(manifest.world_size)]
    file = path
    try:
        if saved.samples or texts != [None] * len(texts):  # An imported checkpoint has seen no data.
            for rank, text in enumerate(texts):
                file = path / rank_files(rank)[1]
                if text is None:
                    raise StateError("null, expected the position of this rank")
                states.append(LoaderState.from_json(text))
            file = path
            loader = LoaderState.merge(states)
    except StateError as error:
        raise CheckpointError(f"{file}: loader: the data position is damaged: {error}") from error
    return TrainState(
        saved.step, saved.stage_index, saved.stage_step, saved.tokens, saved.samples, loader, dict(saved.extra)
    )
