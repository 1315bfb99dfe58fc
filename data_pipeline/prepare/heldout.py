"""Set samples of a data set aside for evaluation.

data set --seed--> heldout.jsonl, which training excludes (``data.faults.exclude``)
               \\--> heldout-00000.tar and heldout.manifest, copies of these samples
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.io.atomic import write_whole
from data_pipeline.order.randomness import Permutation
from data_pipeline.prepare.choices import SampleKeys
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.shards.manifest import Manifest


def hold_out(manifest: Path, dataset: str, count: int, folder: Path, *, name: str = "heldout", seed: int = 1) -> Path:
    """Write ``folder/NAME.jsonl`` and ``folder/NAME.manifest`` with ``count`` samples, and return the list.

    Equal manifests and seeds give equal samples.

    Args:
        manifest: The data set.
        dataset: Name of the data set in the run, which the list repeats.
        count: Number of samples to hold out; at least 1, and less than the data set has.
        folder: Folder of the new files; created if missing.
        name: Prefix of the new files.
        seed: Seed of the choice.

    Raises:
        ValueError: ``count`` is out of range.
        DataConfigError: the held-out manifest exists already.
        ManifestError, ShardError: the data set is damaged.
    """
    opened = Manifest.open(manifest)
    if not 0 < count < opened.num_samples:
        raise ValueError(f"count={count}: expected 1 to {opened.num_samples - 1}")
    chosen = np.sort(Permutation(opened.num_samples, seed).values_at(np.arange(count)))
    lines = []
    for index in chosen.tolist():
        shard, row = opened.locate(index)
        lines.append(json.dumps({"dataset": dataset, "index": index, "key": opened.open_index(shard).row(row).key}))
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / f"{name}.jsonl"
    write_whole(listed, "".join(f"{line}\n" for line in lines).encode())
    selection = Selection(keep=(listed,), keys=SampleKeys.ORIGIN)  # Keys may be equal in different shards.
    ingest(ReshardSource([NamedManifest(dataset, manifest)], selection), folder, name)
    return listed
