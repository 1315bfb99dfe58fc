"""Write a checkpoint atomically: the folder ``step-N`` exists only if it is complete.

    rank 0: make step-N.partial      every rank: write, sync      rank 0: check, write the manifest,
    all agree  --------------------> all agree  --------------->  sync, rename to step-N, sync
                                                                  all agree

At each "all agree" the ranks exchange errors. If any rank failed, all ranks raise the same error. ``save`` blocks until
the checkpoint is complete; ``background.py`` takes the same steps while training continues.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.io.retry import explain_io, retry_io
from data_pipeline.io.strict import StrictConfig
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.manifest import (
    DAMAGED,
    FORMAT,
    MANIFEST,
    PARTIAL,
    BaseEntry,
    FileEntry,
    Manifest,
    SavedState,
    TrainState,
    best_step,
    folder_name,
    is_whole,
    list_checkpoints,
    missing_or_truncated,
    rank_files,
    read_manifest,
    seal,
    step_of,
)
from mmscale.checkpoint.share import persistent_buffers, share_of
from mmscale.dist import World, all_reduce_sum_list, lowest_rank_error
from mmscale.engine.engine import Engine, FrozenSource
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.io.files import WrittenFile, finalize, remove_files, set_aside, write_share


def save(engine: Engine, state: TrainState, directory: Path, keep: CheckpointConfig | None = None) -> Path:
    """Write ``directory/step-N``, then remove the checkpoints that ``keep`` does not keep. All ranks must call.

    Writes nothing if ``directory`` already has a complete checkpoint of the same step and stage.

    Args:
        engine: Source of the weights, the optimizer state and the step counts.
        state: Progress of the run, with the loader state of this rank's lanes.
        directory: ``checkpoints`` folder of the run, shared by all ranks.
        keep: Retention settings; None removes nothing.

    Raises:
        CheckpointError: a rank could not write (disk full, no permission, folder not shared), or ``directory`` has a
            checkpoint of another stage at this step. All ranks raise. ``step-N`` is never left incomplete, and no older
            checkpoint is removed before ``step-N`` is complete.
    """
    target = begin(engine, state, directory)
    if target is None:
        return directory / folder_name(state.step)
    written: list[WrittenFile] = []

    def write() -> None:
        share = share_of(engine, state)
        files = retry_io(
            lambda: write_share(target.partial, share.names, share.header, share.metadata, share.bytes_of()),
            lambda: remove_files(target.partial, share.names),
        )
        written.extend(files)

    run_or_abort(engine.world, target, write)
    files = gather_files(engine.world, written)

    def publish() -> None:
        stale = stale_checkpoints(target.final, keep, target.best)
        finalize(target.partial, target.final, (MANIFEST, target.manifest_text(files)), stale, target.best_folder)

    run_or_abort(engine.world, target, publish, only_main=True)
    return target.final


@dataclass(frozen=True)
class SaveTarget:
    """A checkpoint that is being written.

    Attributes:
        partial: Folder that the ranks write into.
        final: Path of the folder when it is complete.
        manifest: The manifest as JSON values, without ``files``. It describes the state at the time of ``begin``.
    """

    partial: Path
    final: Path
    manifest: dict[str, Any]

    @property
    def best(self) -> int | None:
        """Step of the run's best checkpoint, this one included; None if the run keeps none."""
        return best_step(self.manifest["state"]["extra"])

    @property
    def best_folder(self) -> Path | None:
        """Folder of the best checkpoint; None if the run keeps none."""
        return None if self.best is None else self.final.with_name(folder_name(self.best))

    def manifest_text(self, files: dict[str, FileEntry]) -> str:
        """Return the text of the manifest with its list of files.

        Raises:
            CheckpointError: a file is missing from ``partial`` or has another size.
        """
        listed = {name: entry.model_dump() for name, entry in files.items()}
        manifest = Manifest.model_validate({**self.manifest, "files": listed})
        if (problem := missing_or_truncated(self.partial, manifest)) is not None:
            raise CheckpointError(f"{problem}; do all ranks see the same folder?")
        return seal(manifest)


def begin(engine: Engine, state: TrainState, directory: Path) -> SaveTarget | None:
    """Make the folder to write into. All ranks must call.

    Rank 0 removes the folders of interrupted saves, and renames an incomplete ``step-N`` to ``step-N.damaged``.

    Returns:
        None if a complete checkpoint of this step and stage already exists.

    Raises:
        CheckpointError: the folder cannot be made, or a checkpoint of another stage has this step.
    """
    final = directory / folder_name(state.step)
    if _already_saved(engine.world, final, state):
        return None
    target = SaveTarget(directory / (final.name + PARTIAL), final, _manifest(engine, state))
    run_or_abort(engine.world, target, lambda: retry_io(lambda: _prepare(target)), only_main=True)
    return target


