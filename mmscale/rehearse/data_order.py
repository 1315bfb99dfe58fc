"""Rehearse the order of the data for all ranks of a big run, without decoding an image.

    lanes --rank_lanes--> each rank draws step 0      W ranks
    states of all ranks --JSON, merge--> step 1       fewer ranks
    states of all ranks --JSON, merge--> step 2       1 rank          digests == those of one undisturbed rank

Draws use the loader's own lane sequences for every lane: the identities of the next samples, without reading them.
Packs read text and image sizes from the shards, which takes about a third of a millisecond per document, so a step
packs only some of the lanes.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.config import DataConfig
from data_pipeline.loader.fingerprint import fingerprint, schedule_of
from data_pipeline.loader.lane_packs import LanePacks
from data_pipeline.loader.loader import Loader, num_microbatches, rank_lanes
from data_pipeline.loader.sample_source import OpenDataset
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.lanes import LaneSequence
from data_pipeline.order.state import Drawn, LaneState, LoaderState, StreamPosition
from data_pipeline.shards.manifest import Manifest
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.rehearse.report import Basis, Report

PART = "data order"
_GROUP = 500
"""Lanes whose sequences are in memory at once; a sequence caches up to 4 KiB of each data set."""

States = Mapping[int, LaneState]
Step = dict[int, tuple[tuple[Drawn, ...], LaneState]]
"""For each lane the documents of a step, and the state after it."""
Stepper = Callable[[int, States], Iterator[Step]]
"""Yields the steps of some lanes from a step and their states on, without end."""


@dataclass(frozen=True)
class RehearsedData:
    """Some of what the other parts of a rehearsal need.

    Attributes:
        states: The loader state of each rank of the big run after its first step, as JSON text.
        packs: The documents of each packed lane in each step.
    """

    states: list[str]
    packs: list[dict[int, tuple[Drawn, ...]]]


class DrawnSteps:
    """Steps of a fixed number of draws per lane.

    Attributes:
        fingerprint: Returns the loader's fingerprint after a number of steps.
    """

    def __init__(self, config: DataConfig, spec: MediaSpec, seed: int, draws: int, storage: Storage) -> None:
        tokenizer, faults = load_tokenizer(config.tokenizer), RunFaults.load(config.faults, ())
        manifests = {d.name: Manifest.open(d.manifest, storage) for d in config.datasets if d.manifest is not None}
        prints = {name: manifest.fingerprint for name, manifest in manifests.items()}
        self._datasets = [
            OpenDataset.open(config, dataset, seed, tokenizer, spec, faults, storage) for dataset in config.datasets
        ]
        self._schedule = schedule_of(config, {each.config.name: each.source.num_samples for each in self._datasets})
        self._config, self._draws = config, draws
        self.fingerprint = functools.partial(
            fingerprint, config, spec, seed, prints, tokenizer.fingerprint, self._schedule
        )

    def __call__(self, step: int, states: States) -> Iterator[Step]:
        limits = [each.config.max_epochs for each in self._datasets]
        sequences = {
            lane: LaneSequence(
                [each.source.lane(lane, self._config.lanes) for each in self._datasets], limits, self._schedule, lane
            )
            for lane in states
        }
        positions = {lane: state.position for lane, state in states.items()}
        while True:
            made: Step = {}
            for lane, sequence in sequences.items():
                drawn: list[Drawn] = []
                for _ in range(self._draws):
                    sample, positions[lane] = sequence.draw(positions[lane], step)
                    drawn += [] if sample is None else [sample]
                made[lane] = (tuple(drawn), LaneState(positions[lane]))
            yield made
            step += 1


class PackedSteps:
    """Steps of one pack per lane, by the loader's packer, without pixels."""

    def __init__(self, config: DataConfig, spec: MediaSpec, seed: int) -> None:
        self._config, self._spec, self._seed = config, spec, seed

    def __call__(self, step: int, states: States) -> Iterator[Step]:
        packs = LanePacks(self._config, self._spec, self._seed, step, states, dry_run={})
        try:
            while True:
                made = packs.next_packs()
                after = packs.states()
                yield {lane: (pack.drawn, after[lane]) for lane, pack in made.items()}
        finally:
            packs.close()


