"""Missing keys of a ``config.json`` get the class defaults of transformers, in every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from mmscale.errors import CheckpointError
from mmscale.hf.class_defaults import CLASS_DEFAULTS
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import LAYOUTS, layout_of

pytestmark = pytest.mark.parity
_OWN_CODE = {"intern_vit_6b"}
"""Families without a class in transformers."""
_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_SOUND = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "activation_function": "silu",
}
_FULL = {"sliding_window": None}
TINY: dict[str, dict[str, Any]] = {
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 2], "attn_resolutions": [1], "hidden_size": 64},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 2], "num_embeddings": 16, "num_patches": 4},
    "llama": {**_TEXT, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}},
    "qwen2": {**_TEXT, "num_key_value_heads": 2, "rms_norm_eps": 1e-4, "tie_word_embeddings": True},
    "mistral": {**_TEXT, **_FULL, "num_key_value_heads": 2, "head_dim": 32},
    "olmo2": {**_TEXT, "num_key_value_heads": 2, "attention_bias": True},
    "olmoe": {**_TEXT, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "mixtral": {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 6, "router_aux_loss_coef": 0.02},
    "qwen3": {**_TEXT, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    "qwen3_moe": {
        **_TEXT,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "persimmon": {**_TEXT, "rope_parameters": {"rope_theta": 25e3, "rope_type": "default"}},
    "fuyu": {
        "patch_size": 6,
        "text_config": {**_TEXT, "model_type": "persimmon", "rope_parameters": {"rope_theta": 25e3}},
    },
    "mllama": {
        "text_config": {**_TEXT, "num_key_value_heads": 2, "num_hidden_layers": 7, "cross_attention_layers": [1, 4]},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 28,
            "intermediate_layers_indices": [1, 2],
            "vision_output_dim": 96,
        },
    },
    "qwen2_vl": {
        "text_config": {
            **_TEXT,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    },
    "qwen2_5_vl": {
        "text_config": {
            **_TEXT,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
    },
    "qwen2_5_omni_thinker": {
        "text_config": {
            **_TEXT,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
        "audio_config": {**_SOUND, "n_window": 5, "output_dim": 64},
        "position_id_per_seconds": 20,
    },
    "llava": {
        "text_config": {**_TEXT, **_FULL, "model_type": "mistral", "num_key_value_heads": 2, "head_dim": 32},
        "vision_config": {**_TEXT, "model_type": "pixtral", "patch_size": 4},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu_pytorch_tanh",
        "multimodal_projector_bias": False,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2", "num_key_value_heads": 2},
        "vision_config": {**_TEXT, "image_size": [28, 28], "patch_size": [7, 7], "attention_bias": True},
        "projector_hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": False,
    },
    **{
        family: {
            "text_config": {**_TEXT, "model_type": "llama", "num_key_value_heads": 2},
            "vision_config": {**_TEXT, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
            "scale_factor": 4,
        }
        for family in ("idefics3", "smolvlm")
    },
    "aria": {
        "text_config": {**_TEXT, "num_key_value_heads": 2, "moe_num_experts": 6, "moe_num_shared_experts": 1},
        "vision_config": {**_TEXT, "model_type": "idefics3_vision", "image_size": 42, "patch_size": 7},
        "projector_patch_to_query_dict": {"9": 3, "36": 5},
    },
    "emu3": {
        "text_config": {**_TEXT, "vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0},
        "vq_config": {
            "codebook_size": 2,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [1],
            "hidden_size": 64,
        },
        "vocabulary_map": {"<|visual token 000000|>": 30, "<|visual token 000001|>": 31, "<image>": 3},
    },
    "janus": {
        "text_config": {**_TEXT, "model_type": "llama", "num_key_value_heads": 2},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "mlp_ratio": 2.0,
            "projection_dim": 64,
            "num_image_tokens": 4,
        },
        "vq_config": {"num_embeddings": 16, "base_channels": 32, "projection_dim": 64, "image_token_embed_dim": 64},
        "tie_word_embeddings": False,
    },
    "clip": {
        "text_config": {**_TEXT, "hidden_act": "gelu"},
        "vision_config": {**_TEXT, "image_size": 64, "patch_size": 16, "hidden_act": "gelu"},
        "projection_dim": 24,
        "logit_scale_init_value": 1.5,
    },
    "clip_vision_model": {**_TEXT, "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-4},
    "siglip": {"vision_config": {**_TEXT, "image_size": 48, "patch_size": 8, "layer_norm_eps": 1e-4}},
    "siglip_vision_model": {**_TEXT, "image_size": 48, "patch_size": 8, "hidden_act": "gelu"},
    "internvl_vision": {**_TEXT, "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": True},
    "qwen2_audio_encoder": _SOUND,
    "qwen2_audio": {
        "text_config": {**_TEXT, "model_type": "qwen2", "num_key_value_heads": 2},
        "audio_config": {**_SOUND, "model_type": "qwen2_audio_encoder"},
    },
}
"""Small configurations whose values differ from the class defaults."""


def _paths(values: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key, nested objects included."""
    for key, value in values.items():
        if key not in ("model_type", "architectures", "transformers_version"):
            yield (*before, key)
            if isinstance(value, dict):
                yield from _paths(value, (*before, key))


