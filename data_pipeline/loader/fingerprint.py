"""The fingerprint of a data configuration: hashes of everything that decides the samples of the steps so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import exclusions_digest
from data_pipeline.order.lanes import Schedule
from data_pipeline.order.state import fingerprint_of


def schedule_of(config: DataConfig, num_samples: Mapping[str, int]) -> Schedule:
    """Return the weights over steps. ``num_samples``, needed for data sets with ``repeats``, is the size by name."""
    return Schedule.from_changes(
        [dataset.weight_changes(num_samples.get(dataset.name, 0)) for dataset in config.datasets]
    )


def fingerprint(
    config: DataConfig,
    spec: MediaSpec,
    seed: int,
    manifests: Mapping[str, str],
    tokenizer: str,
    schedule: Schedule,
    step: int,
) -> str:
    """Return the fingerprint of everything that decided the samples of the steps before ``step``.

    The number of ranks, workers and prefetched steps has no effect on it. Settings that take effect only from ``step``
    on are left out, so a data set or new weights that start later can be added to a running mixture.

    Args:
        config: The data block.
        spec: The model's inputs: patch counts decide which documents fit into a pack.
        seed: Seed of the run.
        manifests: Fingerprint of the manifest of each data set that has one, by name.
        tokenizer: Fingerprint of the tokenizer.
        schedule: Weights over steps.
        step: Number of steps done.
    """
    phases = [i for i, start in enumerate(schedule.starts) if start < max(step, 1)]
    used = [i for i in range(len(config.datasets)) if any(schedule.weights[phase][i] for phase in phases)]
    datasets = [config.datasets[i] for i in used]
    parts: dict[str, object] = {
        "seed": seed,
        "lanes": config.lanes,
        "order": config.order.model_dump(mode="json"),
        "packing": config.packing.model_dump(mode="json"),
        "tokenizer": tokenizer,
        # Older checkpoints lack ``query_sizes`` and ``code_size``, so their defaults are left out.
        "model.media": repr(spec).replace(", query_sizes=()", "").replace(", code_size=None", ""),
        "datasets": [dataset.name for dataset in datasets],
        "weights": [(schedule.starts[phase], [schedule.weights[phase][i] for i in used]) for phase in phases],
    }
    if config.faults.exclude:
        parts["faults.exclude"] = exclusions_digest(config.faults)
    for dataset in datasets:
        parts |= _dataset_parts(dataset, manifests.get(dataset.name))
    return fingerprint_of(parts)


_LATER_KEYS = frozenset(
    {
        *("max_text_bytes", "pipeline", "stages", "image_tokens", "image_tokens.encoded", "video", "audio"),
        *("image_tokens.video_size", "audio.interleave_seconds"),
        *(f"video.{key}" for key in ("timestamps", "frame_break", "tiling", "tile_size", "scaled", "intro", "outro")),
        *(
            f"{template}.{key}"
            for template in ("template", "template.each")
            for key in (
                *("images", "joined", "system_for", "image_suffix", "audio_prefix", "audio_suffix"),
                *("roles.lead", "roles.prefix_before_image"),
            )
        ),
        *("transforms.layout.tile_row_break", "transforms.layout.overview_break"),
        *("transforms.background", "transforms.min_side", "template.stored_reference"),
    }
)
"""Keys that older checkpoints lack. At their default a fingerprint leaves them out, so that such checkpoints resume."""

_ORIGINAL_NAMES = {"crop_start": "view_start", "crop_end": "view_end"}
"""Original names of renamed keys. A fingerprint uses the original names, so that older checkpoints resume."""


def _original_dump(config: StrictConfig, dumped: dict[str, Any], block: str = "") -> dict[str, Any]:
    """Return ``dumped`` with the original key names, and without ``_LATER_KEYS`` that have their default.

    Args:
        config: The block.
        dumped: Its JSON values.
        block: Path of the block with a trailing dot; empty for the data set itself.
    """
    original: dict[str, Any] = {}
    for name, value in dumped.items():
        own = getattr(config, name)
        if block + name in _LATER_KEYS and own == type(config).model_fields[name].default:
            continue
        if name == "padding_of":
            value = value.replace("crop", "view")
        inner = f"{block}{name}."
        if isinstance(own, StrictConfig):
            value = _original_dump(own, value, inner)
        elif isinstance(own, dict):
            value = {
                key: _original_dump(own[key], item, inner) if isinstance(own[key], StrictConfig) else item
                for key, item in value.items()
            }
        original[_ORIGINAL_NAMES.get(name, name)] = value
    return original


def _dataset_parts(dataset: DatasetConfig, manifest: str | None) -> dict[str, object]:
    """Return the manifest's hash and the configuration of a data set, without its name, weights and manifest path."""
    dumped = dataset.model_dump(mode="json", exclude={"name", "weight", "repeats", "manifest"})
    dumped = _original_dump(dataset, dumped)
    return {f"{dataset.name}.manifest": manifest, **{f"{dataset.name}.{key}": value for key, value in dumped.items()}}
