"""Scaled RoPE equals that of transformers: angles, logits of imported folders, and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of
from mmscale.nn.rope import text_rotation
from tests.hf.decoders import SIZES
from tests.hf.reference_models import imported, loaded
from tests.models.reference_models import distance, randomise
from tests.models.test_parity import text_batch
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn, as Qwen2.5 has it": {**YARN, "original_max_position_embeddings": 32_768},
    "yarn, a given factor of attention": {**YARN, "attention_factor": 0.75},
    "yarn, DeepSeek's factors": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn, one of DeepSeek's factors": {**YARN, "mscale": 0.707},
    "yarn, other ends": {**YARN, "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 512},
    "yarn, ends not rounded": {**YARN, "truncate": False, "original_max_position_embeddings": 4096},
    "yarn, a blend of no width": {**YARN, "original_max_position_embeddings": 1},
    "yarn, factor of the contexts": {**YARN, "factor": None},
    "yarn, no context": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
}
LONGEST = 131_072


def config_of(rope: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 128, "max_position_embeddings": LONGEST, "rope_parameters": dict(rope)}
    )


@pytest.mark.parametrize("name", SCALED)
def test_angles(name: str, parity: Recorder) -> None:
    """Measured differences: 0, and 1.2e-7 where a blend multiplies in another order."""
    theirs = config_of(SCALED[name])
    model = layout_of("llama").model_config({**theirs.to_dict(), "rope_parameters": SCALED[name]}, "config.json")
    rope = model.decoder.rope
    assert rope is not None
    positions = torch.tensor([0, 1, 2, 3, 31, 100])
    ours = text_rotation(positions, 32, rope, torch.float32)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1, 1, dtype=torch.float32), positions[None])
    parity("llama", "angles of scaled rotations", distance(ours.cos, cos[0, :, :16]), 2e-6)
    parity("llama", "angles of scaled rotations", distance(ours.sin, sin[0, :, :16]), 2e-6)


REFUSED = {
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic' is not supported"),
    "longrope": (
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        "rope_type='longrope' is not supported",
    ),
    "Llama 3's ends turned over": (
        {**SCALED["llama3"], "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        "high_freq_factor=1.0: must be above low_freq_factor=4.0",
    ),
    "Llama 3's ends equal": ({**SCALED["llama3"], "low_freq_factor": 4.0}, "high_freq_factor=4.0: must be above"),
    "YaRN's ends turned over": ({**YARN, "beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast=1.0: must be above"),
    "a factor below one": ({**SCALED["linear"], "factor": 0.5}, "must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_scaling_is_rejected_by_name(name: str) -> None:
    rope, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        layout_of("llama").model_config({**config_of(YARN).to_dict(), "rope_parameters": rope}, "config.json")


FOLDERS = {
    "linear": ("olmo2", {"num_key_value_heads": 2, "rope_parameters": {**SCALED["linear"]}}),
    "yarn": ("qwen2", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "yarn, part of a head": ("persimmon", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("version", [4, 5])
def test_logits_and_the_way_back(name: str, version: int, tmp_path: Path, parity: Recorder) -> None:
    family, keys = FOLDERS[name]
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **{**SIZES, "max_position_embeddings": 128, **keys})
    )
    randomise(theirs, 0)
    theirs.save_pretrained(tmp_path / "theirs")
    if version == 4:
        file = tmp_path / "theirs" / "config.json"
        values = json.loads(file.read_text())
        rope = values.pop("rope_parameters")
        moved = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        file.write_text(json.dumps({**values, **moved, "rope_scaling": rope}))
    ours, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    batch = text_batch(SIZES["vocab_size"], lengths=[100])
    logits = ours.head(ours(batch).hidden)
    parity(family, "logits", distance(logits, theirs(batch.token_ids[None]).logits[0]), 2e-6)
    export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "theirs"))
    again = loaded(tmp_path / "back", "AutoModelForCausalLM")
    assert torch.equal(again(batch.token_ids[None]).logits, theirs.eval()(batch.token_ids[None]).logits)
