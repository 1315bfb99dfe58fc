"""Text decoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.families.pages import inputs, text_pages, tokenizer
from benchmarks.families.pair import ModelPair, our_model, randomise
from mmscale.models.build import media_spec

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_parameters": ROPE},
    "qwen2": {"num_key_value_heads": 2, "rope_parameters": ROPE},
    "mistral": {"num_key_value_heads": 2, "head_dim": 48, "sliding_window": None, "rope_parameters": ROPE},
    "olmo2": {"num_key_value_heads": 6, "rope_parameters": ROPE},
    "persimmon": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
}
LENGTHS = {"mixed": (30, 700, 80, 210, 45, 400, 120, 60), "equal": (205,) * 8}


def decoder(family: str, inputs_kind: str) -> ModelPair:
    """Return the pair of a family on documents of mixed or equal lengths."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    )
    randomise(theirs)
    ours = our_model(theirs)
    made = inputs(text_pages(LENGTHS[inputs_kind]), tokenizer(), media_spec(ours.config), None)

    def run_ours() -> torch.Tensor:
        return ours.head(ours(made.packed).hidden)

    def run_theirs() -> torch.Tensor:
        return theirs(**made.padded, use_cache=False).logits[made.real]

    return ModelPair(f"{family}, {inputs_kind} lengths", ours, theirs, run_ours, run_theirs, made.padding)


def pairs() -> Iterator[tuple[str, Any]]:
    """Yield (family, builder of a pair)."""
    for family in FAMILIES:
        for kind in LENGTHS:
            yield family, lambda family=family, kind=kind: decoder(family, kind)
