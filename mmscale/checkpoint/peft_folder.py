"""Exchange adapters with Hugging Face's ``peft``.

    checkpoint with adapters  --export_adapters-->  FOLDER/adapter_config.json, adapter_model.safetensors
    such a folder, and a checkpoint of its base  --import_adapters-->  a checkpoint that names the base

The family's name rules (``mmscale/hf/layouts``) translate the names of layers. A layer that its family stores in
another shape, for example queries, keys and values in one matrix, has no counterpart there and cannot be exchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.io.strict import first_fault
from data_pipeline.io.untrusted import UntrustedError, open_regular
from mmscale.checkpoint.imports.write import (
    IMPORTED,
    first,
    manifest_of_weights,
    new_share,
    precision_of,
    write_checkpoint,
)
from mmscale.checkpoint.manifest import BaseEntry, manifest_checksum, model_config_of, require_bases
from mmscale.checkpoint.reshard import CheckpointReader, verify, whole_parameter
from mmscale.checkpoint.share import TensorPiece
from mmscale.engine.engine import FrozenSource
from mmscale.errors import CheckpointError
from mmscale.hf.layout import FamilyLayout, HfTensor
from mmscale.hf.layouts import layout_for, layout_of
from mmscale.hf.read import read_config, read_json_object
from mmscale.hf.tensor_file import file_header
from mmscale.hf.write import require_new
from mmscale.io.files import new_folder, write_file
from mmscale.models.adapters import AdaptersConfig, TargetsConfig, expert_paths, linear_layers
from mmscale.models.build import build_weights
from mmscale.models.config import ModelConfig
from mmscale.nn.adapters import adapted_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MOST_JSON_BYTES = 16 << 20
_PREFIX = "base_model.model."
_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Our name of a parameter of an adapter -> theirs."""
_WITHOUT_EFFECT = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights"),  # Read below.
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # The tensors tell the layers.
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config", "ensure_weight_tying"),
}
"""Keys of ``adapter_config.json`` that may have any value. All others must be empty, false or null."""
_INITIAL_VALUES = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the weights of the base as they are."""


@dataclass(frozen=True)
class AdapterExport:
    """Result of ``export_adapters``.

    Attributes:
        folder: Folder that was written.
        checkpoint: Checkpoint that was read.
        family: ``model_type`` of the base model.
        layers: Number of layers with an adapter.
        parameters: Number of values.
    """

    folder: str
    checkpoint: str
    family: str
    layers: int
    parameters: int


@dataclass(frozen=True)
class AdapterImport:
    """Result of ``import_adapters``.

    Attributes:
        checkpoint: Folder that was written.
        source: Folder that was read.
        base: Checkpoint that holds the frozen weights.
        family: ``model_type`` of the base model.
        layers: Number of layers with an adapter.
        parameters: Number of values.
        adapters: The ``model.adapters`` block of a run.
    """

    checkpoint: str
    source: str
    base: str
    family: str
    layers: int
    parameters: int
    adapters: dict[str, Any]


def export_adapters(
    checkpoint: Path,
    folder: Path,
    *,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
    like: Path | None = None,
) -> AdapterExport:
    """Write the adapters of a checkpoint into the new folder ``folder``, atomically.

    Args:
        checkpoint: Checkpoint folder. Every byte is verified first.
        folder: Path that must not exist.
        ema: Export the exponential moving averages of the adapters instead of their weights.
        dtype: Number format in the folder.
        like: The Hugging Face folder of the base model. It gives the family and ``base_model_name_or_path``. None: the
            first family that can express the model, and no path.

    Raises:
        CheckpointError: the checkpoint is damaged, or has no adapters or no averages; an adapter has no counterpart in
            the family; or ``folder`` exists or cannot be written.
    """
    require_new(folder)
    require_bases(checkpoint)
    if problems := verify(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged and was not exported: {'; '.join(problems)}")
    with CheckpointReader(checkpoint) as reader:
        config = model_config_of(reader.manifest, checkpoint)
        if not isinstance(config, ModelConfig) or config.adapters is None:
            raise CheckpointError(f"{checkpoint}: its model has no adapters; export the whole model with --to hf")
        if ema and not reader.manifest.ema:
            raise CheckpointError(f"{checkpoint} holds no average of the weights: it was saved without stages.*.ema")
        base = config.model_copy(update={"adapters": None})
        layout = layout_for(base) if like is None else layout_of(read_config(like)["model_type"])
        names = exchanged_layers(layout, base, adapted_layers(build_weights(config)))
        tensors: dict[str, Tensor] = {}
        for path, theirs in names.items():
            for mine, other in _NAMES.items():
                if (name := f"{path}.{mine}") in reader.manifest.parameters:
                    values = whole_parameter(reader, name, ema=ema)
                    tensors[f"{_PREFIX}{layout.module_name(theirs)}.{other}"] = values.to(dtype)
    written = _peft_config(config.adapters, [layout.module_name(theirs) for theirs in names.values()])
    written["base_model_name_or_path"] = None if like is None else str(like)
    written["task_type"] = "CAUSAL_LM" if config.predicts_tokens else None
    _write(folder, written, tensors)
    total = sum(tensor.numel() for tensor in tensors.values())
    return AdapterExport(str(folder), str(checkpoint), layout.model_type, len(names), total)


def _peft_config(adapters: AdaptersConfig, modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_dora": adapters.kind == "dora",
        "use_rslora": False,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _write(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    def content() -> Iterator[memoryview]:
        entries = ((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        yield memoryview(file_header(entries, {"format": "pt"}))
        for tensor in tensors.values():
            yield tensor.contiguous().view(torch.uint8).numpy().data

    try:
        with new_folder(folder) as partial:
            write_file(partial / WEIGHTS, content())
            write_file(partial / CONFIG, [memoryview((json.dumps(values, indent=2) + "\n").encode())])
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error


def exchanged_layers(layout: FamilyLayout, config: ModelConfig, paths: Iterable[str]) -> dict[str, str]:
    """Return the layers of a Hugging Face model by the paths of ours: names of tensors without ``.weight``.

    Raises:
        CheckpointError: a layer is stored in another shape there.
    """
    stored = _tensors_of(layout, config)
    found, unmapped = {}, []
    for path in paths:
        tensor = stored[f"{path}.weight"]
        if _is_plain(tensor):
            found[path] = tensor.name.removesuffix(".weight")
        else:
            unmapped.append(f"{path} (in {tensor.name})")
    if unmapped:
        raise CheckpointError(
            f"{layout.model_type} stores these layers in another shape or fused with others, so their adapters have no "
            f"counterpart: {first(unmapped)}; leave them out of model.adapters.targets, or merge the adapters (--to hf)"
        )
    return found


def _tensors_of(layout: FamilyLayout, config: ModelConfig) -> dict[str, HfTensor]:
    """Return the tensor of the Hugging Face folder that holds each of our parameters."""
    shapes = {name: parameter.shape for name, parameter in build_weights(config).named_parameters()}
    return {part.name: tensor for tensor in layout.hf_tensors(config, shapes).values() for part in tensor.parts}


def _is_plain(tensor: HfTensor) -> bool:
    part = tensor.parts[0]
    is_copy = part.block is None and part.axes is None and not part.zeros and part.name.endswith(".weight")
    return len(tensor.parts) == 1 and is_copy and tensor.shape == part.shape and tensor.name.endswith(".weight")


def import_adapters(source: Path, base: Path, directory: Path) -> AdapterImport:
    """Write ``directory/step-00000000``: a checkpoint of the base model with the adapters of a folder of ``peft``.

    The checkpoint stores the adapters, and names ``base`` for all other weights.

    Args:
        source: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: Checkpoint folder of the model that the adapters belong to.
        directory: ``checkpoints`` folder of a run.

    Raises:
        CheckpointError: the folder is damaged, needs a feature that our adapters lack, or does not fit the base; or
            ``step-00000000`` already exists or cannot be written.
    """
    values = _read_config(source)
    with CheckpointReader(base) as reader:
        config = model_config_of(reader.manifest, base)
        if not isinstance(config, ModelConfig) or config.adapters is not None:
            raise CheckpointError(f"{base}: expected a model without adapters; merge them first (checkpoint export)")
        layout = layout_for(config)
        tensors = _our_names(source, layout, config)
        adapters = _adapters_config(source, values, config, tensors)
        whole = config.model_copy(update={"adapters": adapters})
        model = build_weights(whole)
        _check_tensors(source, {path: model.get_parameter(path) for path in _adapter_names(model)}, tensors)
        pieces = [TensorPiece(f"{name}|frozen", 0, tensor) for name, tensor in tensors.items()]
        precision = precision_of(pieces)
        pieces += [TensorPiece(f"{name}|buffer", 0, reader.buffer(name), True) for name in reader.manifest.buffers]
        manifest = manifest_of_weights(model, precision, IMPORTED, {"imported": str(source)})
        names = [name for name in manifest.parameters if name not in tensors]
        here = FrozenSource(str(base.absolute()), manifest_checksum(base), ema=False)
        groups: dict[FrozenSource, list[str]] = {}
        for name in names:
            groups.setdefault(reader.frozen_sources.get(name, here), []).append(name)
        entries = tuple(
            BaseEntry(path=each.path, checksum=each.checksum, ema=each.ema, parameters=tuple(listed))
            for each, listed in groups.items()
        )
        manifest = manifest.model_copy(update={"bases": entries, "buffers": reader.manifest.buffers})
        path = write_checkpoint(directory, manifest, iter([new_share(0, pieces, source)]))
    return AdapterImport(
        checkpoint=str(path),
        source=str(source),
        base=str(base),
        family=layout.model_type,
        layers=len({name.rpartition(".")[0] for name in tensors}),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        adapters=adapters.model_dump(mode="json"),
    )


def _read_config(source: Path) -> dict[str, Any]:
    """Return the values of ``adapter_config.json``.

    Raises:
        CheckpointError: the file is missing or damaged, or describes a computation that our adapters lack.
    """
    file = source / CONFIG
    values = read_json_object(file, "give a folder that peft has saved", _MOST_JSON_BYTES)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type={values.get('peft_type')!r} is not supported, only 'LORA'")
    if values.get("init_lora_weights") not in _INITIAL_VALUES:
        raise CheckpointError(
            f"{file}: init_lora_weights={values['init_lora_weights']!r} changes the weights of the base, which the "
            "folder does not hold; convert it to plain LoRA with peft first"
        )
    unsupported = [key for key, value in values.items() if key not in _WITHOUT_EFFECT and value not in _empty(key)]
    if unsupported:
        raise CheckpointError(f"{file}: not supported: {first([f'{key}={values[key]!r}' for key in unsupported])}")
    return values


def _empty(key: str) -> tuple[Any, ...]:
    return (None, False, {}, [], *(("none",) if key == "bias" else ()), *(("megatron.core",) * ("megatron" in key)))


def _our_names(source: Path, layout: FamilyLayout, config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a folder by the names of our parameters. They are views of the mapped file.

    Raises:
        CheckpointError: the file is missing or damaged, or a name is not that of an adapter of a layer of the model.
    """
    file = source / WEIGHTS
    try:
        open_regular(file).close()  # Reject a FIFO first: safe_open would block on it.
        opened = safe_open(file, "pt")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, UntrustedError, OSError) as error:
        pickled = " Pickled weights are not read: save them again as safetensors." * any(source.glob("*.bin"))
        raise CheckpointError(f"{file} is missing or damaged: {error}.{pickled}") from error
    owners: dict[str, list[str]] = {}
    stored = _tensors_of(layout, config)
    for name, tensor in stored.items():
        owners.setdefault(tensor.name, []).append(name)
    found = {}
    for name, values in tensors.items():
        path, mine = _split(name)
        theirs = layout.current_name(f"{path}.weight")
        names = owners.get(theirs, [])
        if mine is None or not names:
            raise CheckpointError(f"{file}: {name} is not an adapter of a layer of {layout.model_type}")
        if len(names) != 1 or not _is_plain(stored[names[0]]) or not names[0].startswith(_COMPONENTS):
            raise CheckpointError(f"{file}: {name}: our model stores {theirs} in another way ({first(names)})")
        found[f"{names[0].removesuffix('.weight')}.{mine}"] = values
    return found


