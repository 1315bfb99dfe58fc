"""The global batch does not depend on ranks, workers or a resume."""

from __future__ import annotations

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.history.digest import digest
from data_pipeline.media_spec import MediaSpec

STEPS = range(9)


@pytest.fixture
def plain(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> list[tuple[int, str]]:
    return list(digest(mixture_config, hybrid_spec, 1, STEPS))


@pytest.mark.long
def test_every_number_of_ranks_and_workers_and_every_resume_gives_the_same_batches(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, plain: list[tuple[int, str]]
) -> None:
    for world_size in (1, 2, 3, 4):
        for workers, resume_at in ((0, None), (2, None), (0, 4), (2, 5)):
            again = list(digest(mixture_config, hybrid_spec, 1, STEPS, world_size, workers, resume_at))
            assert again == plain, (world_size, workers, resume_at)


def test_steps_differ_from_one_another(plain: list[tuple[int, str]]) -> None:
    assert len({value for _, value in plain}) == len(plain)


def test_another_seed_gives_other_batches(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, plain: list[tuple[int, str]]
) -> None:
    other = list(digest(mixture_config, hybrid_spec, 2, STEPS))
    assert all(a != b for a, b in zip(plain, other, strict=True))


def test_a_range_from_the_middle_is_the_tail(
    mixture_config: DataConfig, hybrid_spec: MediaSpec, plain: list[tuple[int, str]]
) -> None:
    assert list(digest(mixture_config, hybrid_spec, 1, range(6, 9))) == plain[6:]
