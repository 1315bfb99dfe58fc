"""Small lane states for tests that save and load states but open no data."""

from __future__ import annotations

from data_pipeline.order.state import LaneState, StreamPosition


def toy_lane(*faults: int, datasets: int = 0) -> LaneState:
    """Return a lane at the beginning of its data sets, recognisable by its fault counters."""
    return LaneState(StreamPosition.start(datasets), faults=faults)
