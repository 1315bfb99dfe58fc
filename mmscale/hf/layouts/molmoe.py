"""Keys of MolmoE-1B-0924: Molmo with the decoder of OLMoE, in the names of the training code.

The published folder has the ``model_type`` of the dense models, another ``config.json``, and other names of tensors:

    model.transformer.blocks.3.attn.att_proj.weight              queries, keys and values
    model.transformer.blocks.3.mlp.experts.5.gate_proj.weight    each expert by itself, as OLMoE's folders
    lm_head.weight

Source: copies of the published ``config.json`` and ``modeling_molmoe.py`` in a public repository, which agree with the
training code (allenai/molmo, olmo/config.py and launch_scripts/utils.py). Neither names nor values were compared with
the published weights. The training code itself stores the experts in three matrices (``ffn.experts.mlp.w1``, ``v1`` and
``w2`` of megablocks); such checkpoints are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.nn.moe import MoeConfig

COUNT = "moe_num_experts"
"""A ``config.json`` of MolmoE has this key."""
NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}
"""Key of the dense models -> key of MolmoE."""
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "activation_type": ("swiglu",),
    "alibi": (False,),
    "attention_layer_norm_with_affine": (True,),
    "attn_logit_softcapping": (None,),
    "bias_for_layer_norm": (False,),
    "block_type": ("moe",),
    "final_logit_softcapping": (None,),
    "head_dim": (None,),
    "image_padding_embed": ("pad_and_partial_pad",),
    "image_pooling_2d": ("attention-meanq", "attention_meanq"),
    "image_pooling_h": (2,),
    "image_pooling_w": (2,),
    "image_projector": ("mlp",),
    "include_bias": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "moe_dropless": (True,),
    "moe_interleave": (False, None),
    "moe_shared_expert": (False, None),
    "multi_query_attention": (None, False),
    "normalize_input_embeds": (False,),
    "rope": (True,),
    "rope_impl": ("llama",),  # The class default rotates neighbouring channels, "llama" rotates halves.
    "scale_logits": (False,),
    "unconditioned": (False,),
    "use_cls_feature": (False,),
    "use_position_ids": (True,),
    "weight_tying": (False,),
}
"""Keys with the values that our model has. A missing key is an error: most class defaults are other values."""
_WITHOUT_EFFECT = (
    # Training, initial values and precision.
    *("attention_dropout", "attention_type", "block_group_size", "embedding_dropout", "float32_attention"),
    *("image_feature_dropout", "init_cutoff_factor", "init_device", "init_fn", "init_std", "loss_token_weighting"),
    *("low_cpu_fsdp", "max_sequence_length", "new_embedding_init_range", "precision", "residual_dropout"),
    *("response_attention_dropout", "response_residual_dropout", "rope_full_precision"),
    *("moe_capacity_factor", "moe_lbl_in_fp32", "moe_log_expert_assignment", "moe_mlp_impl"),
    # Values of other models of the training code.
    *("alibi_bias_max", "mlp_ratio", "query_pre_attn_scalar"),
    # Preparation of texts and images.
    *("always_start_with_space", "crop_mode", "default_inference_len", "do_random_scale", "fix_image_input_idx"),
    *("max_crops", "message_formatting", "overlap_margins", "prompt_type", "system_prompt_kind", "use_col_tokens"),
)


def to_model(keys: Keys) -> tuple[int, dict[str, Any]]:
    """Return twice the width of an expert, which is also twice that of the image projector, and ``decoder.mlp``.

    Raises:
        CheckpointError: a key is missing or needs a computation that our models lack.
    """
    for name, allowed in _FIXED.items():
        keys.read_keys.add(name)
        if keys.values.get(name) not in allowed:
            raise CheckpointError(f"{keys.describe(name)} is not supported, only {allowed[0]!r}")
    keys.read_keys.update(_WITHOUT_EFFECT)
    fused = keys.read("mlp_hidden_size", int, None)
    if fused is None:
        fused = keys.read("mlp_ratio", int) * keys.read("d_model", int)
    return fused, {
        "kind": "moe",
        "num_experts": keys.read(COUNT, int),
        "experts_per_token": keys.read("moe_top_k", int),
        "expert_dim": fused // 2,
        "balance_coefficient": keys.read("moe_loss_weight", float),
        "z_coefficient": keys.read("moe_zloss_weight", float, 0.0),
    }


def to_keys(experts: MoeConfig) -> dict[str, Any]:
    """Return the keys of the experts, and those with fixed values."""
    return {
        **{name: allowed[0] for name, allowed in _FIXED.items()},
        "architectures": ["OLMoForCausalLM"],
        "mlp_hidden_size": 2 * experts.expert_dim,
        COUNT: experts.num_experts,
        "moe_top_k": experts.experts_per_token,
        "moe_loss_weight": experts.balance_coefficient,
        "moe_zloss_weight": experts.z_coefficient,
    }


def check_tower(keys: Keys, size: Mapping[str, Any]) -> None:
    """Require that ``vision_backbone`` describes the tower that Molmo has; missing keys pass.

    Args:
        keys: Keys of ``vision_backbone``.
        size: Its sizes.

    Raises:
        CheckpointError: a key needs a computation that our tower lacks.
    """
    keys.must_be("image_model_type", "openai")
    keys.must_be("image_mlp_activations", "quick_gelu")
    keys.must_be("image_num_key_value_heads", size["image_num_heads"])
    keys.must_be("image_pos_patch_size", size["image_patch_size"])
    height, width = (side // size["image_patch_size"] for side in size["image_default_input_size"])
    keys.must_be("image_num_pos", 1 + height * width)
    keys.must_be("resize_mode", "default")
