"""Writing a checkpoint so that it is whole or absent.

    rank 0: make step-N.partial      every rank: write, sync      rank 0: check, write the manifest,
    all agree  --------------------> all agree  --------------->  sync, rename to step-N, sync
                                                                  all agree

At each "agree" every rank learns the first complaint of any, and all raise it together. ``save`` waits for all of it;
``background.py`` goes the same way while training goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.io.strict import StrictConfig
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.manifest import (
    DAMAGED,
    FORMAT,
    MANIFEST,
    PARTIAL,
    FileEntry,
    Manifest,
    SavedState,
    TrainState,
    folder_name,
    is_whole,
    list_checkpoints,
    missing_or_cut,
    rank_files,
    read_manifest,
    seal,
    step_of,
)
from mmscale.checkpoint.share import persistent_buffers, share_of
from mmscale.dist import World, all_reduce_sum_list, first_complaint
from mmscale.engine.engine import Engine
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.io.files import Written, complete, set_aside, write_share


def save(engine: Engine, state: TrainState, directory: Path, keep: CheckpointConfig | None = None) -> Path:
    """Writes ``directory/step-N`` and removes what ``keep`` does not keep. All ranks must call.

    A whole checkpoint of the same step and stage that is already there is left as it is.

    Args:
        engine: Weights, moments and schedule position.
        state: Counters, and this rank's lanes of the loader.
        directory: ``checkpoints`` folder of the run, seen by all ranks.
        keep: Retention; None keeps everything.

    Raises:
        CheckpointError: a rank could not write (disk full, no permission, folder not shared); nothing is left behind
            under the final name, older checkpoints are untouched.
    """
    place = begin(engine, state, directory)
    if place is None:
        return directory / folder_name(state.step)
    written: list[Written] = []

    def write() -> None:
        share = share_of(engine, state)
        written.extend(write_share(place.partial, share.names, share.header, share.notes, share.bytes_of()))

    together(engine.world, place, write)
    files = gather_files(engine.world, written)

    def finish() -> None:
        complete(place.partial, place.final, (MANIFEST, place.close(files)), to_remove(place.final, keep))

    together(engine.world, place, finish, only_main=True)
    return place.final


@dataclass(frozen=True)
class Place:
    """A checkpoint that is being written.

    Attributes:
        partial: Its folder.
        final: The name that the folder gets.
        manifest: All of the manifest but the files, as JSON values, true of the moment that is saved.
    """

    partial: Path
    final: Path
    manifest: dict[str, Any]

    def close(self, files: dict[str, FileEntry]) -> str:
        """The manifest's text, now that the files are known.

        Raises:
            CheckpointError: one of them is not there.
        """
        listed = {name: entry.model_dump() for name, entry in files.items()}
        manifest = Manifest.model_validate({**self.manifest, "files": listed})
        if (problem := missing_or_cut(self.partial, manifest)) is not None:
            raise CheckpointError(f"{problem}; do all ranks see the same folder?")
        return seal(manifest)


def begin(engine: Engine, state: TrainState, directory: Path) -> Place | None:
    """Makes the folder to write into; None if that checkpoint is there already. All ranks must call.

    Raises:
        CheckpointError: it cannot be made.
    """
    final = directory / folder_name(state.step)
    if _already_there(engine.world, final, state):
        return None
    place = Place(directory / (final.name + PARTIAL), final, _manifest(engine, state))
    together(engine.world, place, lambda: _prepare(place), only_main=True)
    return place


def together(world: World, place: Place, work: Callable[[], object], *, only_main: bool = False) -> None:
    """Does ``work`` and lets all ranks fail together; the half-written folder is removed.

    Raises:
        CheckpointError: a rank could not do it.
    """
    complaint = None
    if world.is_main or not only_main:
        try:
            work()
        except (OSError, CheckpointError) as error:
            complaint = str(error)
    give_up_if(world, place, complaint)


def give_up_if(world: World, place: Place, complaint: str | None) -> None:
    """Raises the first complaint of any rank on all of them; the half-written folder is removed.

    Raises:
        CheckpointError: there is one.
    """
    if complaint is not None:
        complaint = f"cannot write {place.final.name} into {place.final.parent}: {complaint}"
    heard = first_complaint(world, complaint)
    if heard is not None:
        if world.is_main:
            shutil.rmtree(place.partial, ignore_errors=True)
        raise CheckpointError(heard)


def _already_there(world: World, final: Path, state: TrainState) -> bool:
    """Decided by rank 0 for all."""
    answer = 0.0
    if world.is_main and is_whole(final):
        answer = 1.0 if _moment(read_manifest(final).state) == _moment(state) else 2.0
    answer = all_reduce_sum_list(world, [answer])[0]
    if answer == 2.0:
        raise CheckpointError(f"{final} is a checkpoint of another stage at the same step; use another run_dir")
    return answer == 1.0


def _moment(state: TrainState | SavedState) -> tuple[int, int, int]:
    return state.step, state.stage_index, state.stage_step


def _prepare(place: Place) -> None:
    directory = place.final.parent
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(leftover)
    if place.final.exists():  # Not whole, or of another step; it may hold something that its owner needs.
        set_aside(place.final, DAMAGED)
    place.partial.mkdir()


def gather_files(world: World, mine: Sequence[Written]) -> dict[str, FileEntry]:
    """Sizes and checksums of all ranks' files; below 2**53, so a sum of float64 carries them exactly."""
    width = 4
    values = [0.0] * (width * world.world_size)
    flat = [float(number) for written in mine for number in written]
    values[width * world.rank : width * (world.rank + 1)] = flat
    numbers = [int(value) for value in all_reduce_sum_list(world, values)]
    files = {}
    for rank in range(world.world_size):
        a, b, c, d = numbers[width * rank : width * (rank + 1)]
        names = rank_files(rank)
        files[names[0]], files[names[1]] = FileEntry(bytes=a, crc32=b), FileEntry(bytes=c, crc32=d)
    return files