def step_digest(documents: Mapping[int, Sequence[Drawn]]) -> str:
    """Return the sha256 of the samples of one global batch: each lane, in order, with its documents."""
    total = hashlib.sha256()
    for lane in sorted(documents):
        total.update(f"{lane}:{[tuple(drawn) for drawn in documents[lane]]}\n".encode())
    return total.hexdigest()


def deal(report: Report, num_lanes: int, world_size: int, micro_lanes: int) -> None:
    """Deal the lanes to the ranks, check that each lane has exactly one rank, and add the remainder rule's figures.

    Raises:
        AssertionError: a lane has no rank or two.
    """
    owners = [0] * num_lanes
    counts = []
    for rank in range(world_size):
        lanes = rank_lanes(num_lanes, rank, world_size)
        counts.append(len(lanes))
        for lane in lanes:
            owners[lane] += 1
    assert set(owners) == {1}, "a lane has no rank or two"
    report.add(PART, "lanes", num_lanes, "lanes")
    report.add(PART, "lanes of a rank, fewest", min(counts), "lanes")
    report.add(PART, "lanes of a rank, most", max(counts), "lanes")
    count = num_microbatches(num_lanes, world_size, micro_lanes)
    dummies = sum(count - -(-held // micro_lanes) for held in counts)
    report.add(PART, "microbatches of every rank and step", count, "microbatches")
    report.add(PART, "dummy packs of a step", dummies, "packs")
    idle = 1 - num_lanes / (world_size * count * micro_lanes)
    report.limit(
        "idle-lanes",
        idle,
        0.1,
        f"data.lanes={num_lanes}: {idle:.0%} of the microbatch rows of {world_size:,} ranks are empty; make data.lanes "
        f"a multiple of ranks x engine.micro_lanes ({world_size * micro_lanes:,})",
    )


def rehearse_order(
    report: Report,
    config: DataConfig,
    spec: MediaSpec,
    seed: int,
    worlds: Sequence[int],
    *,
    micro_lanes: int,
    draws: int,
    packed_lanes: int,
    advance: Callable[[], None],
) -> RehearsedData | None:
    """Rehearse dealing, order, packing and resumes on other numbers of ranks.

    Args:
        report: Gets the figures and findings.
        config: The data block.
        spec: The model's inputs.
        seed: Seed of the run.
        worlds: Number of ranks in each step; the first is that of the big run.
        micro_lanes: ``engine.micro_lanes``.
        draws: Samples that each lane draws in a step, where samples are drawn without packing.
        packed_lanes: Number of lanes that are also packed.
        advance: Called again and again, at least once for every 500 lanes or ranks.

    Returns:
        None if a data set has no manifest, so that its order is not known without reading it, or if there are fewer
        lanes than ranks.
    """
    without = [dataset.name for dataset in config.datasets if dataset.manifest is None]
    if without:
        report.add(
            PART, "not rehearsed", f"{', '.join(without)}: a data set without a manifest is read to know its order"
        )
        return None
    if config.lanes < worlds[0]:
        wanted = worlds[0] * micro_lanes
        report.limit(
            "lanes-below-ranks",
            worlds[0],
            config.lanes,
            f"data.lanes={config.lanes} for {worlds[0]:,} ranks: every rank needs a lane. Set data.lanes={wanted} "
            f"(ranks x engine.micro_lanes) or a multiple; this raises the global batch to {wanted:,} packs. To "
            f"rehearse with this value now, add --lanes {wanted}",
        )
        return None
    deal(report, config.lanes, worlds[0], micro_lanes)
    chosen = sorted({index * config.lanes // packed_lanes for index in range(packed_lanes)})
    with Storage(config.storage, config.cache) as storage:
        drawn = DrawnSteps(config, spec, seed, draws, storage)
        walk = _Walk(report, config, spec, seed, worlds, drawn.fingerprint, advance)
        texts, _ = walk.compare("draws", drawn, range(config.lanes))
    _, packs = walk.compare("packs", PackedSteps(config, spec, seed), chosen)
    report.add(PART, "lanes that were packed", len(chosen), "lanes", Basis.SCALED)
    return RehearsedData(texts, packs)


@dataclass(frozen=True)
class _Walk:
    """Compares the steps of one undisturbed rank with those of many ranks and resumes.

    Attributes:
        report: Gets the figures and findings.
        config: The data block.
        spec: The model's inputs.
        seed: Seed of the run.
        worlds: Number of ranks in each step.
        fingerprint: Returns the loader's fingerprint after a number of steps.
        advance: Called again and again.
    """

    report: Report
    config: DataConfig
    spec: MediaSpec
    seed: int
    worlds: Sequence[int]
    fingerprint: Callable[[int], str]
    advance: Callable[[], None]

    def compare(
        self, what: str, stepper: Stepper, lanes: Sequence[int]
    ) -> tuple[list[str], list[dict[int, tuple[Drawn, ...]]]]:
        """Take one step on each number of ranks, and compare it with that of one rank.

        Returns:
            The states of the ranks after the first step as JSON texts, and the documents of each step.
        """
        basis = Basis.REAL if len(lanes) == self.config.lanes else Basis.SCALED
        start = LaneState(StreamPosition.start(len(self.config.datasets)))
        wanted: list[dict[int, tuple[Drawn, ...]]] = [{} for _ in self.worlds]
        for first in range(0, len(lanes), _GROUP):
            steps = stepper(0, dict.fromkeys(lanes[first : first + _GROUP], start))
            for documents, made in zip(wanted, steps, strict=False):
                documents.update({lane: drawn for lane, (drawn, _) in made.items()})
            self.advance()
        first_texts: list[str] = []
        texts: list[str] = []
        states: States = dict.fromkeys(lanes, start)
        for step, world in enumerate(self.worlds):
            if step:
                states = self.resumed(f"{what}, {self.worlds[step - 1]:,} -> {world:,} ranks", texts, world)
            documents, texts = self._step(stepper, step, states, world)
            first_texts = first_texts or texts
            same = step_digest(documents) == step_digest(wanted[step])
            self.report.add(PART, f"{what} of step {step} on {world:,} ranks equal one rank's", same, "", basis)
            self.report.limit(
                f"order-differs-{what}",
                float(not same),
                0,
                f"step {step}: {world:,} ranks do not read the samples that one rank reads; please report this as a "
                "defect",
            )
        return first_texts, wanted

    def _step(
        self, stepper: Stepper, step: int, states: States, world: int
    ) -> tuple[dict[int, tuple[Drawn, ...]], list[str]]:
        """Take one step rank by rank. Return the documents of all lanes, and each rank's state as JSON text."""
        names = tuple(dataset.name for dataset in self.config.datasets)
        print_after = self.fingerprint(step + 1)
        documents: dict[int, tuple[Drawn, ...]] = {}
        texts: list[str] = []
        for rank in range(world):
            mine = {lane: states[lane] for lane in rank_lanes(self.config.lanes, rank, world) if lane in states}
            if not mine:
                continue
            for lanes in ([*mine][first : first + _GROUP] for first in range(0, len(mine), _GROUP)):
                made = next(stepper(step, {lane: mine[lane] for lane in lanes}))
                documents |= {lane: drawn for lane, (drawn, _) in made.items()}
                mine |= {lane: state for lane, (_, state) in made.items()}
            texts.append(LoaderState(print_after, step + 1, mine, names).to_json())
            if len(texts) % _GROUP == 1:
                self.advance()
        return documents, texts

    def resumed(self, name: str, texts: Sequence[str], world: int) -> States:
        """Parse and merge the states as a resume does, and hand each of ``world`` ranks its lanes."""
        began = time.perf_counter()
        merged = LoaderState.merge([LoaderState.from_json(text) for text in texts])
        self.report.add(PART, f"merge the loader states ({name})", time.perf_counter() - began, "s")
        self.report.add(PART, f"bytes of the loader states ({name})", sum(map(len, texts)), "bytes")
        names = tuple(dataset.name for dataset in self.config.datasets)
        states: dict[int, LaneState] = {}
        if len(merged.lanes) == self.config.lanes:
            whole = self.config.model_copy(update={"workers": 0})
            for rank in {0, world - 1}:  # Opening a loader takes 10 ms; the other ranks make its two checks below.
                Loader(whole, self.spec, seed=self.seed, rank=rank, world_size=world, state=merged).close()
        for rank in range(world):
            mine = [lane for lane in rank_lanes(self.config.lanes, rank, world) if lane in merged.lanes]
            merged.check(self.fingerprint(merged.step) if rank == 0 else merged.fingerprint, mine)
            states |= merged.lane_states(mine, names)
        return states
