"""Rehearse a checkpoint of all ranks: real metadata and manifest, tensor files without values.

    model on the meta device --shards of rank r--> RankShare --> rank-r.json, rank-r.safetensors (header, then a hole)
    all ranks --> manifest.json --> read, check, merge the loader states, plan the resume of fewer ranks

A tensor file has its real size, but takes only its header on the disk. A model with many tensors has gigabytes of
metadata on thousands of ranks. Then all ranks write the entries of evenly spaced parameters, and the totals are scaled.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zlib_ng.zlib_ng import crc32

from data_pipeline.order.state import LoaderState
from mmscale.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    SavedState,
    TrainState,
    missing_or_truncated,
    rank_files,
    read_manifest,
    read_state,
    seal,
)
from mmscale.checkpoint.reshard import CheckpointReader
from mmscale.checkpoint.save import model_config_values, tied_names
from mmscale.checkpoint.share import LazyTensor, RankShare, TensorPiece, persistent_buffers
from mmscale.dist import World
from mmscale.engine.expert_parallel import ExpertGroups, split_experts
from mmscale.engine.partition import EMA, own_range, parameter_table, shard_range
from mmscale.models.build import build_weights
from mmscale.optim.schedule import freeze, parameter_groups
from mmscale.optim.stages import StageConfig
from mmscale.rehearse.report import Basis, Report
from mmscale.run.config import RunConfig

PART = "checkpoint"
_MOST_ENTRIES = 600_000
"""Tensor entries to write. Each takes about 20 microseconds: written, read and checked."""
_RESUMED_RANKS = 8
"""Ranks of the resumed run whose reads are planned."""


@dataclass(frozen=True)
class ShardedModel:
    """A model on the meta device, and the rules by which ranks save it.

    Attributes:
        model: The model of the stage, with frozen components.
        kinds: Kinds of the values that each parameter stores: name -> (kind, number format).
        zero_stage: ``engine.zero_stage``.
        flat: For ZeRO stages 1 and 2, the parameters of each optimizer group, in order.
        written: Names of the parameters whose entries are written.
    """

    model: nn.Module
    kinds: dict[str, list[tuple[str, torch.dtype]]]
    zero_stage: int
    flat: list[list[tuple[str, int]]]
    written: frozenset[str]

    @classmethod
    def build(cls, config: RunConfig, stage_number: int, most_parameters: int) -> ShardedModel:
        """Build the model of a stage without memory for its values; write at most about ``most_parameters``."""
        stage, size = config.stages[stage_number], config.engine.expert_parallel
        with split_experts(ExpertGroups(size, f"ep_size_{size}", None, None)):
            model: Any = build_weights(config.stage_model(stage_number))
        for parameter in model.parameters():
            parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
        components = model.components()
        freeze(model, components, stage)
        groups = parameter_groups(model, components, stage)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        kinds = {name: [("frozen", torch.bfloat16)] for name in names.values()}
        extra = [EMA] if stage.ema is not None else []
        for group in groups:
            stored = [(kind, torch.float32) for kind in ("master", *group["state_kinds"], *extra)]
            kinds |= {names[id(parameter)]: stored for parameter in group["params"]}
        flat = [[(names[id(p)], p.numel()) for p in group["params"]] for group in groups]
        written = list(names.values())[:: -(-len(names) // most_parameters)]
        return cls(model, kinds, config.engine.zero_stage, flat, frozenset(written))

    def ranges(self, world: World) -> Iterator[tuple[str, int, int]]:
        """Yield the ranges of the written parameters that a rank saves, without empty ones."""
        flat = self._flat_ranges(world) if self.zero_stage in (1, 2) else {}
        for name, parameter in self.model.named_parameters():
            if self.zero_stage == 3:
                start, stop = own_range(parameter, world)
            elif self.zero_stage and parameter.requires_grad:
                start, stop = flat.get(name, (0, 0))
            else:
                start, stop = shard_range(parameter.numel(), world.rank, world.world_size)
            if start < stop and name in self.written:
                yield name, start, stop

    def _flat_ranges(self, world: World) -> dict[str, tuple[int, int]]:
        """Return the ranges of a rank where a group's concatenated values are cut into equal shards."""
        found = {}
        for group in self.flat:
            low, high = shard_range(sum(size for _, size in group), world.rank, world.world_size)
            offset = 0
            for name, size in group:
                start, stop = max(low - offset, 0), min(high - offset, size)
                if start < stop:
                    found[name] = (start, stop)
                offset += size
        return found

    def pieces(self, world: World) -> list[TensorPiece]:
        """Return what a rank saves, without values."""
        pieces = [
            TensorPiece(f"{name}|{kind}", start, LazyTensor((stop - start,), dtype, _no_values))
            for name, start, stop in self.ranges(world)
            for kind, dtype in self.kinds[name]
        ]
        if world.is_main:  # Unsharded state of Adafactor is left out: it is small, and on rank 0 only.
            for name, values in persistent_buffers(self.model).items():
                lazy = LazyTensor(tuple(values.shape), values.dtype, _no_values)
                pieces.append(TensorPiece(f"{name}|buffer", 0, lazy, whole=True))
        return pieces

    def total_bytes(self) -> int:
        """Return the bytes of all stored values."""
        table = parameter_table(self.model)
        return sum(math.prod(table[name]["shape"]) * d.itemsize for name, kinds in self.kinds.items() for _, d in kinds)

    @property
    def scale(self) -> float:
        """Stored tensors of the model, divided by those of the written parameters."""
        return sum(map(len, self.kinds.values())) / sum(len(self.kinds[name]) for name in self.written)


