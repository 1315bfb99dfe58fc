"""The fingerprint of a data configuration: a hash of everything that decides which sample is where before a step."""

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
    """Weights over steps; ``num_samples`` of data sets with a manifest turn ``repeats`` into weights."""
    return Schedule.of([dataset.weight_changes(num_samples.get(dataset.name, 0)) for dataset in config.datasets])


def fingerprint(
    config: DataConfig,
    spec: MediaSpec,
    seed: int,
    manifests: Mapping[str, str],
    tokenizer: str,
    schedule: Schedule,
    step: int,
) -> str:
    """Hash of everything that decided which sample sits where before ``step``.

    Ranks, workers and prefetch are not in it; nor is what has its first effect later: a data set that is drawn from
    ``step`` on, or weights that change then, may be added to a running mixture.

    Args:
        config: The data block.
        spec: The model's side: patch counts decide what fits into a pack.
        seed: Seed of the run.
        manifests: Fingerprint of the manifest of each data set that has one; of others the shards' names count.
        tokenizer: Fingerprint of the tokenizer.
        schedule: Weights over steps.
        step: Steps done.
    """
    phases = [i for i, start in enumerate(schedule.starts) if start < max(step, 1)]
    kept = [i for i in range(len(config.datasets)) if any(schedule.weights[phase][i] for phase in phases)]
    drawn = [config.datasets[i] for i in kept]
    parts: dict[str, object] = {
        "seed": seed,
        "lanes": config.lanes,
        "order": config.order.model_dump(mode="json"),
        "packing": config.packing.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "model.media": repr(spec),
        "datasets": [dataset.name for dataset in drawn],
        "weights": [(schedule.starts[phase], [schedule.weights[phase][i] for i in kept]) for phase in phases],
    }
    if config.faults.exclude:
        parts["faults.exclude"] = exclusions_digest(config.faults)
    for dataset in drawn:
        parts |= _dataset_parts(dataset, manifests.get(dataset.name))
    return fingerprint_of(parts)


_LATER_KEYS = frozenset({"max_text_bytes", "pipeline", "stages", "template.images", "template.each.images"})
"""Keys of a data set that the first checkpoints lack. At their default they leave a fingerprint as it was."""


def _without_later_defaults(config: StrictConfig, dumped: dict[str, Any], block: str = "") -> dict[str, Any]:
    """Return ``dumped`` without those ``_LATER_KEYS`` that have their default; ``block`` is its path and a dot."""
    kept: dict[str, Any] = {}
    for name, value in dumped.items():
        own = getattr(config, name)
        if block + name in _LATER_KEYS and own == type(config).model_fields[name].default:
            continue
        kept[name] = _without_later_defaults(own, value, f"{block}{name}.") if isinstance(own, StrictConfig) else value
    return kept


def _dataset_parts(dataset: DatasetConfig, manifest: str | None) -> dict[str, object]:
    """Whatever a data set's configuration says, but for its name, its weight and where it lies."""
    dumped = _without_later_defaults(
        dataset, dataset.model_dump(mode="json", exclude={"name", "weight", "repeats", "manifest"})
    )
    return {f"{dataset.name}.manifest": manifest, **{f"{dataset.name}.{key}": value for key, value in dumped.items()}}
