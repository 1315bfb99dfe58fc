"""Models in Hugging Face's and our implementation with the same weights.

    dense    Llama's decoder: both compute the same function
    olmoe    OLMoE's decoder with its 64 experts, of which each token uses 8: both compute the same function
    active   the dense decoder with as many active parameters as ``olmoe``, without the router's: one expert of Hugging
             Face's OLMoE, which has the weight 1
    mllama   Llama 3.2 Vision: both compute the same function with three exceptions. Hugging Face pads each image to a
             multiple of 8 rows, and real rows attend to the padding; it attends to the class token's row too; and text
             before the first image attends to images.

All widths are those of the quickstart. Three query heads share a key and value head, as in Llama 3.2 3B.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.engine.construct import Gather
from mmscale.models.config import ModelConfig

WIDTH, MLP, HEADS, KEY_HEADS, VOCAB, BLOCKS = 192, 512, 6, 2, 2048, 8
EVERY = 4
PATCH, SIDE, TOWER_LOCAL, TOWER_GLOBAL = 8, 4, 4, 2
KEPT = (1, 3)
"""Blocks of the tower whose outputs are features in addition to the last output."""
THETA, EPS, GATE = 10_000.0, 1e-5, 0.5
EXPERTS, CHOSEN, EXPERT_MLP = 64, 8, 96
"""Experts of ``olmoe``, those that a token uses, and their width: half of the stream's, as in OLMoE."""
MODELS = ("dense", "mllama", "olmoe", "active")


def our_config(model: str) -> ModelConfig:
    """Return our config. Raises KeyError for an unknown model."""
    block: dict[str, Any] = {
        "decoder": {
            "vocab_size": VOCAB,
            "hidden_dim": WIDTH,
            "num_layers": BLOCKS,
            "attention": {"num_heads": HEADS, "num_kv_heads": KEY_HEADS},
            "mlp": {"kind": "dense", "hidden_dim": MLP},
            "norm": {"eps": EPS},
            "rope": {"theta": THETA},
        }
    }
    vision = {
        "patch_size": PATCH,
        "hidden_dim": WIDTH,
        "num_layers": TOWER_LOCAL + TOWER_GLOBAL,
        "attention": {"num_heads": HEADS},
        "mlp": {"hidden_dim": MLP, "gated": False, "activation": "gelu", "bias": True},
        "norm": {"kind": "layernorm"},
        "positions": {"kind": "learned", "grid": [SIDE, SIDE]},
        "class_token": True,
        "pre_norm": True,
        "feature_layers": list(KEPT),
    }
    connector = {"kind": "cross_attention", "every": EVERY, "gate_init": GATE}
    experts = {
        "kind": "moe",
        "num_experts": EXPERTS,
        "experts_per_token": CHOSEN,
        "expert_dim": EXPERT_MLP,
        "balance_coefficient": 0.0,  # Hugging Face's default too: its loss has no router losses.
        "z_coefficient": 0.0,
    }
    attention = {"num_heads": HEADS, "qk_norm": "full"}
    changes: dict[str, dict[str, Any]] = {
        "dense": {},
        "mllama": {"vision": vision, "connector": connector},
        "olmoe": {"decoder": block["decoder"] | {"attention": attention, "mlp": experts}},
        "active": {
            "decoder": block["decoder"]
            | {"attention": attention, "mlp": {"kind": "dense", "hidden_dim": CHOSEN * EXPERT_MLP}}
        },
    }
    return ModelConfig.model_validate(block | changes[model])


def their_model(model: str, seed: int = 0) -> Any:
    """Return the Hugging Face model on the CPU with its own initial values and open gates, so that images matter."""
    torch.manual_seed(seed)
    built: Any = {"dense": _llama, "mllama": _mllama, "olmoe": _olmoe, "active": _active}[model]()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
                parameter.fill_(GATE)
            elif name.endswith(("gate_attn", "gate_ffn")):
                parameter.fill_(20.0)  # tanh(20) = 1: our blocks have no gates.
    return built.train()


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": THETA}
    return LlamaForCausalLM(LlamaConfig(**_text(BLOCKS, rope), tie_word_embeddings=False, use_cache=False))


def _olmoe(experts: int = EXPERTS, chosen: int = CHOSEN, width: int = EXPERT_MLP) -> nn.Module:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    rope = {"rope_type": "default", "rope_theta": THETA}
    shape = _text(BLOCKS, rope) | {"num_key_value_heads": HEADS, "intermediate_size": width}
    return OlmoeForCausalLM(
        OlmoeConfig(
            **shape, num_experts=experts, num_experts_per_tok=chosen, tie_word_embeddings=False, use_cache=False
        )
    )


