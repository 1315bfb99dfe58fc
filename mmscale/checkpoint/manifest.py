"""The manifest and the rank metadata of a checkpoint folder: their format, and functions that read and list them.

    checkpoints/step-00000123/
        rank-00000.safetensors   the rank's ranges of: NAME|master, |frozen, the optimizer's (|exp_avg, ...), |ema
                                 rank 0 also stores unsharded tensors: |buffer, Adafactor's |exp_avg_sq_row, ...
        rank-00000.json          range, dtype, offset and CRC-32 of each tensor; the rank's loader and random state
        manifest.json            written last: everything about the whole checkpoint, and the CRC-32 of every file

Frozen parameters that a run with adapters loaded unchanged are not stored again: the manifest names the checkpoint that
holds them (``BaseEntry``). ``reshard.CheckpointReader`` reads them from there.

The folder is called ``step-00000123.partial`` until its last file is synced, so ``step-00000123`` is complete. A
checkpoint that ``load.choose`` found damaged is renamed to ``step-00000123.damaged``. The manifest begins with its own
CRC-32, so a checksum covers every byte of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import StateError
from data_pipeline.io.retry import retry_io
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
_MAX_JSON_BYTES = 1 << 30
"""Largest JSON file that is read. A million parameters need a tenth of it."""


def folder_name(step: int) -> str:
    """Name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(path.name.partition("-")[2])


BEST = "best"
"""Key of ``TrainState.extra``: what a run knows about its best checkpoint; ``step`` is its step."""


def best_step(extra: Mapping[str, Any]) -> int | None:
    """Return the step of the best checkpoint, as of a checkpoint with this ``extra``; None if the run keeps none."""
    best = extra.get(BEST)
    step = best.get("step") if isinstance(best, dict) else None
    return step if type(step) is int and step >= 0 else None


def rank_files(rank: int) -> tuple[str, str]:
    """Return the names of one rank's tensor file and metadata file."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class TrainState:
    """The progress of a run, without weights and optimizer state.

    Attributes:
        step: Optimizer steps of the run so far, over all stages.
        stage_index: Index of the stage in the configuration.
        stage_step: Optimizer steps within that stage.
        tokens: Valid tokens that the run has trained on.
        samples: Samples that the run has trained on.
        loader: Loader state after ``step``. Pass this rank's lanes when saving; ``read_state`` returns all lanes.
        extra: Further values of the run as JSON values, equal on all ranks.
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


Dimension = Annotated[int, Field(ge=0, lt=2**63)]
"""One dimension of a shape."""


class FileEntry(StrictRecord):
    """Size and checksum of one file in the checkpoint folder."""

    bytes: int = Field(ge=0)
    crc32: int = Field(ge=0)


class ParameterEntry(StrictRecord):
    """Shape of one parameter of the model, and whether the stage trains it."""

    shape: tuple[Dimension, ...]
    trained: bool


class BaseEntry(StrictRecord):
    """Another checkpoint, which holds the values of frozen parameters of this one."""

    path: str
    """Absolute path of the checkpoint folder."""
    checksum: str
    """The checksum of its manifest, which identifies all of its values."""
    ema: bool = False
    """Whether the values are the averages of the weights there."""
    parameters: tuple[str, ...]
    """Names of the parameters."""


class Manifest(StrictConfig):
    """Everything about a checkpoint that does not belong to one rank."""

    format: int
    state: SavedState
    stage: str
    world_size: int = Field(ge=1)
    zero_stage: int
    precision: str
    optimizer: str = "adamw"
    """Kind of the optimizer and bits of its state. It determines which tensors are stored with each master."""
    ema: bool = False
    """Whether the exponential moving average of the trained weights is stored, as ``NAME|ema``."""
    loss_scaler: dict[str, float] | None = None
    """State of the fp16 loss scaler: the scale and the counters that change it."""
    optimizer_steps: int = Field(ge=0)
    parameters: dict[str, ParameterEntry]
    buffers: dict[str, tuple[Dimension, ...]]
    tied: dict[str, str]
    """Further name of a tied parameter -> the name under which it is stored."""
    model_config_values: dict[str, Any] | None
    """The model's configuration as JSON values; None if the model has none."""
    bases: tuple[BaseEntry, ...] = ()
    """Checkpoints that hold frozen parameters of this one; each parameter is in at most one of them."""
    files: dict[str, FileEntry]
    versions: dict[str, str]

    def stored_name(self, name: str) -> str | None:
        """Return the name under which a parameter is stored: its own or its tied owner's; None if it is not stored."""
        owner = self.tied.get(name, name)
        return owner if owner in self.parameters else None


