"""Steps of a loader again, without pixels: which documents each pack holds, from a state on.

    state --the loader's own stream and packer, documents measured instead of decoded--> packs' places, step by step

Text is read from the shards, since only the tokenizer knows how long it is; sizes of images come from the index. What
only decoding finds out, a damaged image, must be told (``skipped``): the ledger lists it. For: steps that no ledger
holds yet, and tests of the ledger. Not for: steps that it holds (``sample_log`` reads them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.io.strict import LARGEST_INT
from data_pipeline.loader.lane_packs import LanePacks
from data_pipeline.loader.loader import Loader
from data_pipeline.loader.sample_source import Skips
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Action, FaultConfig, Skipped
from data_pipeline.order.state import Drawn, LaneState, LoaderState, StreamPosition
from data_pipeline.packing.packer import Pack


class Replay:
    """The packs of some lanes, step after step.

    Args:
        config: The data block.
        spec: What the model takes.
        seed: Seed of the run.
        state: Where to begin; None at the first step.
        lanes: Lanes to play; None for all. Lanes do not depend on one another.
        skipped: What the run left out of these steps.
        give_up: Give up on bad samples where the run would, as far as they show without decoding. For replays from the
            first step: what a run met before ``state`` is not known here.

    Raises:
        StateError: ``state`` belongs to other data or another order.
        DataPipelineError: as ``Loader``.
    """

    def __init__(
        self,
        config: DataConfig,
        spec: MediaSpec,
        seed: int,
        state: LoaderState | None = None,
        lanes: Collection[int] | None = None,
        skipped: Skips | None = None,
        give_up: bool = False,
    ) -> None:
        Loader(config.model_copy(update={"workers": 0}), spec, seed=seed, state=state).close()  # Its checks.
        faults = config.faults
        if not give_up:
            # How often a run gives up depends on what it met before; here every fault is left out, wherever it comes.
            faults = FaultConfig(on_error=Action.SKIP, max_consecutive=LARGEST_INT, max_share=1, exclude=faults.exclude)
            config = config.model_copy(update={"faults": faults})
        names = [dataset.name for dataset in config.datasets]
        played = sorted(range(config.lanes) if lanes is None else lanes)
        fresh = LaneState(StreamPosition.start(len(names)))
        states = dict.fromkeys(played, fresh) if state is None else state.lane_states(played, names)
        unfaulted = {lane: each._replace(faults=()) for lane, each in states.items()}
        first = 0 if state is None else state.step
        self._lanes = LanePacks(config, spec, seed, first, unfaulted, measured=skipped or {})

    @property
    def step(self) -> int:
        """Steps done, as ``LoaderState.step`` counts them."""
        return self._lanes.step

    def __iter__(self) -> Iterator[dict[int, tuple[Drawn, ...]]]:
        """For each step, of each lane the places of its documents; endless.

        Raises:
            ShardError, ManifestError: a shard is missing or damaged, so nobody can say how long its documents are.
        """
        while True:
            yield self.next_step()

    def next_step(self) -> dict[int, tuple[Drawn, ...]]:
        """Of each lane the places of the documents of the next step.

        Raises:
            As iterating.
        """
        return {lane: pack.drawn for lane, pack in self.next_packs().items()}

    def next_packs(self) -> dict[int, Pack]:
        """Of each lane the pack of the next step, without pixels.

        Raises:
            As iterating; with ``give_up`` also TooManyFaultsError.
        """
        return self._lanes.next_packs()

    def take_skipped(self) -> tuple[Skipped, ...]:
        """Samples that were left out since the last call, as far as that shows without decoding."""
        return self._lanes.take_skipped()

    @property
    def exhausted(self) -> bool:
        """Whether no lane has anything left."""
        return self._lanes.exhausted

    def document(self, drawn: Drawn) -> Document:
        """A document as it was packed, without pixels.

        Raises:
            SampleError: its sample does not give it.
            ShardError, ManifestError, StorageError: its shard is missing, stale or damaged.
        """
        document, skipped = self._lanes.remake(drawn)
        if document is None:
            raise SampleError(skipped[0].reason if skipped else f"it has no part {drawn.part} any more")
        return document
