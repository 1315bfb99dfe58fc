"""The codes of an image tokenizer against their definitions, computed row by row in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmscale.nn.codebook import Codebook, Quantized, code_statistics

SIZE, DIM, DECAY = 7, 3, 0.75


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def averaged(**options: bool) -> Codebook:
    book = Codebook(SIZE, DIM, "never", **{"averaged": True, "counts_idle": True, **options})
    with torch.no_grad():
        book.weight.copy_(draw(SIZE, DIM))
    return book


@pytest.mark.parametrize("most", [1, 2 * SIZE, 1 << 20])
def test_the_nearest_code_is_that_of_a_search_in_float64(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmscale.nn.codebook._MOST_DISTANCES", {"cpu": most})
    book, latents = averaged(), draw(50, DIM, seed=1)
    distances = torch.cdist(latents.double(), book.weight.detach().double())
    found = book(latents)
    assert torch.equal(found.tokens, distances.argmin(1))
    assert torch.equal(found.codes, book.weight[found.tokens])


@pytest.mark.parametrize("normalized", ["always", "decoding"])
def test_normalised_codes(normalized: str) -> None:
    book = Codebook(SIZE, DIM, normalized, averaged=False, counts_idle=False)
    latents = draw(50, DIM, seed=1)
    found = book(latents)
    assert torch.allclose(found.codes.norm(dim=1), torch.ones(50))
    assert torch.equal(book(None, found.tokens).codes, found.codes)
    cosine = torch.cosine_similarity(latents[:, None], book.weight[None], dim=2)
    assert torch.equal(found.tokens, cosine.argmax(1)) == (normalized == "always")


def test_statistics_leave_out_dummies_and_do_not_depend_on_the_order() -> None:
    latents, tokens = draw(40, DIM), torch.randint(0, SIZE, (40,), generator=torch.Generator().manual_seed(2))
    counted = (torch.arange(40) % 5 > 0).float()
    found = code_statistics(Quantized(tokens, latents, latents), SIZE, counted)
    for code in range(SIZE):
        own = latents[(tokens == code) & (counted > 0)]
        assert found[code, 0] == len(own)
        assert torch.allclose(found[code, 1:].double() / 2**24, own.double().sum(0), atol=1e-6)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    halves = [
        code_statistics(Quantized(tokens[part], latents[part], latents[part]), SIZE, counted[part])
        for part in order.split(20)
    ]
    assert torch.equal(halves[0] + halves[1], found)


def test_moving_averages_follow_their_definition() -> None:
    """A code's first latents replace its value; later it is a ratio of two moving averages (1711.00937, A.1)."""
    book = averaged()
    table = book.weight.detach().double().clone()
    sizes: list[float] = [0.0] * SIZE
    sums = [torch.zeros(DIM, dtype=torch.float64)] * SIZE
    for step in range(4):
        latents, tokens = draw(12, DIM, seed=step), torch.randint(0, 5 - step, (12,))
        statistics = code_statistics(Quantized(tokens, latents, latents), SIZE, torch.ones(12))
        changed = book.update(statistics, DECAY, None)
        for code in range(SIZE):
            own = latents[tokens == code].double()
            decay = DECAY if sizes[code] else 0.0
            sizes[code] = decay * sizes[code] + (1 - decay) * len(own)
            sums[code] = decay * sums[code] + (1 - decay) * own.sum(0)
            assert bool(changed.chosen[code]) == (sizes[code] > 0)
            if sizes[code]:
                table[code] = sums[code] / sizes[code]
        found = torch.where(changed.chosen[:, None], changed.values.double(), table)
        assert torch.allclose(found, table, atol=1e-5)
    assert not changed.chosen[5:].any()


@pytest.mark.parametrize("averages", [True, False])
def test_an_idle_code_is_replaced_by_a_neighbour_of_the_busiest(averages: bool) -> None:
    book = averaged(averaged=averages)
    latents = draw(12, DIM, seed=4)
    tokens = torch.tensor([0] * 6 + [1] * 4 + [2] * 2)  # Codes 3 to 6 are idle, and one latent alone is no donor.
    statistics = code_statistics(Quantized(tokens, latents, latents), SIZE, torch.ones(12))
    for step in range(2):
        assert not book.update(statistics, DECAY, 3).chosen[3:].any(), step
    changed = book.update(statistics, DECAY, 3)
    assert changed.chosen.tolist()[3:] == [True, True, True, False]  # Three donors: the fourth waits.
    for dead, busy in ((3, 0), (4, 1), (5, 2)):
        mean = latents[tokens == busy].mean(0)
        assert torch.allclose(changed.values[dead], mean, rtol=2e-3, atol=1e-6)
        assert not torch.equal(changed.values[dead], mean)
    assert book.idle_steps.tolist() == [0, 0, 0, 0, 0, 0, 3]
    if averages:  # Both share the latents of the busy code from now on.
        sizes = book.cluster_sizes.view(torch.float32)
        assert sizes[3:6].tolist() == sizes[:3].tolist() == [3, 2, 1]
