"""Unused room and cost imbalance of packs, by strategy: ``python -m benchmarks.packing --json``.

Three streams of documents fill the packs of 16 lanes. *Emoji*: the bundled shards as the quickstart reads them, a name
and a few features per image. *Long tail*: text of log-normal length; half of the documents have an image of 64 to 1600
patches, also log-normal. *Clips*: a third each of videos of 2 to 256 frames and 64 to 576 patches a frame, of sounds of
1 to 600 seconds, and of text; all log-normal, so that the patches of a document vary a thousandfold.

Unused room is 1 minus the mean fill of the budget that is reached first: the padding if packs were padded. Imbalance is
the largest cost of a step's packs over their mean, averaged over the steps: the time of a step relative to balanced
lanes. Peers: greedy packing, which closes a pack at the first document that does not fit, and the same strategy
with a token budget only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.report import Case, main
from data_pipeline.document import Document, ImageExtent, MediaItem
from data_pipeline.media_spec import AudioSpec, MediaSpec, Placement
from data_pipeline.order.state import Drawn, StreamPosition
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.draft import Draft
from data_pipeline.packing.packer import Budget, DrawnDocument, Packer
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Provenance
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.config import load
from mmscale.run.config import RunConfig

LANES, STEPS = 16, 60
QUICKSTART = Path("configs/quickstart.yaml")
SPEC = MediaSpec(Placement.EMBEDDING, patch_size=1, merge=2, cost_per_patch=0.35)
CLIPS_SPEC = replace(
    SPEC,
    audio=AudioSpec(padded=False, extra_frames=2, reductions=((3, 1, 1), (3, 2, 1), (2, 2, 0)), cost_per_frame=0.04),
)
"""The audio of Qwen2-Audio: 25 features a second, and about the cost of Whisper's encoder relative to a 7B decoder."""
CLIPS = {"max_tokens": 16384, "max_cost": 22528}
"""Budgets in which the longest documents fit."""

Draw = Callable[[int, int], Document]
"""Returns the document of a lane and number."""


class Workload(NamedTuple):
    """A stream of documents and the budgets of its packs."""

    name: str
    draw: Draw
    spec: MediaSpec
    max_tokens: int
    max_cost: float


def long_tail(lane: int, number: int) -> Document:
    """Return a document: text of log-normal length, after an image of log-normal size in half of the documents."""
    rng = np.random.default_rng((lane, number))
    length = int(np.clip(rng.lognormal(5.2, 1.0), 8, 4096))
    items: tuple[MediaItem, ...] = ()
    if rng.random() < 0.5:
        side = 2 * int(np.clip(rng.lognormal(2.3, 0.5), 4, 20))
        values = np.broadcast_to(np.uint8(0), (side * side, SPEC.patch_dim))
        items = (MediaItem(values, (1, side, side), embedded=True),)
    features = sum(item.num_features(SPEC) for item in items)
    ids = np.broadcast_to(np.int32(1), (length + features,))
    weights = np.broadcast_to(np.float32(1), ids.shape)
    dest = np.arange(features, dtype=np.int32)
    origin = Provenance("long tail", str(lane), str(number), number)
    return Document(ids, ids, weights, ids, items, dest, (), origin, images=(ImageExtent(0, 0, features),) * len(items))


