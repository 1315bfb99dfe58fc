"""Replay of a loader's steps without pixels: the samples of each pack, from a state on.

    state --streams and packers of the loader, dry run instead of decoding--> the samples of each pack, step by step

A replay reads text from the shards, because packing needs its number of tokens, and image sizes from the index. It
cannot find damaged images: pass the samples that a sample log lists as skipped (``skipped``). For: steps that no sample
log contains yet, and tests of the sample log. Not for: logged steps (``sample_log``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.io.strict import LARGEST_INT
from data_pipeline.loader.lane_packs import LanePacks
from data_pipeline.loader.loader import Loader
from data_pipeline.loader.sample_source import SkipReasons
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Action, FaultConfig, Skipped
from data_pipeline.order.state import Drawn, LaneState, LoaderState, StreamPosition
from data_pipeline.packing.packer import Pack


class Replay:
    """The packs of some lanes, step by step, without pixels.

    Args:
        config: The data block.
        spec: The model's inputs.
        seed: Seed of the run.
        state: The state to start from; None: the first step.
        lanes: Lanes to replay; None for all. Lanes do not depend on each other.
        skipped: Samples that the run skipped in these steps, with the reason.
        give_up: Apply the run's fault policy with its limits, as far as faults are found without decoding. Use it only
            without ``state``: fault counters of a state are ignored. False skips every bad sample.

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
        skipped: SkipReasons | None = None,
        give_up: bool = False,
    ) -> None:
        # Check the configuration and the state.
        Loader(config.model_copy(update={"workers": 0}), spec, seed=seed, state=state).close()
        faults = config.faults
        if not give_up:
            # The limits depend on faults of earlier steps, which a replay does not know, so skip every bad sample.
            faults = FaultConfig(on_error=Action.SKIP, max_consecutive=LARGEST_INT, max_share=1, exclude=faults.exclude)
            config = config.model_copy(update={"faults": faults})
        names = [dataset.name for dataset in config.datasets]
        replayed = sorted(range(config.lanes) if lanes is None else lanes)
        start = LaneState(StreamPosition.start(len(names)))
        states = dict.fromkeys(replayed, start) if state is None else state.lane_states(replayed, names)
        without_faults = {lane: each._replace(faults=()) for lane, each in states.items()}
        first = 0 if state is None else state.step
        self._lanes = LanePacks(config, spec, seed, first, without_faults, dry_run=skipped or {})

    @property
    def step(self) -> int:
        """Number of steps done, as in ``LoaderState.step``."""
        return self._lanes.step

    def __iter__(self) -> Iterator[dict[int, tuple[Drawn, ...]]]:
        """Yield, for each step, the samples of the documents of each lane. Endless.

        Raises:
            ShardError, ManifestError, StorageError: a shard cannot be read, so its documents' lengths are unknown.
        """
        while True:
            yield self.next_step()

    def next_step(self) -> dict[int, tuple[Drawn, ...]]:
        """Return the samples of the documents of each lane in the next step.

        Raises:
            As iterating.
        """
        return {lane: pack.drawn for lane, pack in self.next_packs().items()}

    def next_packs(self) -> dict[int, Pack]:
        """Return the pack of each lane in the next step, without pixels.

        Raises:
            As iterating; with ``give_up`` also TooManyFaultsError.
        """
        return self._lanes.next_packs()

    def pop_skipped(self) -> tuple[Skipped, ...]:
        """Return the samples that were skipped since the last call. Damaged images are not found."""
        return self._lanes.pop_skipped()

    @property
    def exhausted(self) -> bool:
        """Whether no lane has a sample or a waiting document left."""
        return self._lanes.exhausted

    def document(self, drawn: Drawn) -> Document:
        """Return a document as it was packed, without pixels.

        Raises:
            SampleError: the sample is bad, or no longer has this part.
            ShardError, ManifestError, StorageError: the shard is missing, stale or damaged.
        """
        document, skipped = self._lanes.remake(drawn)
        if document is None:
            raise SampleError(skipped[0].reason if skipped else f"it has no part {drawn.part} any more")
        return document
