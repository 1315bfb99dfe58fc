"""The random generator of a sample: the same on every machine, different for every sample and epoch."""

from __future__ import annotations

import numpy as np

from data_pipeline.loader.sample_source import dataset_seed
from data_pipeline.order.randomness import SampleRng, mix


def test_a_sample_draws_the_same_numbers_on_every_machine() -> None:
    draws = SampleRng(1, 2, 3).random(3)
    np.testing.assert_allclose(draws, [0.5497517277227361, 0.4198004474225706, 0.7922455617398589], rtol=1e-15)


def test_the_generator_is_pcg64_started_with_four_words_of_splitmix64() -> None:
    """Compare with Python integers: O'Neill 2014 initialises PCG64 with state and increment, two words each."""
    for seed, sample, epoch in [(1, 2, 3), (0, 0, 0), (2**64 - 1, 10**10, 7), *((5, i, 1) for i in range(8))]:
        start = mix(mix(mix(seed) ^ sample) ^ epoch)
        words = [mix((start + i) % 2**64) for i in range(4)]
        state, increment = words[0] << 64 | words[1], (words[2] << 65 | words[3] << 1 | 1) % 2**128
        multiplier = 0x2360ED051FC65DA44385DF649FCCF645
        bits = np.random.PCG64(0)
        state = ((increment + state) * multiplier + increment) % 2**128
        bits.state = {**bits.state, "state": {"state": state, "inc": increment}}
        expected, draws = np.random.Generator(bits), SampleRng(seed, sample, epoch)
        # All methods of one sample's generator draw from one sequence.
        assert [draws.random(), draws.random()] == expected.random(2).tolist()
        assert draws.permutation(9).tolist() == expected.permutation(9).tolist()
        assert draws.random(2).tolist() == expected.random(2).tolist()


def test_samples_epochs_and_data_sets_draw_different_numbers() -> None:
    seeds = [dataset_seed(1, "a"), dataset_seed(1, "b"), dataset_seed(2, "a")]
    first = {SampleRng(s, i, e).random() for s in seeds for i in range(50) for e in range(4)}
    assert len(first) == 600


def test_first_draws_are_uniform_and_neighbours_uncorrelated() -> None:
    draws = np.array([SampleRng(9, i, 0).random() for i in range(4000)])
    assert abs(draws.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 4000)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(4000)