def run_or_abort(world: World, target: SaveTarget, work: Callable[[], object], *, only_main: bool = False) -> None:
    """Call ``work``; if it fails on any rank, remove the partial folder and raise on all ranks. All ranks must call.

    Args:
        world: This rank.
        target: Checkpoint that is being written.
        work: Its OSError and CheckpointError count as failures.
        only_main: Call ``work`` on rank 0 only.

    Raises:
        CheckpointError: ``work`` failed on a rank.
    """
    complaint = None
    if world.is_main or not only_main:
        try:
            work()
        except (OSError, CheckpointError) as error:
            complaint = explain_io(error, with_file=True) if isinstance(error, OSError) else str(error)
    abort_on_any_rank(world, target, complaint)


def abort_on_any_rank(world: World, target: SaveTarget, complaint: str | None) -> None:
    """If any rank passes a complaint, remove the partial folder and raise on all ranks. All ranks must call.

    Raises:
        CheckpointError: the complaint of the first rank that has one.
    """
    if complaint is not None:
        complaint = f"cannot write {target.final.name} into {target.final.parent}: {complaint}"
    first = lowest_rank_error(world, complaint)
    if first is not None:
        if world.is_main:
            shutil.rmtree(target.partial, ignore_errors=True)
        raise CheckpointError(first)


def _already_saved(world: World, final: Path, state: TrainState) -> bool:
    """Whether ``final`` is a complete checkpoint of this step and stage, as rank 0 sees it. All ranks must call."""
    answer = 0.0
    if world.is_main and is_whole(final):
        answer = 1.0 if _position(read_manifest(final).state) == _position(state) else 2.0
    answer = all_reduce_sum_list(world, [answer])[0]
    if answer == 2.0:
        raise CheckpointError(f"{final} is a checkpoint of another stage at the same step; use another run_dir")
    return answer == 1.0


def _position(state: TrainState | SavedState) -> tuple[int, int, int]:
    return state.step, state.stage_index, state.stage_step


def _prepare(target: SaveTarget) -> None:
    directory = target.final.parent
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(leftover)
    if target.final.exists():  # Incomplete, or of another step. Keep it: its owner may still need it.
        set_aside(target.final, DAMAGED)
    target.partial.mkdir()


def gather_files(world: World, mine: Sequence[WrittenFile]) -> dict[str, FileEntry]:
    """Return sizes and checksums of all ranks' files. All ranks must call.

    The numbers are below 2**53, so a float64 sum is exact.

    Args:
        world: This rank.
        mine: This rank's tensor file and metadata file.
    """
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
        "bases": [entry.model_dump() for entry in base_entries(engine)],
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }


def base_entries(engine: Engine) -> list[BaseEntry]:
    """Return the checkpoints that hold the frozen parameters which ``share_of`` leaves out."""
    names: dict[FrozenSource, list[str]] = {}
    for name, parameter in engine.model.named_parameters():
        source = engine.frozen_sources.get(name)
        if source is not None and not parameter.requires_grad:
            names.setdefault(source, []).append(name)
    return [BaseEntry(**asdict(source), parameters=tuple(listed)) for source, listed in names.items()]


def model_config_values(model: torch.nn.Module) -> dict[str, Any] | None:
    """Return the model's configuration as JSON values; None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.model_dump(mode="json") if isinstance(config, StrictConfig) else None


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    return tied


def stale_checkpoints(newest: Path, keep: CheckpointConfig | None, best: int | None = None) -> list[Path]:
    """Return the checkpoints to remove when ``newest`` is complete; none if ``keep`` is None.

    Only complete checkpoints count towards ``keep_last``, so an incomplete one never displaces a complete one.
    Checkpoints of later steps than the oldest kept one are never returned. The best checkpoint is never returned,
    neither the present one nor the one that a kept checkpoint names: a run that rolls back to that checkpoint needs it.
    At most one of them is older than the checkpoints of ``keep_last``.

    Args:
        newest: Checkpoint that is about to be complete; it counts towards ``keep_last``.
        keep: Retention settings.
        best: Step of the best checkpoint, as of ``newest``; None if the run keeps none.
    """
    if keep is None:
        return []
    older = [path for path in list_checkpoints(newest.parent) if path != newest]
    whole = [path for path in older if is_whole(path)]
    kept = set(whole[len(whole) - keep.keep_last + 1 :] if keep.keep_last > 1 else [])
    oldest_kept = min([newest, *kept], key=step_of)
    bests = {best, *(best_step(read_manifest(path).state.extra) for path in kept)}
    return [
        path
        for path in older
        if path not in kept
        and step_of(path) < step_of(oldest_kept)
        and step_of(path) not in bests
        and (keep.keep_every is None or step_of(path) % keep.keep_every)
    ]
