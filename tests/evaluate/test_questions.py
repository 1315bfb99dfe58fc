from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmscale.errors import ConfigError
from mmscale.evaluate.questions import deal

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
    blocks = deal(answers, pool, choices, seed)
    assert sorted(sample for block in blocks for sample in block.samples) == list(range(len(answers)))
    for block in blocks:
        assert len(set(block.candidates)) == len(block.candidates) == choices
        assert set(block.candidates) <= set(answers) | set(pool)
        assert sorted(block.stand_in) == list(range(len(block.samples)))  # Each image is used once.
        for place, sample in enumerate(block.samples):
            assert block.candidates[block.right[place]] == answers[sample]
            assert answers[block.samples[block.stand_in[place]]] != answers[sample]
    sizes = [len(block.samples) for block in blocks]
    assert max(sizes) - min(sizes) <= 1


@given(answers_lists)
def test_where_no_exchange_of_images_exists_the_set_is_refused(answers: list[str]) -> None:
    assume(not _exchange_exists(answers))
    assume(len(set(answers)) > 1)
    with pytest.raises(ConfigError, match="must give every sample an image with another answer"):
        deal(answers, [], None, 0)


def test_questions_depend_on_the_seed_alone() -> None:
    answers = [f"a{i}" for i in range(40)]
    assert deal(answers, [], 8, 1) == deal(answers, [], 8, 1)
    assert deal(answers, [], 8, 1) != deal(answers, [], 8, 2)


def test_the_place_of_the_right_answer_says_nothing() -> None:
    answers = [f"a{i:03}" for i in range(400)]
    places = Counter(place for block in deal(answers, [], 4, 0) for place in block.right)
    assert places == Counter({0: 100, 1: 100, 2: 100, 3: 100})


@pytest.mark.parametrize(("choices", "message"), [(5, "offers 3 different answers"), (1, "ask for 2 to 3")])
def test_impossible_numbers_of_choices_are_refused(choices: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deal(["a", "b", "c"], [], choices, 0)
