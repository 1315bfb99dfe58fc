"""A mixture that changes during a run: weights by step, data sets that are added, data sets that are exhausted."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.errors import StateError
from data_pipeline.history.digest import digest
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.state import LoaderState


def _with(config: DataConfig, changes: dict[str, dict[str, Any]], **others: object) -> DataConfig:
    """Return the configuration with only the given data sets, and their fields changed; ``{}`` changes no field."""
    datasets = [dataset.model_dump() | changes[dataset.name] for dataset in config.datasets if dataset.name in changes]
    return DataConfig.model_validate(config.model_dump() | {"datasets": datasets} | others)


def _steps(config: DataConfig, spec: MediaSpec, count: int, state: LoaderState | None = None) -> list[StepBatch]:
    with Loader(config, spec, seed=1, state=state) as loader:
        return list(itertools.islice(loader, count))


def _drawn(steps: list[StepBatch], lane: int | None = None) -> list[tuple[str, int, int]]:
    """Return (data set, epoch, sample) of each document, in order."""
    return [
        (origin.dataset, origin.epoch, origin.index)
        for step in steps
        for micro in step.microbatches
        if lane is None or micro.lanes == (lane,)
        for origin in micro.provenance
        if origin is not None
    ]


ONE_BY_ONE = {"max_tokens": 90, "max_documents": 1}


def test_weights_change_at_their_step(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    later = [{"from_step": 0, "weight": 1}, {"from_step": 6, "weight": 3}]
    config = _with(mixture_config, {"captions": {"weight": 1}, "text": {"weight": later}}, packing=ONE_BY_ONE, lanes=4)
    steps = _steps(config, hybrid_spec, 14)
    before = Counter(name for name, *_ in _drawn(steps[:6]))
    after = Counter(name for name, *_ in _drawn(steps[6:]))
    assert before == {"captions": 12, "text": 12}
    assert after == {"captions": 8, "text": 24}


def test_a_changing_mixture_is_the_same_everywhere(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    late = [{"from_step": 3, "weight": 2.0}]
    config = _with(mixture_config, {"captions": {}, "text": {"weight": late}, "pages": {"max_epochs": 1}})
    plain = list(digest(config, hybrid_spec, 1, range(9)))
    for world_size, workers, resume_at in ((2, 0, 2), (3, 2, None), (1, 0, 3), (4, 0, 5)):
        assert list(digest(config, hybrid_spec, 1, range(9), world_size, workers, resume_at)) == plain


def test_a_data_set_joins_a_running_mixture_and_moves_no_other(
    mixture_config: DataConfig, hybrid_spec: MediaSpec
) -> None:
    old = _with(mixture_config, {"captions": {}, "pages": {}}, lanes=2, packing=ONE_BY_ONE)
    whole = _steps(old, hybrid_spec, 24)
    joined = {"captions": {}, "text": {"weight": [{"from_step": 8, "weight": 1.5}]}, "pages": {}}
    new = _with(mixture_config, joined, lanes=2, packing=ONE_BY_ONE)
    state = LoaderState.from_json(whole[7].state.to_json())
    assert _drawn(_steps(new, hybrid_spec, 8)) == _drawn(whole[:8]), "before it joins it changes nothing"
    resumed = _steps(new, hybrid_spec, 16, state)
    assert any(name == "text" for name, *_ in _drawn(resumed))
    for lane, name in itertools.product(range(2), ("captions", "pages")):
        theirs = [drawn for drawn in _drawn(whole, lane) if drawn[0] == name]
        ours = [drawn for drawn in _drawn(whole[:8], lane) + _drawn(resumed, lane) if drawn[0] == name]
        assert len(ours) > 2
        assert ours == theirs[: len(ours)]


def test_what_would_change_the_past_is_refused(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    state = _steps(_with(mixture_config, {"captions": {}, "pages": {}}), hybrid_spec, 5)[-1].state
    early = {"captions": {}, "pages": {}, "text": {"weight": [{"from_step": 4, "weight": 1}]}}
    with pytest.raises(StateError, match=r"changed since: datasets, .*weights"):
        Loader(_with(mixture_config, early), hybrid_spec, seed=1, state=state)
    with pytest.raises(StateError, match="changed since: weights"):
        Loader(_with(mixture_config, {"captions": {"weight": 9}, "pages": {}}), hybrid_spec, seed=1, state=state)
    late = [{"from_step": 0, "weight": 2.0}, {"from_step": 5, "weight": 0}]
    Loader(_with(mixture_config, {"captions": {"weight": late}, "pages": {}}), hybrid_spec, seed=1, state=state)


def test_each_data_set_ends_after_its_epochs_and_then_the_loader(
    mixture_config: DataConfig, hybrid_spec: MediaSpec
) -> None:
    config = _with(
        mixture_config, {"captions": {"max_epochs": 2}, "text": {"max_epochs": 3}, "pages": {"max_epochs": 1}}
    )
    steps = _steps(config, hybrid_spec, 80)
    expected = [("captions", e, i) for e in range(2) for i in range(41)]
    expected += [("text", e, i) for e in range(3) for i in range(17)] + [("pages", 0, i) for i in range(11)]
    assert sorted(_drawn(steps)) == sorted(expected)
    ends = [step.exhausted for step in steps]
    first = ends.index(True)
    assert all(ends[first:])
    assert all(step.num_samples == 0 for step in steps[first + 1 :])
    assert steps[first].num_samples > 0
    resumed = _steps(config, hybrid_spec, 80 - first // 2, steps[first // 2 - 1].state)
    assert _drawn(resumed) == _drawn(steps[first // 2 :])


def test_repeats_end_the_epochs_of_all_data_sets_together(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    repeats = {"captions": {"weight": None, "repeats": 1}, "text": {"weight": None, "repeats": 2}}
    config = _with(mixture_config, repeats, packing=ONE_BY_ONE, lanes=1)
    counts = Counter(name for name, *_ in _drawn(_steps(config, hybrid_spec, 75)))  # 75 = 41 + 2 x 17 draws.
    assert counts == {"captions": 41, "text": 34}


def test_impossible_weights_are_refused(mixture_config: DataConfig) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"weight": 0}, "greater than 0"),
        ({"weight": 1, "repeats": 2}, "exclude each other"),
        ({"weight": [{"from_step": 3, "weight": 1}, {"from_step": 3, "weight": 2}]}, "ascending"),
        ({"weight": [{"from_step": 3, "weight": 1}]}, "from step 0"),
        ({"weight": [{"from_step": 0, "weight": 1}, {"from_step": 7, "weight": 0}]}, "from step 7"),
    ]
    for change, message in bad:
        with pytest.raises(ValidationError, match=message):
            _with(mixture_config, {"text": change})
