"""A damaged sample must change the samples of its own lane alone."""

from __future__ import annotations

from data_pipeline.config import DataConfig
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec

NUM_LANES = 3


def check_that_only_its_lane_moves(sound: DataConfig, damaged: DataConfig, spec: MediaSpec, key: str) -> None:
    """Compare two steps of three lanes.

    Args:
        sound: Data without damage.
        damaged: The same data, in which the sample ``key`` is damaged.
        spec: The model's inputs.
        key: The key that no lane may deliver.
    """

    def keys_by_lane(config: DataConfig) -> tuple[dict[int, list[str]], set[int]]:
        keys, skipped = dict[int, list[str]](), set[int]()
        with Loader(config, spec, seed=0) as loader:
            for _ in range(2):
                step = next(loader)
                skipped |= {skip.lane for skip in step.skipped}
                for batch in step.microbatches:
                    (lane,) = batch.lanes
                    keys.setdefault(lane, []).extend(origin.key for origin in batch.provenance if origin is not None)
        return keys, skipped

    (before, nothing), (after, skipped) = keys_by_lane(sound), keys_by_lane(damaged)
    assert not nothing
    assert 0 < len(skipped) < NUM_LANES
    for lane in range(NUM_LANES):
        assert (before[lane] == after[lane]) == (lane not in skipped)
        assert key not in after[lane]
