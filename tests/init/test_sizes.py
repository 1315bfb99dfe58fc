"""The chosen sizes fit the machine; for a machine that is too small, the message says what would fit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.errors import ConfigError
from mmscale.init.machine import GIB, Machine, free_host_memory
from mmscale.init.memory import MemoryModel, memory_model
from mmscale.init.sizes import DocumentSizes, choose_sizes
from mmscale.models.build import build_model, count_parameters, media_spec
from mmscale.models.config import ModelConfig
from mmscale.nn.experts import Experts
from tests.init.test_init import SMALL
from tests.models.packs import pack, text_document
from tests.models.tiny import DENSE, VOCAB, config

# Llama 3.2 3B with bf16 weights, all trained.
LARGE = MemoryModel(
    total=3_200_000_000,
    trained=3_200_000_000,
    value_bytes=2,
    token_values=28 * 60_000,
    block_values=60_000,
    patch_values=0,
    largest_module=128_256 * 3072,
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


@pytest.mark.parametrize(
    "mlp",
    [
        DENSE,
        {"kind": "moe", "num_experts": 16, "experts_per_token": 4, "expert_dim": 24},
        {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert_dim": 48, "shared_dim": 32},
        {"kind": "moe", "num_experts": 8, "experts_per_token": 4, "expert_dim": 48, "every": 2, "dense": DENSE},
    ],
    ids=["dense", "fine", "shared", "second"],
)
def test_activations_of_experts_follow_the_tensors_that_autograd_saves(mlp: dict[str, Any]) -> None:
    """The bytes of all saved tensors but weights are about as far below the estimate with experts as without."""
    values = config(None, mlp=mlp, hidden_dim=64)
    model, saved = build_model(values), dict[int, int]()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    alive = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # A freed address could be that of the next tensor.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(pack([text_document(seed, 64, VOCAB) for seed in range(4)], media_spec(values)))
    memory = memory_model(values, frozenset({"all"}), 4, "cpu")
    assert 0.5 < sum(saved.values()) / memory.activation_bytes(256, 0, recompute=False) < 1
    experts = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Experts)]
    assert memory.largest_module == max([*experts, 64 * 64])  # Queries, or the experts of a block.
    gathered = dataclasses.replace(memory, largest_module=0).fixed_bytes(3, 2, copies=False)
    assert memory.fixed_bytes(3, 2, copies=False) - gathered == 2 * 4 * memory.largest_module
    if "every" in mlp:  # Recomputation holds one block, at worst one with experts.
        assert memory.block_values > memory.token_values / 4


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