class TensorEntry(StrictRecord):
    """One tensor in the safetensors file of one rank."""

    start: int = Field(ge=0)
    """Index of its first value in the flattened parameter."""
    stop: int = Field(ge=0)
    """Index after its last value."""
    whole: bool = False
    """True for an unsharded tensor, which only rank 0 stores; false for a range of a parameter."""
    dtype: str
    """Number format, as safetensors spells it."""
    offset: int = Field(ge=0)
    """Offset of its first byte in the file."""
    crc32: int = Field(ge=0)


class RankMetadata(StrictConfig):
    """The metadata of one rank: an index of its safetensors file, its loader state and its random state."""

    rank: int = Field(ge=0)
    tensors: dict[str, TensorEntry]
    """Entries by ``NAME|kind``, in the order of the file."""
    loader: str | None
    """State of the rank's lanes as JSON text; None in an imported checkpoint and in a run without a loader."""
    random_state: dict[str, str]
    """Hexadecimal state of torch's generators, by device type."""


def seal(manifest: Manifest) -> str:
    """Return the JSON text of a manifest, which begins with its own checksum."""
    body = manifest.model_dump_json(indent=1).removeprefix("{\n")
    return f'{{"crc32":"{crc32(body.encode()):08x}",\n{body}'


def _unseal(text: bytes) -> bytes | None:
    """Return the JSON text without its checksum; None if the checksum is missing or does not match."""
    seal = _SEAL.match(text)
    if seal is None or int(seal[1], 16) != crc32(text[seal.end() :]):
        return None
    return b"{" + text[seal.end() :]


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the checkpoint folder ``path``.

    Raises:
        CheckpointError: the manifest is missing, damaged or of another format, or the folder has the name of another
            step.
    """
    manifest = _read_manifest(path)
    if (problem := _wrong_name(path, manifest)) is not None:
        raise CheckpointError(problem)
    return manifest


def wrong_name(path: Path) -> str | None:
    """Return a sentence if the folder's name has another step than its manifest.

    Returns None if the steps are equal, if the name has no step, or if the manifest cannot be read.
    """
    try:
        return _wrong_name(path, _read_manifest(path))
    except CheckpointError:
        return None


def _wrong_name(path: Path, manifest: Manifest) -> str | None:
    step = manifest.state.step
    if _FOLDER.fullmatch(path.name) is None or step_of(path) == step:
        return None  # A folder that the user named freely may hold any step.
    return (
        f"{path} holds the checkpoint of step {step}: the folder was copied or renamed, so it is not used as a "
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
    body = _unseal(text)
    if body is None:
        raise CheckpointError(f"{file} is damaged: its checksum does not match its text")
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {first_fault(error)}") from error
    count = manifest.world_size
    # ``set - dict.keys()`` would walk all files for each rank: 3 s for 8,000 ranks.
    expected = (name for rank in range(count) for name in rank_files(rank))
    if len(manifest.files) != 2 * count or any(name not in manifest.files for name in expected):
        raise CheckpointError(f"{file} is damaged: its {len(manifest.files)} files are not those of {count} ranks")
    listed = [name for base in manifest.bases for name in base.parameters]
    if len(set(listed)) != len(listed) or any(
        name not in manifest.parameters or manifest.parameters[name].trained for name in listed
    ):
        raise CheckpointError(f"{file} is damaged: bases do not list different frozen parameters")
    return manifest


def model_config_of(manifest: Manifest, path: Path) -> AnyModelConfig:
    """Return the configuration of the model whose weights the checkpoint at ``path`` holds.

    Raises:
        CheckpointError: the checkpoint stores no configuration, or an invalid one.
    """
    if manifest.model_config_values is None:
        raise CheckpointError(f"{path} does not store its model's configuration; save it from a run of mmscale")
    try:
        return read_model_config(manifest.model_config_values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its model's configuration is not valid: {first_fault(error)}") from error


def manifest_checksum(path: Path) -> str:
    """Return the manifest's own checksum, 8 hexadecimal digits. Reads the stored value and does not verify it.

    It identifies the whole checkpoint, because the manifest contains the checksums of all other files.

    Raises:
        CheckpointError: the manifest is missing or does not begin with a checksum.
    """
    try:
        seal = _SEAL.match(_read_json(path / MANIFEST))
    except OSError as error:
        raise CheckpointError(f"{path} is no checkpoint: {MANIFEST} cannot be read ({error.strerror})") from error
    if seal is None:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it does not begin with its checksum")
    return seal[1].decode()


def base_folder(base: BaseEntry, path: Path) -> Path:
    """Return the folder of a base of the checkpoint at ``path``, after comparing the checksum of its manifest.

    If the recorded folder is gone, look for the same run next to the run of ``path``: both may have moved together.

    Raises:
        CheckpointError: the base is missing or is another checkpoint.
    """
    recorded = Path(base.path)
    beside = [parent / Path(*recorded.parts[-3:]) for parent in path.absolute().parents[2:3]]
    reason = "it does not exist"
    for folder in (recorded, *beside):
        if folder.is_dir():
            if (checksum := manifest_checksum(folder)) == base.checksum:
                return folder
            reason = f"{folder} has checksum {checksum}"
    raise CheckpointError(
        f"{path} does not store its frozen weights: they are in {base.path} (checksum {base.checksum}), but {reason}; "
        f"put that checkpoint back, or make a link to it at {base.path}"
    )


def require_bases(path: Path) -> None:
    """Raise if a checkpoint that holds frozen weights of the one at ``path`` is missing or has changed.

    Raises:
        CheckpointError: see above; or the manifest of ``path`` cannot be read.
    """
    for base in read_manifest(path).bases:
        base_folder(base, path)


def read_rank_metadata(path: Path, rank: int) -> RankMetadata:
    """Read the metadata of one rank, without verifying the checksum of its file.

    Raises:
        CheckpointError: the file is missing, or its JSON is not valid metadata.
    """
    file = path / rank_files(rank)[1]
    try:
        return RankMetadata.model_validate_json(_read_json(file))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {first_fault(error)}") from error


def _read_json(file: Path) -> bytes:
    try:
        return retry_io(lambda: read_bytes(file, most_bytes=_MAX_JSON_BYTES))
    except UntrustedError as error:
        raise CheckpointError(f"{file}: {error}") from error


def missing_or_truncated(path: Path, manifest: Manifest) -> str | None:
    """Return a sentence about the first file that is missing or has the wrong size; None if all sizes are right."""
    for name, entry in manifest.files.items():
        try:
            size = retry_io((path / name).stat).st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} has {size} bytes, expected {entry.bytes}"
    return None


def is_whole(path: Path) -> bool:
    """Whether the manifest is valid and every file has the right size. Does not verify the checksums of those files."""
    try:
        return missing_or_truncated(path, read_manifest(path)) is None
    except CheckpointError:
        return False


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, oldest step first, complete or not.

    Folders ``step-N.partial`` and ``step-N.damaged`` are not included.
    """
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if _FOLDER.fullmatch(p.name) and p.name == folder_name(step_of(p))]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def list_set_aside(directory: Path) -> list[Path]:
    """Return the folders of damaged checkpoints that were renamed to ``step-N.damaged[-K]``, sorted by name."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _SET_ASIDE.fullmatch(path.name) and path.is_dir())


def find_latest(directory: Path) -> Path | None:
    """Return the newest checkpoint in ``directory`` for which ``is_whole`` holds; None if there is none.

    ``load.choose`` also verifies every byte.
    """
    return next((path for path in reversed(list_checkpoints(directory)) if is_whole(path)), None)


def checkpoints_of(path: Path) -> list[Path]:
    """Return the checkpoints at ``path``, oldest first, complete or not.

    A path that contains a manifest, or whose name begins with ``step-``, is returned alone, without a check.

    Args:
        path: One checkpoint, a run folder, or the ``checkpoints`` folder of a run.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        damaged = list_set_aside(path / "checkpoints") or list_set_aside(path)
        require_no_folder(path, f"make a checkpoint of it with: mmscale checkpoint import {path} RUN --from hf")
        raise CheckpointError(
            f"{path} has no checkpoints; give a run folder, its checkpoints folder, or one checkpoint"
            + (f" (renamed because damaged: {', '.join(folder.name for folder in damaged)})" if damaged else "")
        )
    return found


def newest_of(path: Path) -> Path:
    """Return the checkpoint at ``path``, or the newest complete one if ``path`` is a run or ``checkpoints`` folder.

    Raises:
        CheckpointError: there is no checkpoint, or none is complete. A checkpoint that ``path`` names is not checked.
    """
    folders = checkpoints_of(path)
    if folders == [path]:
        return path
    newest = find_latest(folders[0].parent)
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint is complete; `mmscale checkpoint list {path}` shows the reasons")
    return newest


def read_state(path: Path) -> TrainState:
    """Read the progress of the run. Merges the loader states of all ranks; reads no tensors.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks a rank's loader state although the run has seen samples.
    """
    manifest = read_manifest(path)
    saved, states, loader = manifest.state, list[LoaderState](), None
    texts = [read_rank_metadata(path, rank).loader for rank in range(manifest.world_size)]
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
