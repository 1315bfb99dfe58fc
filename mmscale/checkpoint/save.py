"""Writing a checkpoint so that it is whole or absent.

    rank 0: make step-N.partial      every rank: write, sync      rank 0: check, write the manifest,
    all agree  --------------------> all agree  --------------->  sync, rename to step-N, sync
                                                                  all agree

At each "agree" every rank learns the first complaint of any, and all raise it together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.strict import StrictConfig
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.durable import sync_folder, write_bytes, write_tensors
from mmscale.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    PARTIAL,
    FileEntry,
    Manifest,
    RankNotes,
    SavedState,
    TrainState,
    folder_name,
    list_checkpoints,
    missing_or_cut,
    rank_files,
    read_manifest,
)
from mmscale.dist import World, first_complaint, sum_float
from mmscale.engine.engine import Engine
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError


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
    world = engine.world
    final = directory / folder_name(state.step)
    partial = directory / (folder_name(state.step) + PARTIAL)
    if _already_there(world, final, state):
        return final
    entries: list[FileEntry] = []
    _together(world, partial, lambda: _prepare(directory, final, partial), only_main=True)
    _together(world, partial, lambda: entries.extend(_write_rank(engine, state, partial)))
    files = _gather_entries(world, entries)
    _together(world, partial, lambda: _finish(engine, state, files, partial, final), only_main=True)
    if world.is_main and keep is not None:
        prune(directory, keep)
    return final


def _together(world: World, partial: Path, work: Callable[[], object], *, only_main: bool = False) -> None:
    """Does ``work`` and lets all ranks fail together; the half-written folder is removed."""
    complaint = None
    if world.is_main or not only_main:
        try:
            work()
        except (OSError, CheckpointError) as error:
            complaint = f"cannot write {partial.name.removesuffix(PARTIAL)} into {partial.parent}: {error}"
    heard = first_complaint(world, complaint)
    if heard is not None:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(heard)


def _already_there(world: World, final: Path, state: TrainState) -> bool:
    """Decided by rank 0 for all."""
    answer = 0.0
    if world.is_main and final.exists():
        try:
            manifest = read_manifest(final)
            if missing_or_cut(final, manifest) is None:
                same = _place(manifest.state) == _place(state)
                answer = 1.0 if same else 2.0
        except CheckpointError:
            answer = 0.0  # Damaged: it is replaced.
    answer = sum_float(world, [answer])[0]
    if answer == 2.0:
        raise CheckpointError(f"{final} is a checkpoint of another stage at the same step; use another run_dir")
    return answer == 1.0


def _place(state: TrainState | SavedState) -> tuple[int, int, int]:
    return state.step, state.stage_index, state.stage_step


def _prepare(directory: Path, final: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(leftover)
    if final.exists():
        shutil.rmtree(final)
    partial.mkdir()


def _write_rank(engine: Engine, state: TrainState, partial: Path) -> list[FileEntry]:
    tensors_name, notes_name = rank_files(engine.world.rank)
    tensors: list[tuple[str, torch.Tensor]] = []
    ranges: dict[str, tuple[int, int]] = {}
    for owned in engine.partition.owned():
        ranges[owned.name] = (owned.start, owned.stop)
        tensors.append((f"{owned.name}|{'master' if owned.trained else 'frozen'}", owned.master))
        tensors.extend((f"{owned.name}|{key}", values) for key, values in owned.moments.items())
    if engine.world.is_main:
        tensors.extend((f"{name}|buffer", values) for name, values in persistent_buffers(engine.model).items())
        tensors.extend(engine.partition.whole_state().items())
    notes = RankNotes(
        rank=engine.world.rank,
        ranges=ranges,
        loader=None if state.loader is None else state.loader.to_json(),
        random_state=_random_state(engine.world),
    )
    text = notes.model_dump_json().encode()
    return [write_tensors(partial / tensors_name, tensors), write_bytes(partial / notes_name, [memoryview(text)])]


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state, by name."""
    found = {}
    for path, module in model.named_modules():
        for name, values in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = values
    return found


def _random_state(world: World) -> dict[str, str]:
    states = {"cpu": bytes(torch.get_rng_state().tolist()).hex()}
    if world.device.type == "cuda":
        states["cuda"] = bytes(torch.cuda.get_rng_state(world.device).tolist()).hex()
    return states


def _gather_entries(world: World, mine: list[FileEntry]) -> dict[str, FileEntry]:
    """Sizes and checksums of all ranks' files; below 2**53, so a sum of float64 carries them exactly."""
    width = 4
    values = [0.0] * (width * world.world_size)
    flat = [float(number) for entry in mine for number in (entry.bytes, entry.crc32)]
    values[width * world.rank : width * (world.rank + 1)] = flat
    numbers = [int(value) for value in sum_float(world, values)]
    files = {}
    for rank in range(world.world_size):
        a, b, c, d = numbers[width * rank : width * (rank + 1)]
        names = rank_files(rank)
        files[names[0]], files[names[1]] = FileEntry(bytes=a, crc32=b), FileEntry(bytes=c, crc32=d)
    return files


def _finish(engine: Engine, state: TrainState, files: dict[str, FileEntry], partial: Path, final: Path) -> None:
    manifest = _manifest(engine, state, files)
    if (problem := missing_or_cut(partial, manifest)) is not None:
        raise CheckpointError(f"{problem}; do all ranks see the same folder?")
    write_bytes(partial / MANIFEST, [memoryview(manifest.model_dump_json(indent=1).encode())])
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)


def _manifest(engine: Engine, state: TrainState, files: dict[str, FileEntry]) -> Manifest:
    import deepspeed

    return Manifest.model_validate(
        {
            "format": FORMAT,
            "state": {name: getattr(state, name) for name in SavedState.model_fields},
            "stage": engine.stage.name,
            "world_size": engine.world.world_size,
            "zero_stage": engine.config.zero_stage,
            "precision": engine.precision.name,
            "optimizer": engine.stage.optimizer.kind,
            "ema": engine.stage.ema is not None,
            "loss_scaler": engine.loss_scaler_state(),
            "optimizer_steps": engine.partition.optimizer_steps(),
            "parameters": parameter_table(engine.model),
            "buffers": {name: tuple(values.shape) for name, values in persistent_buffers(engine.model).items()},
            "tied": tied_names(engine.model),
            "model_config_values": model_config_values(engine.model),
            "files": {name: entry.model_dump() for name, entry in files.items()},
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        }
    )


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


def prune(directory: Path, keep: CheckpointConfig) -> list[Path]:
    """Removes checkpoints that ``keep`` does not keep; call on one rank. Gives what was removed."""
    paths = list_checkpoints(directory)
    doomed = [
        path
        for path in paths[: -keep.keep_last]
        if keep.keep_every is None or int(path.name.partition("-")[2]) % keep.keep_every
    ]
    for path in doomed:
        # Renamed first: a checkpoint that is half removed must not look like one.
        leftover = path.with_name(path.name + PARTIAL)
        path.rename(leftover)
        shutil.rmtree(leftover)
    return doomed