def _active() -> nn.Module:
    return _olmoe(1, 1, CHOSEN * EXPERT_MLP)


def _mllama() -> nn.Module:
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    crossed = _crossed_layers()
    rope = {"rope_type": "default", "rope_theta": THETA}
    text = MllamaTextConfig(**_text(BLOCKS + len(crossed), rope), cross_attention_layers=crossed, use_cache=False)
    vision = MllamaVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=TOWER_LOCAL,
        num_global_layers=TOWER_GLOBAL,
        attention_heads=HEADS,
        intermediate_size=MLP,
        vision_output_dim=WIDTH * (1 + len(KEPT)),
        image_size=PATCH * SIDE,
        patch_size=PATCH,
        max_num_tiles=1,  # Images have one tile. With four, their tower would compute four times as much.
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=list(KEPT),
    )
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))


def _text(layers: int, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": EPS,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _crossed_layers() -> list[int]:
    """Return their indices of cross-attention blocks, which count among all blocks: one before our blocks 3 and 7."""
    return [block + number for number, block in enumerate(range(EVERY - 1, BLOCKS, EVERY))]


def _text_names() -> list[tuple[str, str]]:
    rows = [(r"lm_head\.", "head."), (r"model\.(embed_tokens|norm|layers)", r"decoder.\1")]
    crossed = _crossed_layers()
    plain = [layer for layer in range(BLOCKS + len(crossed)) if layer not in crossed]
    inner = r"model\.language_model\."
    rows += [(rf"{inner}layers\.{theirs}\.", f"decoder.layers.{ours}.") for ours, theirs in enumerate(plain)]
    rows += [
        (rf"{inner}layers\.{theirs}\.", f"connector.blocks.{theirs - number}.") for number, theirs in enumerate(crossed)
    ]
    return [*rows, (inner, "decoder.")]


def _tower_names() -> list[tuple[str, str]]:
    tower = r"model\.vision_model\."
    rows = [
        (rf"{tower}patch_embedding\.", "vision.patch_embed.projection."),
        (rf"{tower}class_embedding", "vision.positions.class_embedding"),
        (rf"{tower}gated_positional_embedding\.embedding", "vision.positions.position_embedding"),
        (rf"{tower}layernorm_pre\.", "vision.pre_norm."),
        (rf"{tower}layernorm_post\.", "vision.post_norm."),
        (rf"{tower}transformer\.layers\.", "vision.layers."),
        (r"model\.multi_modal_projector\.", "connector.projector.linear."),
    ]
    return rows + [
        (rf"{tower}global_transformer\.layers\.{block}\.", f"vision.layers.{TOWER_LOCAL + block}.")
        for block in range(TOWER_GLOBAL)
    ]


def weights_for_ours(theirs: nn.Module) -> dict[str, Tensor]:
    """Return copies of their weights with our names and shapes, without weights that our model lacks."""
    found: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        for pattern, replacement in [*_tower_names(), *_text_names()]:
            renamed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                renamed = renamed.replace(".fc1.", ".up_proj.").replace(".fc2.", ".down_proj.")
                found[renamed] = parameter.detach().clone()
                break
    for name in [name for name in found if name.endswith("mlp.experts.gate_up_proj") and len(found[name]) == 1]:
        layer = name.removesuffix("experts.gate_up_proj")
        gate, up = found.pop(name)[0].chunk(2)
        down = found.pop(f"{layer}experts.down_proj")[0]
        del found[f"{layer}gate.weight"]
        found |= {f"{layer}gate_proj.weight": gate, f"{layer}up_proj.weight": up, f"{layer}down_proj.weight": down}
    if "connector.projector.linear.weight" in found:
        found["vision.patch_embed.projection.weight"] = found["vision.patch_embed.projection.weight"].flatten(1)
        matrix = found["connector.projector.linear.weight"]
        # Their feature layers are interleaved channel by channel; ours are concatenated.
        kept = matrix[:, WIDTH:].view(WIDTH, WIDTH, len(KEPT)).transpose(1, 2).flatten(1)
        found["connector.projector.linear.weight"] = torch.cat([matrix[:, :WIDTH], kept], dim=1)
        found["decoder.embed_tokens.weight"] = found["decoder.embed_tokens.weight"][:VOCAB]  # Theirs has 8 more rows.
    return found


def fill_from(source: dict[str, Tensor]) -> Callable[..., None]:
    """Return ``initialise`` for ``mmscale.engine.construct``, which copies every parameter from ``source``."""

    def initialise(model: nn.Module, *, gather: Gather) -> None:
        for name, parameter in model.named_parameters():
            with gather([parameter]), torch.no_grad():
                parameter.copy_(source[name].reshape(parameter.shape))

    return initialise