def _manifest(engine: Engine, state: TrainState) -> dict[str, Any]:
    import deepspeed

    return {
        "format": FORMAT,
        "state": {name: getattr(state, name) for name in SavedState.model_fields},
        "stage": engine.stage.name,
        "world_size": engine.world.world_size,
        "zero_stage": engine.config.zero_stage,
        "precision": engine.precision.name,
        "optimizer": engine.stage.optimizer.state_name,
        "ema": engine.stage.ema is not None,
        "loss_scaler": engine.loss_scaler_state(),
        "optimizer_steps": engine.partition.optimizer_steps(),
        "parameters": parameter_table(engine.model),
        "buffers": {name: tuple(values.shape) for name, values in persistent_buffers(engine.model).items()},
        "tied": tied_names(engine.model),
        "model_config_values": model_config_values(engine.model),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }


def model_config_values(model: torch.nn.Module) -> dict[str, Any] | None:
    """The model's configuration as JSON values, if it has one."""
    config: Any = getattr(model, "config", None)
    return config.model_dump(mode="json") if isinstance(config, StrictConfig) else None


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Further names of parameters that have several -> the first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    return tied


def to_remove(newest: Path, keep: CheckpointConfig | None) -> list[Path]:
    """Checkpoints beside ``newest`` that ``keep`` does not keep once that one is whole; None keeps all.

    Only whole ones count as kept, and ``newest`` is about to be one: a damaged checkpoint never pushes out a good one.
    """
    if keep is None:
        return []
    older = [path for path in list_checkpoints(newest.parent) if path != newest]
    whole = [path for path in older if is_whole(path)]
    kept = set(whole[len(whole) - keep.keep_last + 1 :] if keep.keep_last > 1 else [])
    oldest_kept = min([newest, *kept], key=step_of)
    return [
        path
        for path in older
        if path not in kept
        and step_of(path) < step_of(oldest_kept)
        and (keep.keep_every is None or step_of(path) % keep.keep_every)
    ]
