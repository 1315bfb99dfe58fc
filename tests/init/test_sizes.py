"""The chosen sizes fit the machine; for a machine that is too small, the message says what would fit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.errors import ConfigError
from mmscale.init.machine import GIB, Machine, free_host_memory
from mmscale.init.memory import MemoryModel, memory_model
from mmscale.init.sizes import DocumentSizes, choose_sizes
from mmscale.models.build import count_parameters
from mmscale.models.config import ModelConfig
from tests.init.test_init import SMALL

# Llama 3.2 3B with bf16 weights, all trained.
LARGE = MemoryModel(
    total=3_200_000_000,
    trained=3_200_000_000,
    value_bytes=2,
    token_values=28 * 60_000,
    patch_values=0,
    blocks=28,
    width=3072,
    vocab_size=128_256,
    device="cuda",
)
DOCUMENTS = DocumentSizes(300.0, 1200, 0.0, 0, 10, 256)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_shares_of_all_ranks_follow_the_formula_of_zero(zero_stage: int) -> None:
    """Rajbhandari et al. 2020, section 3: with 16-bit values 2 N weights, 2 N gradients, 12 N optimizer state."""
    n, ranks = LARGE.total, 8
    whole = {1: 2 + 2, 2: 2, 3: 0}[zero_stage]
    expected = whole * n + (16 - whole) * n / ranks
    rest = dataclasses.replace(LARGE, total=0, trained=0).fixed_bytes(zero_stage, ranks, copies=False)
    assert LARGE.fixed_bytes(zero_stage, ranks, copies=False) - rest == pytest.approx(expected, rel=1e-9)


def test_the_largest_model_that_an_80_gib_gpu_trains() -> None:
    """16 bytes a parameter: 3.2 billion need 48 GiB, so one such GPU holds them, and one of 40 GiB does not."""
    one = Machine("cuda", "1 x GPU", 1, 79 * GIB, 16)
    assert choose_sizes(one, LARGE, DOCUMENTS, 1000, 16, 1.0).zero_stage == 1
    with pytest.raises(ConfigError, match="does not fit") as caught:
        choose_sizes(dataclasses.replace(one, memory_bytes=40 * GIB), LARGE, DOCUMENTS, 1000, 16, 1.0)
    message = str(caught.value)
    assert "1 GPU with 80 GiB" in message
    assert "--adapters lora" in message
    four = Machine("cuda", "4 x GPU", 4, 24 * GIB, 64)  # Stage 1 would hold 4 + 12 / 4 bytes a parameter: 21 GiB.
    assert choose_sizes(four, LARGE, DOCUMENTS, 1000, 16, 1.0).zero_stage >= 2


@settings(deadline=None, max_examples=200)
@given(
    gib=st.floats(2, 200),
    ranks=st.sampled_from([1, 2, 3, 8]),
    mean=st.floats(1, 4000),
    over=st.floats(1, 8),
    samples=st.integers(2, 10**6),
    wanted=st.integers(1, 64),
    trained=st.floats(0.001, 1),
)
def test_whatever_is_chosen_fits_and_covers_the_data(
    gib: float, ranks: int, mean: float, over: float, samples: int, wanted: int, trained: float
) -> None:
    machine = Machine("cuda", "GPU", ranks, int(gib * GIB), 2 * ranks)
    memory = dataclasses.replace(LARGE, trained=int(trained * LARGE.total))
    documents = DocumentSizes(mean, int(mean * over) + 1, 0.0, 0, 10, 256)
    try:
        sizes = choose_sizes(machine, memory, documents, samples, wanted, 1.0)
    except ConfigError:
        least = memory.fixed_bytes(3 if ranks > 1 else 1, ranks, copies=True)
        least += memory.activation_bytes(documents.longest_tokens, 0, recompute=True)
        assert least > 0.8 * machine.memory_bytes
        return
    assert sizes.lanes % ranks == 0
    assert 0 <= sizes.rank_bytes <= 0.8 * machine.memory_bytes
    assert sizes.max_tokens >= documents.longest_tokens + documents.dummy_tokens
    assert sizes.steps * sizes.step_samples >= samples
    assert (sizes.steps - 1) * sizes.step_samples < samples
    assert wanted <= sizes.step_samples
    # A lower ZeRO stage, or keeping all activations, would not fit.
    for stage, recompute in itertools.product((1, 2, 3), (False, True)):
        if (recompute, stage) < (sizes.recompute, sizes.zero_stage) and ranks > 1:
            fixed = memory.fixed_bytes(stage, ranks, copies=True)
            one = memory.activation_bytes(documents.longest_tokens, 0, recompute=recompute)
            assert fixed + one > 0.8 * machine.memory_bytes


def test_a_frozen_tower_keeps_no_activations_and_counts_as_frozen() -> None:
    import yaml

    config = ModelConfig.model_validate(yaml.safe_load(SMALL))
    count = count_parameters(config)
    whole = memory_model(config, frozenset({"all"}), 2, "cpu")
    part = memory_model(config, frozenset({"connector", "decoder"}), 2, "cpu")
    assert whole.total == whole.trained == part.total == count.total
    assert part.trained == count.total - count.components["vision"]
    assert (part.patch_values, whole.token_values) == (0, part.token_values)
    # The tower projects 8 x 8 pixels of 3 colours to 32. Its block has queries, keys, values and output (32 to 32), and
    # a gated mlp (32 to 64, twice, and back).
    assert whole.patch_values == (8 * 8 * 3 + 32) + 4 * (32 + 32) + 3 * (32 + 64)


def test_a_container_has_the_memory_of_its_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       64000000 kB\nMemAvailable:   32000000 kB\n")
    group = tmp_path / "group"
    group.mkdir()
    assert free_host_memory(meminfo, group) == 32_000_000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert free_host_memory(meminfo, group) == 32_000_000 * 1024
    (group / "memory.max").write_text("5000000\n")
    assert free_host_memory(meminfo, group) == 4_999_000