def clips(lane: int, number: int) -> Document:
    """Return a document: text after a video or a sound of log-normal length, or text alone."""
    rng, draft = np.random.default_rng((lane, number)), Draft(CLIPS_SPEC)
    kind, audio = int(rng.integers(3)), CLIPS_SPEC.modalities["audio"]
    if kind == 0:
        side = 2 * int(np.clip(rng.lognormal(2.0, 0.4), 4, 12))
        frames = int(np.clip(rng.lognormal(2.3, 1.2), 1, min(128, 20000 // side**2)))  # Pairs of frames.
        values = np.broadcast_to(np.uint8(0), (frames * side * side, CLIPS_SPEC.patch_dim))
        draft.add_image((MediaItem(values, (frames, side, side), embedded=True),), 1, None)
    elif kind == 1:
        left, chunks = int(100 * np.clip(rng.lognormal(2.3, 1.2), 1, 600)), list[MediaItem]()
        while left > 0:
            rows = min(left, 3000) + 2
            values = np.broadcast_to(np.float32(0), (max(rows, audio.minimal_grid[0]), audio.patch_dim))
            chunks.append(MediaItem(values, (len(values), 1, 1), embedded=True, modality="audio"))
            left -= 3000
        draft.add_clip(chunks, 1)
    draft.add_tokens([1] * int(np.clip(rng.lognormal(4.2, 1.0), 8, 4096)), 1.0)
    return draft.finish(Provenance("clips", str(lane), str(number), number))


def emoji() -> Workload:
    """Return the quickstart's documents, shuffled and without decoded images."""
    config = load(QUICKSTART, [], RunConfig).value
    dataset, spec = config.data.datasets[0], config.media_spec
    reader = SampleReader(Manifest.open(dataset.indexed), dataset.name)
    build = DocumentBuilder(dataset, load_tokenizer(config.data.tokenizer), spec)
    size = reader.manifest.num_samples
    order = np.random.default_rng(0).permutation(size)
    documents: dict[int, Document] = {}

    def draw(lane: int, number: int) -> Document:
        sample = int(order[(number * LANES + lane) % size])
        if sample not in documents:
            documents[sample] = build.dry_run(reader.read(sample, 0), np.random.default_rng(sample))
        return documents[sample]

    return Workload("emoji", draw, spec, max_tokens=1024, max_cost=2048)


class _Source:
    """Documents of a lane as ``packing.Source``."""

    def __init__(self, draw: Draw, lane: int) -> None:
        self._draw, self._lane, self._number = draw, lane, 0

    @property
    def position(self) -> StreamPosition:
        return StreamPosition.start(1)

    def make(self) -> list[DrawnDocument]:
        self._number += 1
        drawn = Drawn(0, 0, self._number)
        return [DrawnDocument(drawn, self.remake(drawn))]

    def remake(self, drawn: Drawn) -> Document:
        return self._draw(self._lane, drawn.sample)


class PackingStats(NamedTuple):
    """Means over packs and steps, and the largest share of a budget that any pack uses."""

    unused: float
    imbalance: float
    fullest: float


def pack(load: Workload, steps: int, with_cost: bool, **packing: object) -> PackingStats:
    """Pack ``steps`` steps of all lanes and return the means."""
    limits = {"max_tokens": load.max_tokens, "max_cost": load.max_cost if with_cost else None}
    config = PackingConfig.model_validate({**limits, **packing})
    budget = Budget(config, load.spec, dummy_document(load.spec, 0))
    packers = [Packer(_Source(load.draw, lane), budget, lane) for lane in range(LANES)]
    found = np.array(list(_steps(packers, config, load.spec, steps)))
    unused, imbalance = found[:, :2].mean(0).tolist()
    return PackingStats(unused, imbalance, float(found[:, 2].max()))


def _steps(
    packers: list[Packer], config: PackingConfig, spec: MediaSpec, steps: int
) -> Iterator[tuple[float, float, float]]:
    for _ in range(steps):
        packs = [packer.next_pack().documents for packer in packers]
        tokens = np.array([sum(document.num_tokens for document in documents) for documents in packs])
        costs = np.array([sum(document.cost(spec) for document in documents) for documents in packs])
        full = tokens / config.max_tokens
        if config.max_cost is not None:
            full = np.maximum(full, costs / config.max_cost)
        yield 1 - float(full.mean()), float(costs.max() / costs.mean()), float(full.max())


STRATEGIES: dict[str, dict[str, object]] = {
    "greedy": {"strategy": "greedy"},
    "first_fit of 32": {"strategy": "first_fit", "look_ahead": 32},
    "best_fit of 32": {"strategy": "best_fit", "look_ahead": 32},
}


def measure(steps: int = STEPS) -> list[Case]:
    """Return all workloads, all strategies, with and without a cost budget."""
    cases = []
    for work in (
        emoji(),
        Workload("long tail", long_tail, SPEC, max_tokens=8192, max_cost=9216),
        Workload("clips", clips, CLIPS_SPEC, **CLIPS),
    ):
        found = {
            (name, with_cost): pack(work, steps, with_cost, **packing)
            for name, packing in STRATEGIES.items()
            for with_cost in (False, True)
        }
        for name in STRATEGIES:
            ours, tokens_only = found[name, True], found[name, False]
            greedy = found["greedy", True]
            cases += [
                Case(f"{work.name}, {name}: unused room", ours.unused, {"greedy": greedy.unused}, "of the budget"),
                Case(
                    f"{work.name}, {name}: cost imbalance",
                    ours.imbalance,
                    {"tokens only": tokens_only.imbalance},
                    "max over mean",
                ),
            ]
    return cases


if __name__ == "__main__":
    main("packing", measure)
