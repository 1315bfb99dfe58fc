"""Experts in Hugging Face folders: spellings of their tensors, choices of the router, keys of ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of
from mmscale.nn.moe import MoeConfig
from mmscale.nn.router import RoutedRows, Router
from tests.hf.decoders import saved_reference
from tests.hf.reference_models import imported, loaded, tensors_of
from tests.models.reference_models import distance
from tests.models.test_parity import LENGTHS, text_batch
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
NAMES = ["olmoe", "mixtral", "qwen3_moe"]
SEPARATE = {
    "olmoe": "model.layers.1.mlp.experts.2.gate_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.2.gate_proj.weight",
}
STACKED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_are_imported_and_exported(name: str, tmp_path: Path) -> None:
    """A folder in each spelling gives the same checkpoint, which restores either folder bit for bit."""
    theirs = saved_reference(name, tmp_path / "separate")
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    folders = {spelling: tensors_of(tmp_path / spelling) for spelling in ("separate", "stacked")}
    assert SEPARATE[theirs.config.model_type] in folders["separate"]
    assert STACKED in folders["stacked"]
    models = {}
    for spelling in folders:
        models[spelling], checkpoint = imported(tmp_path / spelling, tmp_path / f"run of {spelling}")
        for stacked in (False, True):
            out = tmp_path / f"{spelling} to {stacked}"
            to = HuggingFace(tmp_path / spelling, stacked_experts=stacked)
            export_weights(checkpoint, out, to=to, shard_bytes=100_000)
            before, after = folders["stacked" if stacked else "separate"], tensors_of(out)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
    for mine, other in zip(*(model.parameters() for model in models.values()), strict=True):
        assert torch.equal(mine, other)
    ids = text_batch(120).token_ids[None]
    again = loaded(tmp_path / "separate to True", "AutoModelForCausalLM")
    assert torch.equal(again(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_a_folder_without_an_expert_is_refused(tmp_path: Path) -> None:
    saved_reference("mixtral", tmp_path / "theirs")
    file = tmp_path / "theirs/model.safetensors"
    tensors = load_file(file)
    del tensors[SEPARATE["mixtral"]]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"does not hold 1 tensor \(model.layers.1.block_sparse_moe.experts.2.w1"):
        import_folder(tmp_path / "theirs", tmp_path / "checkpoints")


def test_a_dense_family_has_one_spelling(tmp_path: Path) -> None:
    saved_reference("qwen3", tmp_path / "theirs")
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    to = HuggingFace(tmp_path / "theirs", stacked_experts=True)
    with pytest.raises(
        CheckpointError, match="qwen3 has no spelling with stacked experts; leave out --stacked-experts"
    ):
        export_weights(checkpoint, tmp_path / "out", to=to)


@pytest.mark.parametrize("name", NAMES)
def test_every_router_chooses_the_same_experts(name: str, tmp_path: Path) -> None:
    theirs = saved_reference(name, tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    batch = text_batch(120)
    mine, expected = [], []
    for module in ours.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, inputs, outputs: mine.append((outputs[1], outputs[0])))
    for layer in theirs.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(lambda _, inputs, outputs: expected.append((outputs[2], outputs[1])))
    ours(batch)
    for ids in batch.token_ids.split(LENGTHS):
        theirs(input_ids=ids[None])
    layers = len(mine)
    assert layers == (2 if name == "qwen3_moe" else 3)  # Its first block is dense.
    assert len({tuple(row.tolist()) for row in mine[0][0]}) > 5
    for layer, (chosen, weights) in enumerate(mine):
        their_choice, their_weights = (torch.cat(found) for found in zip(*expected[layer::layers], strict=True))
        assert torch.equal(chosen, their_choice)
        torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-6)


def test_the_load_balance_loss_is_the_published_one_over_experts_per_token(parity: Recorder) -> None:
    torch.manual_seed(0)
    router = Router(16, MoeConfig(num_experts=8, experts_per_token=3, expert_dim=8, balance="microbatch"))
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) * 20
    sums = router(hidden, RoutedRows.text(torch.arange(40) < 30))[2]
    balance, z = sums.balance / 30, sums.z / 30
    logits = hidden[:30] @ router.weight.t()
    theirs = load_balancing_loss_func((logits,), num_experts=8, top_k=3)
    parity("olmoe", "router losses", distance(balance, theirs / 3), 2e-6)
    parity("olmoe", "router losses", distance(z, logits.logsumexp(-1).square().mean()), 2e-6)
    assert balance > 1.01  # Deliberately unbalanced: the minimum is 1.


def test_their_balance_loss_joins_the_layers_and_is_larger_by_the_experts_of_a_token(
    tmp_path: Path, parity: Recorder
) -> None:
    """For one layer, theirs is A times ours. For several, theirs averages loads and probabilities, then multiplies."""
    theirs = saved_reference("olmoe", tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    config, batch = ours.config.decoder.mlp, text_batch(120, lengths=[60])
    router = ours(batch).router
    load, importance = router.load.sum(1).float(), router.importance
    out = theirs(input_ids=batch.token_ids[None], output_router_logits=True)
    layers = config.balance_of(load, importance)
    expected = [load_balancing_loss_func((logits,), 8, 3) for logits in out.router_logits]
    parity("olmoe", "balance loss", distance(3 * layers, torch.stack(expected)), 2e-6)
    joined = 8 * (load.mean(0) / 60 * (importance.mean(0) / 60)).sum()
    parity("olmoe", "balance loss", distance(joined, out.aux_loss), 2e-6)
    assert out.aux_loss < 3 * 0.99 * layers.mean()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "clipped projections": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported, only None"),
    "another width of heads": ("olmoe", {"head_dim": 64}, "head_dim=64 is not supported, only 128"),
    "a window": ("mixtral", {"sliding_window": 4096}, "sliding_window=4096 is shorter than max_position_embeddings"),
    "a window of all blocks": ("qwen3_moe", {"use_sliding_window": True}, "sliding_window=4096 .* is shorter"),
    "two numbers": ("qwen3_moe", {"num_experts": 8, "num_local_experts": 9}, "num_experts=8 contradicts .*=9"),
    "an unknown key": ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 is not"),
    "noise": (
        "mixtral",
        {"router_jitter_noise": 0.01},
        "the experts too, .* Set it to 0.0 .* set model.decoder.mlp.ji",
    ),
    "more choices than experts": ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token=9: there are 8 experts"),
    "dense blocks later": ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
    "no step": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_of_another_computation_are_refused(case: str) -> None:
    family, keys, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        layout_of(family).model_config({"model_type": family, **keys}, "config.json")


def test_the_coefficient_of_the_balance_loss_is_kept() -> None:
    layout = layout_of("mixtral")
    config = layout.model_config({"model_type": "mixtral", "router_aux_loss_coef": 0.02}, "config.json")
    assert config.decoder.mlp.balance_coefficient == layout.config_values(config)["router_aux_loss_coef"] == 0.02