_COMPONENTS = (*(f"{name}." for name in TargetsConfig.model_fields if name != "decoder"), "decoder.layers.")


def _split(name: str) -> tuple[str, str | None]:
    """Return the path of a layer in their model, and our name of the adapter's parameter; None for another tensor."""
    short = name.removeprefix(_PREFIX)
    for mine, theirs in _NAMES.items():
        for ending in (f".{theirs}", f".{theirs}.weight"):
            if short.endswith(ending):
                return short.removesuffix(ending), mine
    return short, None


def _adapters_config(
    source: Path, values: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, Tensor]
) -> AdaptersConfig:
    """Return the ``adapters`` block of a model with these tensors.

    Raises:
        CheckpointError: a value has the wrong type or range.
    """
    paths = {name.rpartition(".")[0] for name in tensors}
    model = build_weights(config)
    targets: dict[str, Any] = {"decoder": []}
    for component in TargetsConfig.model_fields:
        part = getattr(model, component, None) or torch.nn.Module()
        layers = [f"{component}.{path}" for path in linear_layers(part)]
        if mine := [path for path in layers if path in paths]:
            others = [*layers, *(f"{component}.{path}" for path in expert_paths(part))]
            targets[component] = "all" if len(mine) == len(layers) else _short_names(component, mine, others)
    try:
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        block = {
            "kind": "dora" if values.get("use_dora") else "lora",
            "rank": rank,
            "alpha": alpha * math.sqrt(rank) if values.get("use_rslora") else alpha,
            "dropout": 0.0 if targets.keys() - {"decoder"} else float(values.get("lora_dropout") or 0.0),
            "targets": targets,
        }
        return AdaptersConfig.model_validate(block)
    except ValidationError as error:
        raise CheckpointError(f"{source / CONFIG}: {first_fault(error)}") from error
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source / CONFIG}: r or lora_alpha is missing or no number: {error!r}") from error


def _short_names(component: str, paths: list[str], layers: list[str]) -> list[str]:
    """Return names that select exactly ``paths``: the last part of a path if all layers with it are selected.

    Args:
        component: First part of all paths.
        paths: The layers with adapters.
        layers: All layers of the component, and its routed experts.
    """
    names: dict[str, None] = {}
    for path in paths:
        leaf = path.rpartition(".")[2]
        alike = [layer for layer in layers if layer.endswith(f".{leaf}")]
        names[leaf if set(alike) <= set(paths) else path.removeprefix(f"{component}.")] = None
    return list(names)


def _adapter_names(model: torch.nn.Module) -> list[str]:
    return [
        f"{path}.{name}"
        for path, layer in adapted_layers(model).items()
        for name in _NAMES
        if getattr(layer, name) is not None
    ]


def _check_tensors(source: Path, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: they differ.
    """
    file = source / WEIGHTS
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} does not fit use_dora in {CONFIG}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(values.shape)}"
        for name, values in wanted.items()
        if name in tensors and tensors[name].shape != values.shape
    ]
    if wrong:
        raise CheckpointError(f"{file}: {first(wrong, '; ')}")
