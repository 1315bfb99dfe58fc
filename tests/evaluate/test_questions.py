from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmscale.errors import ConfigError
from mmscale.evaluate.questions import make_blocks

answers_lists = st.lists(st.sampled_from([f"answer {i}" for i in range(12)]), min_size=4, max_size=60)
extra_pool = st.lists(st.sampled_from([f"other {i}" for i in range(9)]), max_size=9)


def _exchange_exists(answers: list[str]) -> bool:
    return 2 * max(Counter(answers).values()) <= len(answers)


@given(answers_lists, extra_pool, st.integers(3, 12), st.integers(0, 5))
def test_every_sample_is_asked_once_and_nobody_keeps_an_image_with_its_answer(
    answers: list[str], pool: list[str], choices: int, seed: int
) -> None:
    assume(_exchange_exists(answers))
    assume(choices <= len(set(answers) | set(pool)))
    blocks = make_blocks(answers, pool, choices, seed)
    assert sorted(sample for block in blocks for sample in block.samples) == list(range(len(answers)))
    for block in blocks:
        assert len(set(block.candidates)) == len(block.candidates) == choices
        assert set(block.candidates) <= set(answers) | set(pool)
        assert sorted(block.control_sample) == list(range(len(block.samples)))  # Each image is used once.
        for place, sample in enumerate(block.samples):
            assert block.candidates[block.right[place]] == answers[sample]
            assert answers[block.samples[block.control_sample[place]]] != answers[sample]
    sizes = [len(block.samples) for block in blocks]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.sampled_from([f"answer {i}" for i in range(12)]), min_size=1, max_size=30), st.integers(1, 5))
def test_where_no_exchange_of_images_exists_the_set_is_refused(others: list[str], surplus: int) -> None:
    answers = [*others, *["the most common answer"] * (len(others) + surplus)]
    assert not _exchange_exists(answers)
    with pytest.raises(ConfigError, match="must give every sample an image with another answer"):
        make_blocks(answers, [], None, 0)


def test_questions_depend_on_the_seed_alone() -> None:
    answers = [f"a{i}" for i in range(40)]
    assert make_blocks(answers, [], 8, 1) == make_blocks(answers, [], 8, 1)
    assert make_blocks(answers, [], 8, 1) != make_blocks(answers, [], 8, 2)


def test_the_place_of_the_right_answer_says_nothing() -> None:
    answers = [f"a{i:03}" for i in range(400)]
    places = Counter(place for block in make_blocks(answers, [], 4, 0) for place in block.right)
    assert places == Counter({0: 100, 1: 100, 2: 100, 3: 100})


@pytest.mark.parametrize(("choices", "message"), [(5, "offers 3 different answers"), (1, "ask for 2 to 3")])
def test_impossible_numbers_of_choices_are_refused(choices: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_blocks(["a", "b", "c"], [], choices, 0)