def _read(values: dict[str, Any]) -> Any:
    """Return the imported configuration, or None if the import rejects the values."""
    try:
        return forward_config(layout_of(values["model_type"]).model_config(values, "config.json"))
    except CheckpointError:
        return None


@pytest.mark.parametrize("family", sorted(set(CLASS_DEFAULTS) - _OWN_CODE))
def test_the_table_is_that_of_the_classes(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family).to_dict()
    theirs["rope_theta"] = (theirs.get("rope_parameters") or {}).get("rope_theta")
    theirs["partial_rotary_factor"] = (theirs.get("rope_parameters") or {}).get("partial_rotary_factor")
    if family == "llama":
        theirs["head_dim"] = None  # The class computes it from other keys.
    for key, value in CLASS_DEFAULTS[family].items():
        found = theirs[key]
        if key in ("image_size", "patch_size") and not isinstance(found, int):
            found = found[0]
        if key in ("num_key_value_heads", "head_dim") and value is None:
            continue  # Computed from other keys; compared below.
        if key == "sliding_window" and "use_sliding_window" in CLASS_DEFAULTS[family]:
            continue  # The class drops an unused window.
        assert found == value, key


def test_every_family_has_a_small_configuration() -> None:
    theirs = {layout.model_type for layout in LAYOUTS if layout.auto_class is not None}
    assert set(TINY) == theirs


def _completed(values: dict[str, Any]) -> dict[str, Any] | None:
    """Return a ``config.json`` that the class has completed; None if the class rejects it."""
    try:
        return transformers.AutoConfig.for_model(**copy.deepcopy(values)).to_dict()
    except Exception:  # The classes raise several types.
        return None


MUST_BE_THERE = {
    "persimmon": {"rope_parameters", "rope_parameters.rope_theta"},  # Its default differs between versions.
    "fuyu": {"text_config", "text_config.rope_parameters", "text_config.rope_parameters.rope_theta"},
    "mllama": {"text_config", "vision_config"},
    "aria": {"text_config", "vision_config"},
    "llava": {"text_config"},
    "internvl": {"text_config", "vision_config"},
    "idefics3": {"text_config"},
    "smolvlm": {"text_config"},
    "clip": {"text_config", "vision_config"},
    "siglip": {"vision_config"},
    "emu3": {"text_config"},
    "qwen2_audio": {"text_config", "audio_config"},
}
"""Keys that a folder must have. A missing key of another name is an error only if the completed values contradict."""


@pytest.mark.parametrize("family", TINY)
def test_a_key_left_out_is_the_class_default(family: str) -> None:
    """Importing a file without a key equals importing the file that transformers has completed, or both fail."""
    whole = _completed({"model_type": family, **TINY[family]})
    assert whole is not None
    assert _read(whole) is not None
    refused = set()
    for path in _paths(whole):
        reduced = copy.deepcopy(whole)
        block = reduced
        for key in path[:-1]:
            block = block[key]
        del block[path[-1]]
        completed, ours = _completed(reduced), _read(reduced)
        theirs = None if completed is None else _read(completed)
        if ours is None and theirs is not None:
            refused.add(".".join(path))
        else:
            assert ours == theirs, path
    assert refused == MUST_BE_THERE.get(family, set())


def test_internvit_by_its_authors_differs_from_that_of_transformers() -> None:
    """The defaults are those of the published ``configuration_intern_vit.py``; transformers has no class for it."""
    vision = (
        layout_of("intern_vit_6b").model_config({"model_type": "intern_vit_6b"}, "config.json").model_dump()["vision"]
    )
    assert (vision["norm"]["kind"], vision["norm"]["eps"], vision["attention"]["qk_norm"]) == ("rmsnorm", 1e-6, "full")
    assert (vision["hidden_dim"], vision["num_layers"], vision["positions"]["grid"]) == (3200, 48, (16, 16))