def _no_values() -> torch.Tensor:
    raise AssertionError("a rehearsal writes no values")


def busiest_stage(config: RunConfig) -> int:
    """Return the number of the stage that trains most parameters; the first of equals."""

    def trained(number: int) -> int:
        model: Any = build_weights(config.stage_model(number))
        freeze(model, model.components(), config.stages[number])
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    return max(range(len(config.stages)), key=trained)


def rehearse_checkpoint(
    report: Report,
    config: RunConfig,
    worlds: Sequence[int],
    folder: Path,
    states: Sequence[str] | None,
    *,
    most_seconds: float,
    most_opens: float,
    advance: Callable[[], None],
) -> None:
    """Write, read and check the metadata of a checkpoint of all ranks, and plan a resume on other numbers of ranks.

    Args:
        report: Gets the figures and findings; ``bytes of a checkpoint`` among them.
        config: The run.
        worlds: Number of ranks of the save, then of each resume.
        folder: An empty folder, which becomes the checkpoint.
        states: Loader state of each rank as JSON text; None for a run whose order was not rehearsed.
        most_seconds: Limit of the time that rank 0 needs to merge the manifest, while all other ranks wait.
        most_opens: Limit of the files that all ranks together open to find their values in a resume.
        advance: Called again and again: after the files of every 64 ranks, and after each later step.
    """
    number, world_size = busiest_stage(config), worlds[0]
    stage = config.stages[number]
    sharded = ShardedModel.build(config, number, max(8, _MOST_ENTRIES // (4 * world_size)))
    basis = Basis.REAL if len(sharded.written) == len(sharded.kinds) else Basis.SCALED
    report.add(PART, "stage", stage.name)
    report.add(PART, "bytes of a checkpoint", sharded.total_bytes(), "bytes")
    report.add(PART, "files of a checkpoint", 2 * world_size + 1, "files")
    report.add(PART, "parameters whose entries were written", len(sharded.written), "parameters", basis)
    files: dict[str, FileEntry] = {}
    began = time.perf_counter()
    for rank in range(world_size):
        files |= _write_rank(sharded, folder, rank, world_size, states, advance)
    seconds = (time.perf_counter() - began) / world_size * sharded.scale
    report.add(PART, "write the metadata of one rank", seconds, "s", basis)
    metadata = [entry.bytes for name, entry in files.items() if name.endswith(".json")]
    fixed = world_size * len(json.dumps(_random_state()))
    total = int((sum(metadata) - fixed) * sharded.scale + fixed)
    report.add(PART, "bytes of the metadata of all ranks", total, "bytes", basis)
    _merge(report, sharded, stage, config, folder, world_size, files, most_seconds)
    advance()
    _check(report, sharded, folder, states, basis)
    advance()
    size = config.engine.expert_parallel
    for resumed in worlds[1:]:
        if resumed % size:
            reason = f"not rehearsed: engine.expert_parallel={size} does not divide {resumed:,} ranks"
            report.add(PART, f"resume on {resumed:,} ranks", reason)
            continue
        _plan_resume(report, sharded, folder, world_size, resumed, most_opens)
        advance()


def _world(rank: int, world_size: int) -> World:
    return World(rank, world_size, 0, torch.device("cpu"))


def _random_state() -> dict[str, str]:
    return {"cpu": bytes(torch.get_rng_state().tolist()).hex()}


def _write_rank(
    sharded: ShardedModel,
    folder: Path,
    rank: int,
    world_size: int,
    states: Sequence[str] | None,
    advance: Callable[[], None],
) -> dict[str, FileEntry]:
    """Write the metadata of one rank, and its tensor file with a hole instead of values."""
    loader = states[rank] if states is not None else None
    share = RankShare.of(rank, sharded.pieces(_world(rank, world_size)), loader, _random_state())
    for key, entry in share.metadata["tensors"].items():
        entry["crc32"] = crc32(key.encode(), rank)  # Any 32-bit number: there are no values.
    text = json.dumps(share.metadata, separators=(",", ":")).encode()
    names = rank_files(rank)
    size = len(share.header) + sum(share.lengths)
    with (folder / names[0]).open("xb") as file:
        file.write(share.header)
        file.truncate(size)
    (folder / names[1]).write_bytes(text)
    if rank % 64 == 0:
        advance()
    return {
        names[0]: FileEntry(bytes=size, crc32=crc32(share.header)),
        names[1]: FileEntry(bytes=len(text), crc32=crc32(text)),
    }


def _merge(
    report: Report,
    sharded: ShardedModel,
    stage: StageConfig,
    config: RunConfig,
    folder: Path,
    world_size: int,
    files: dict[str, FileEntry],
    most_seconds: float,
) -> None:
    """Make the manifest of all ranks as rank 0 does, write it, and read it again."""
    values = {
        "format": FORMAT,
        "state": {name: getattr(TrainState(step=1, stage_step=1, samples=1), name) for name in SavedState.model_fields},
        "stage": stage.name,
        "world_size": world_size,
        "zero_stage": config.engine.zero_stage,
        "precision": "bf16",
        "optimizer": stage.optimizer.state_name,
        "ema": stage.ema is not None,
        "optimizer_steps": 1,
        "parameters": {n: entry for n, entry in parameter_table(sharded.model).items() if n in sharded.written},
        "buffers": {name: tuple(each.shape) for name, each in persistent_buffers(sharded.model).items()},
        "tied": tied_names(sharded.model),
        "model_config_values": model_config_values(sharded.model),
        "versions": {},
    }

    def merge() -> str:
        listed = {name: entry.model_dump() for name, entry in files.items()}
        manifest = Manifest.model_validate({**values, "files": listed})
        problem = missing_or_truncated(folder, manifest)
        assert problem is None, problem
        return seal(manifest)

    text = report.timed(PART, "merge the manifest of all ranks on rank 0", merge)
    (folder / MANIFEST).write_text(text)
    report.add(PART, "bytes of the manifest", len(text), "bytes")
    report.timed(PART, "read and check the manifest", lambda: read_manifest(folder))
    seconds = report.value(PART, "merge the manifest of all ranks on rank 0")
    report.limit(
        "manifest-merge-slow",
        seconds,
        most_seconds,
        f"rank 0 needs {seconds:.0f} s to merge the manifest of {world_size:,} ranks while the others wait: use fewer "
        "ranks",
    )


def _check(report: Report, sharded: ShardedModel, folder: Path, states: Sequence[str] | None, basis: Basis) -> None:
    """Check that the ranges cover all values, and merge the loader states, as rank 0 does before a resume."""
    with CheckpointReader(folder) as reader:
        began = time.perf_counter()
        gaps = list(reader.gaps())
        seconds = (time.perf_counter() - began) * sharded.scale
    report.add(PART, "check the ranges of all ranks on rank 0", seconds, "s", basis)
    report.limit("ranges-incomplete", len(gaps), 0, f"{gaps[:1]}: the ranks do not save every value exactly once")
    if states is None:
        return
    merged = report.timed(PART, "read and merge the loader states on rank 0", lambda: read_state(folder).loader)
    wanted = LoaderState.merge([LoaderState.from_json(text) for text in states])
    same = merged == wanted
    report.add(PART, "merged loader state equals that of the ranks", same)
    report.limit("loader-state-differs", float(not same), 0, "the merged loader state differs; please report this")


def _plan_resume(
    report: Report, sharded: ShardedModel, folder: Path, world_size: int, resumed: int, most_opens: float
) -> None:
    """Find the stored ranges of what some ranks of the resumed run hold, and count the files that this opens."""
    name = f"resume on {resumed:,} ranks"
    wanted = [rank * resumed // _RESUMED_RANKS for rank in range(min(resumed, _RESUMED_RANKS))]
    opened = overlaps = 0
    missing = 0
    for rank in sorted(set(wanted)):
        world = _world(rank, resumed)
        near = rank * world_size // resumed
        with CheckpointReader(folder, check_sizes=False, near=near) as reader:
            sources = set()
            for parameter, start, stop in sharded.ranges(world):
                kind = sharded.kinds[parameter][0][0]
                found = reader.ranges(parameter, kind, start, stop)
                sources |= {source for _, _, source in found}
                overlaps += len(found)
                missing += stop - start - sum(min(high, stop) - max(low, start) for low, high, _ in found)
            opened += reader.num_read + len(sources)
    planned = len(set(wanted))
    report.add(PART, f"{name}: ranges that a rank copies for each kind", overlaps / planned, "ranges", Basis.SCALED)
    report.add(PART, f"{name}: files that a rank opens", opened / planned, "files", Basis.SCALED)
    everything = opened / planned * resumed
    report.add(PART, f"{name}: files that all ranks open", int(everything), "files", Basis.SCALED)
    report.limit(
        "resume-opens",
        everything,
        most_opens,
        f"to resume on {resumed:,} ranks, the ranks open {everything:,.0f} files: set engine.zero_stage=3, whose "
        "ranges follow from the shapes",
    )
