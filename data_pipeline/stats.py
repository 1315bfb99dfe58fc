"""What a data set holds, in figures: enough to choose image sizes and the length of a pack.

Everything but token counts comes from the indexes; no image is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.texts import iterate_texts
from data_pipeline.tokenizer import Tokenizer

_QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}

Numbers = npt.NDArray[Any]


def statistics(
    path: str | Path, tokenizer: Tokenizer | None = None, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Figures of one manifest.

    Args:
        path: The manifest.
        tokenizer: Counts the tokens of every text; reads all text, which takes longer.
        progress: Called with the number of shards or texts' samples done since the last call.

    Returns:
        ``samples``, ``shards``, ``bytes``, ``members`` (files by extension), ``images`` (with ``num_per_sample``, and
        quantiles of ``width``, ``height``, ``pixels``, ``aspect_ratio``, ``bytes``), ``text_bytes`` (quantiles over
        samples) and, with a tokenizer, ``text_tokens`` (quantiles over texts, and their sum).

    Raises:
        ManifestError: the manifest or an index is missing, damaged or stale.
        SampleError: with a tokenizer: a text is damaged.
    """
    manifest = Manifest.open(path)
    members: Counter[str] = Counter()
    per_shard: list[tuple[Numbers, ...]] = []
    for number in range(manifest.num_shards):
        index = manifest.open_index(number)
        members.update(_extensions(index))
        per_shard.append(_image_columns(index))
        if progress is not None:
            progress(1)
    columns = [np.concatenate(column) if column else np.zeros(0) for column in zip(*per_shard, strict=True)]
    figures: dict[str, Any] = {
        "samples": manifest.num_samples,
        "shards": manifest.num_shards,
        "bytes": sum(manifest.shard_bytes(number) for number in range(manifest.num_shards)),
        "members": dict(sorted(members.items())),
    }
    if columns:
        counts, text_bytes, width, height, size = columns
        figures["images"] = _images(counts, width, height, size)
        figures["text_bytes"] = quantiles(text_bytes)
    if tokenizer is not None:
        figures["text_tokens"] = _token_figures(manifest, tokenizer, progress)
    return figures


def quantiles(values: Numbers | Sequence[float]) -> dict[str, float]:
    """Count, mean and quantiles; nothing but the count for no values."""
    array = np.asarray(values, np.float64)
    if array.size == 0:
        return {"count": 0}
    found = np.quantile(array, list(_QUANTILES.values()))
    rest = {name: round(float(value), 4) for name, value in zip(_QUANTILES, found, strict=True)}
    return {"count": int(array.size), "mean": round(float(array.mean()), 4), **rest}


def _extensions(index: ShardIndex) -> dict[str, int]:
    counts = np.bincount(index.column("ext"), minlength=len(index.extensions))
    return {ext: int(count) for ext, count in zip(index.extensions, counts, strict=True)}


def _image_columns(index: ShardIndex) -> tuple[Numbers, ...]:
    """Images of each sample, text bytes of each sample; width, height and bytes of each image."""
    kinds = np.array([is_image(ext) for ext in index.extensions], bool)
    chosen = kinds[index.column("ext")] if len(kinds) else np.zeros(0, bool)
    before = np.concatenate([[0], np.cumsum(chosen)])
    counts = np.diff(before[index.column("cu_members")])
    sizes = (index.column(name)[chosen] for name in ("width", "height", "size"))
    return counts, index.column("text_bytes"), *sizes


def _images(counts: Numbers, width: Numbers, height: Numbers, size: Numbers) -> dict[str, Any]:
    good = (width > 0) & (height > 0)
    wide, high = width[good].astype(np.int64), height[good].astype(np.int64)
    numbers, times = np.unique(counts, return_counts=True)
    return {
        "count": int(counts.sum()),
        "damaged_headers": int((~good).sum()),
        "num_per_sample": {str(int(number)): int(count) for number, count in zip(numbers, times, strict=True)},
        "width": quantiles(wide),
        "height": quantiles(high),
        "pixels": quantiles(wide * high),
        "aspect_ratio": quantiles(wide / high),
        "bytes": quantiles(size),
    }


def _token_figures(
    manifest: Manifest, tokenizer: Tokenizer, progress: Callable[[int], None] | None
) -> dict[str, float]:
    lengths: list[int] = []
    for texts in iterate_texts(manifest):
        lengths += (len(tokenizer.encode(text)) for text in texts)
        if progress is not None:
            progress(1)
    return {**quantiles(lengths), "sum": sum(lengths)}
