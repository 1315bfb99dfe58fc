"""Load the weights that fit from a checkpoint into a model, and report every parameter that was or was not loaded.

    same name, same shape                       -> copied
    token embeddings, other number of rows      -> copy the rows that both have; new rows keep their values
    position embeddings of another grid         -> resampled to the model's grid
    experts, if the stage upcycles              -> copies or slices of the dense feed-forward (``upcycle.py``)
    anything else                               -> unchanged, and listed in the report

Optimizer state, counters and data position are not loaded. To continue within a stage use ``load.resume``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmscale.checkpoint.manifest import Manifest, manifest_checksum
from mmscale.checkpoint.reshard import CheckpointReader, verify_together, whole_parameter
from mmscale.checkpoint.share import persistent_buffers
from mmscale.checkpoint.upcycle import Upcycled, fill_upcycled, upcycled_parameters
from mmscale.dist import raise_on_any_rank
from mmscale.engine.engine import Engine, FrozenSource
from mmscale.engine.partition import OwnedRange, parameter_table
from mmscale.errors import CheckpointError
from mmscale.nn.adapters import ADAPTER_PARAMETERS, AdaptedLinear, adapted_layers
from mmscale.nn.patch_embed import BucketedPositions, LearnedPositions, resample_positions
from mmscale.nn.tile_embed import TilePositions
from mmscale.optim.schedule import component_of_parameters, token_tables

_Grid = tuple[int, int]
_CHUNK_VALUES = 4 << 20


class Resized(NamedTuple):
    """A token embedding table with another number of rows than in the checkpoint."""

    name: str
    taken: int
    """Number of rows that were copied: the first ones."""
    before: int
    """Rows in the checkpoint."""
    now: int
    """Rows in the model. Rows from ``taken`` on keep their values."""


class Resampled(NamedTuple):
    """A position embedding table that was resampled; grids are (rows, columns)."""

    name: str
    before: _Grid
    now: _Grid


@dataclass(frozen=True)
class LoadReport:
    """Result of ``warm_start``, by parameter name. Each parameter of model and checkpoint is in exactly one list.

    Persistent buffers (router biases) are listed only if they were not copied: in ``missing``, ``unused`` or
    ``mismatched``.

    Attributes:
        loaded: Copied from the checkpoint unchanged.
        missing: Only in the model; they keep their values.
        unused: Only in the checkpoint.
        mismatched: In both with different shapes; the model's keep their values.
        resized: Token embedding tables with another number of rows.
        resampled: Position embedding tables of another grid.
        derived: Magnitudes of DoRA that are not loaded although the weight of their layer is. They are set to the norms
            of the rows of that weight.
        left: In both, but in components that were not requested; the model's keep their values.
        upcycled: Experts that started from a dense feed-forward of the checkpoint. The matrices of that feed-forward
            are in no list.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[str, ...]
    resized: tuple[Resized, ...] = ()
    resampled: tuple[Resampled, ...] = ()
    left: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    upcycled: tuple[Upcycled, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether model and checkpoint have the same parameters and buffers, and all were copied unchanged."""
        changed = self.resized or self.resampled or self.derived or self.upcycled
        return not (self.missing or self.unused or self.mismatched or self.left or changed)

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of all parameters that got values from the checkpoint, at least in part."""
        experts = (one.name for one in self.upcycled)
        return (*self.loaded, *(t.name for t in self.resized), *(t.name for t in self.resampled), *experts)

    def __str__(self) -> str:
        """Return one line. ``decoder.* (37)`` means all 37 parameters of model or checkpoint whose names begin so.

        The parameters of adapters are shown as if their names began with ``adapters.``.
        """
        lists = {
            "loaded": self.loaded,
            "not in the checkpoint, unchanged": self.missing,
            "another shape, unchanged": self.mismatched,
            "not asked for, unchanged": self.left,
            "norms of the loaded weights": self.derived,
            "only in the checkpoint, not used": self.unused,
        }
        if self.complete:
            return f"loaded all {len(self.loaded)} parameters"
        lists = {what: tuple(map(_display_name, names)) for what, names in lists.items()}
        every = {name for names in lists.values() for name in names} | {*self.taken} - {*self.loaded}
        parts = [f"{what}: {_grouped(names, every)}" for what, names in lists.items() if names]
        parts += [
            f"{t.name}: loaded {t.taken} of the checkpoint's {t.before} rows"
            + (f", {t.now - t.taken} new rows unchanged" if t.now > t.taken else "")
            for t in self.resized
        ]
        parts += [
            f"{t.name}: resampled from {t.before[0]}x{t.before[1]} to {t.now[0]}x{t.now[1]} positions"
            for t in self.resampled
        ]
        stacks = [one for one in self.upcycled if len(one.sources) > 1]
        for one in stacks[:1]:  # All blocks with experts have the same number of them.
            share = f"1/{one.slices}" if one.slices > 1 else "a copy"
            parts.append(f"{one.experts} experts in {len(stacks)} blocks: each {share} of the dense feed-forward")
        return "; ".join(parts)


def warm_start(
    engine: Engine,
    path: Path,
    components: Collection[str] | None = None,
    *,
    ema: bool = False,
    lasting: bool = False,
    upcycle: bool = False,
) -> LoadReport:
    """Load the weights and buffers that fit; optimizer state and schedule start anew. All ranks must call.

    If a layer with DoRA gets its weight from the checkpoint but no magnitude, its magnitude becomes the norms of the
    rows of the weight.

    The model changes only after every byte of the checkpoint is verified.

    Args:
        engine: Engine before its first step; mutated.
        path: Checkpoint folder.
        components: Names of the components to load, with their buffers; None loads all.
        ema: Load the exponential moving average of the trained weights instead of the weights.
        lasting: The checkpoint will exist as long as those of this engine. These name it for the parameters that they
            freeze, instead of storing the values again.
        upcycle: Start experts from the checkpoint's dense feed-forwards.

    Raises:
        CheckpointError: the checkpoint is damaged, has no average, or holds no parameter that fits; the model lacks one
            of ``components``; or its experts cannot start from the dense feed-forwards. All ranks raise.
    """
    verify_together(engine.world, path)
    try:
        with CheckpointReader(path, check_sizes=False) as reader:
            complaint = warm_start_problem(reader.manifest, path, engine.model, components, ema=ema, upcycle=upcycle)
            report = match(engine.model, reader.manifest, components, upcycle=upcycle)
    except CheckpointError as error:
        complaint = str(error)
    raise_on_any_rank(engine.world, complaint, CheckpointError)
    with CheckpointReader(path, check_sizes=False) as reader:
        _copy_weights(engine, reader, report, ema)
        _note_sources(engine, reader, report, FrozenSource(str(path.absolute()), manifest_checksum(path), ema), lasting)
        for name, values in _buffers(engine.model, components).items():
            if reader.manifest.buffers.get(name) == tuple(values.shape):
                values.copy_(reader.buffer(name))
    engine.partition.begin_average()
    engine.partition.publish()
    return report


def warm_start_problem(
    manifest: Manifest,
    path: Path,
    model: nn.Module,
    components: Collection[str] | None = None,
    *,
    ema: bool = False,
    upcycle: bool = False,
) -> str | None:
    """Return the reason why ``warm_start`` from an undamaged checkpoint would fail; None if it would not.

    Reads no weights and verifies no file. ``model`` may be on the meta device.

    Raises:
        CheckpointError: the model lacks one of ``components``, or its experts cannot start from the checkpoint's dense
            feed-forwards although ``upcycle`` asks for it.
    """
    if ema and not manifest.ema:
        return f"{path} holds no average of the weights: it was saved without stages.*.ema"
    report = match(model, manifest, components, upcycle=upcycle)
    if report.taken:
        return None
    what = "the model" if components is None else " and ".join(components)
    return f"{path} holds no parameter of {what} in a shape that fits"


def match(
    model: nn.Module, manifest: Manifest, components: Collection[str] | None = None, *, upcycle: bool = False
) -> LoadReport:
    """Return the report that ``warm_start`` would return. Reads no weights.

    Raises:
        CheckpointError: as for ``warm_start_problem``.
    """
    owner = component_of_parameters(model, model.components())  # type: ignore[operator]
    if unknown := set(components or ()) - set(owner.values()):
        raise CheckpointError(f"the model has no component {sorted(unknown)}; it has {sorted(set(owner.values()))}")
    rows = token_tables(model)
    grids = _grids(model)
    found: dict[str, list[Any]] = {name: [] for name in LoadReport.__dataclass_fields__}
    used: set[str] = set()
    experts = {one.name: one for one in upcycled_parameters(model, manifest, components)} if upcycle else {}
    for name, entry in parameter_table(model).items():
        stored = manifest.stored_name(name)
        if name in experts:
            found["upcycled"].append(experts[name])
            used.update(experts[name].sources)
            continue
        if stored is None:
            found["missing"].append(name)
            continue
        used.add(stored)
        here, there = tuple(entry["shape"]), manifest.parameters[stored].shape
        grid, before = grids.get(name), _saved_grid(name, manifest)
        if components is not None and owner[name] not in components:
            found["left"].append(name)
        elif grid is not None and before not in (None, grid):  # Also if both grids have equally many positions.
            same = (*here[:-2], here[-1]) == (*there[:-2], there[-1])
            fits = same and here[-2] - math.prod(grid) == there[-2] - math.prod(before) in (0, 1)
            found["resampled" if fits else "mismatched"].append(Resampled(name, before, grid) if fits else name)
        elif here == there:
            found["loaded"].append(name)
        elif id(model.get_parameter(name)) in rows and here[1:] == there[1:]:
            found["resized"].append(Resized(name, min(here[0], there[0]), there[0], here[0]))
        else:
            found["mismatched"].append(name)
    for name, layer in ((f"{path}.magnitude", layer) for path, layer in adapted_layers(model).items()):
        kept = next((found[key] for key in ("missing", "left") if name in found[key]), None)
        weight = f"{name.rpartition('.')[0]}.weight"
        if layer.magnitude is not None and kept is not None and weight in found["loaded"]:
            kept.remove(name)
            found["derived"].append(name)
    found["unused"] = [name for name in manifest.parameters if name not in used]
    for name, values in _buffers(model, components).items():
        if name not in manifest.buffers:
            found["missing"].append(name)
        elif manifest.buffers[name] != tuple(values.shape):
            found["mismatched"].append(name)
    found["unused"] += [name for name in manifest.buffers if name not in persistent_buffers(model)]
    return LoadReport(**{name: tuple(names) for name, names in found.items()})


def _copy_weights(engine: Engine, reader: CheckpointReader, report: LoadReport, ema: bool) -> None:
    """Fill this rank's ranges of the parameters that the report lists as loaded, resized, resampled or upcycled."""
    loaded = set(report.loaded)
    rows = {table.name: table.taken for table in report.resized}
    # Each rank reads these small tables whole and computes the same values, so no communication is needed.
    resampled = {table.name: _resampled(reader, table, ema) for table in report.resampled}
    experts = {one.name: one for one in report.upcycled}
    layers, derived = adapted_layers(engine.model), set(report.derived)
    for owned in engine.partition.owned(whole=True):
        name, stored = owned.name, reader.manifest.stored_name(owned.name)
        if name in derived:
            path = name.rpartition(".")[0]
            _fill_magnitudes(reader, layers[path], owned, f"{path}.weight", ema, engine.precision.dtype)
        elif name in resampled:
            owned.master.copy_(resampled[name].view(-1)[owned.start : owned.stop])
        elif name in experts:
            fill_upcycled(reader, engine.model, owned, experts[name], ema=ema)
        elif stored is not None and (name in loaded or name in rows):
            stop = owned.stop
            if name in rows:
                stop = min(stop, rows[name] * reader.manifest.parameters[stored].shape[1])
            values = owned.master[: max(0, stop - owned.start)]
            reader.fill(values, stored, reader.weights_kind(stored, ema=ema), owned.start)


def _note_sources(
    engine: Engine, reader: CheckpointReader, report: LoadReport, here: FrozenSource, lasting: bool
) -> None:
    """Update ``engine.frozen_sources`` after a load: the checkpoint that has the value of each loaded parameter.

    It is the one that the loaded checkpoint itself refers to, else the loaded one if it is ``lasting``.
    """
    for name in report.taken:
        engine.frozen_sources.pop(name, None)
    for name in report.loaded:
        source = reader.frozen_sources.get(reader.manifest.stored_name(name) or name, here if lasting else None)
        if source is not None:
            engine.frozen_sources[name] = source


def _fill_magnitudes(
    reader: CheckpointReader, layer: AdaptedLinear, owned: OwnedRange, weight: str, ema: bool, dtype: torch.dtype
) -> None:
    """Set this rank's range of a magnitude to the norms of these rows of the weight, rounded to ``dtype``."""
    stored = reader.manifest.stored_name(weight)
    assert stored is not None
    rows = max(1, _CHUNK_VALUES // layer.in_features)
    for start in range(owned.start, owned.stop, rows):
        stop = min(owned.stop, start + rows)
        values = torch.empty((stop - start) * layer.in_features, dtype=dtype)
        reader.fill(values, stored, reader.weights_kind(stored, ema=ema), start * layer.in_features)
        norms = torch.linalg.norm(values.view(stop - start, -1).float(), dim=1)
        owned.master[start - owned.start : stop - owned.start].copy_(norms)


def _resampled(reader: CheckpointReader, table: Resampled, ema: bool) -> Tensor:
    stored = reader.manifest.stored_name(table.name)
    assert stored is not None
    values = whole_parameter(reader, stored, ema=ema)
    # A tile embedding has one table for each tile position of each tiling, so there may be leading axes.
    tables = values.view(-1, *values.shape[-2:])
    found = torch.stack([resample_positions(one, table.before, table.now) for one in tables])
    return found.view(*values.shape[:-2], *found.shape[1:])


def _grids(model: nn.Module) -> dict[str, _Grid]:
    """Return the patch grid of each position embedding table of the model, by parameter name."""
    return {
        f"{path}.{name}": module.grid
        for path, module in model.named_modules()
        if isinstance(module, LearnedPositions | BucketedPositions | TilePositions)
        for name in ("position_embedding", "tile_embedding")
        if hasattr(module, name)
    }


def _saved_grid(name: str, manifest: Manifest) -> _Grid | None:
    """Return the grid of a saved position table, from the checkpoint's model configuration; None if it has no grid.

    The path of the table is the path of its block in the configuration: ``vision.positions.position_embedding`` has the
    block ``vision.positions``.
    """
    block: Any = manifest.model_config_values
    for key in name.split(".")[:-1]:
        block = block.get(key) if isinstance(block, Mapping) else None
    grid = block.get("grid") if isinstance(block, Mapping) else None
    if isinstance(grid, list) and len(grid) == 2 and all(type(side) is int and side > 0 for side in grid):
        return grid[0], grid[1]
    return None


def _buffers(model: nn.Module, components: Collection[str] | None) -> dict[str, Tensor]:
    """Return the persistent buffers; with ``components`` only those of modules that hold a parameter of one of them."""
    if components is None:
        return persistent_buffers(model)
    owner = component_of_parameters(model, model.components())  # type: ignore[operator]
    paths = {name.rpartition(".")[0] for name, component in owner.items() if component in components}
    return {name: values for name, values in persistent_buffers(model).items() if name.rpartition(".")[0] in paths}


def _display_name(name: str) -> str:
    leaf = name.rpartition(".")[2]
    if leaf not in ADAPTER_PARAMETERS:
        return name
    return f"adapters.{'magnitude' if leaf == 'magnitude' else 'lora'}.{name}"


def _grouped(names: Iterable[str], every: Collection[str]) -> str:
    """Join ``names``. If they include all names of a prefix, list only the prefix: ``decoder.* (37)``."""
    names = set(names)
    others = set(every) - names
    counts: dict[str, int] = {}
    for name in sorted(names):
        steps = name.split(".")
        prefixes = (".".join(steps[:length]) + "." for length in range(1, len(steps)))
        whole = next((p for p in prefixes if not any(other.startswith(p) for other in others)), name)
        counts[whole] = counts.get(whole, 0) + 1
    return ", ".join(f"{prefix}* ({count})" if prefix.endswith(".") else prefix for prefix, count in counts.items())
