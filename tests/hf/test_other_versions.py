"""Forms of ``config.json`` from several versions of transformers: missing defaults, repeated keys, unused windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from mmscale.errors import CheckpointError
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import layout_of
from tests.hf.test_class_defaults import TINY
from tests.hf.test_nvlm import configuration
from tests.hf.test_published import PUBLISHED

pytestmark = pytest.mark.parity


def read(values: dict[str, Any]) -> dict[str, Any]:
    return forward_config(layout_of(values["model_type"]).model_config(values, "config.json"))


def whole(family: str, **keys: Any) -> dict[str, Any]:
    """Return a small configuration with every key, as version 5 writes it."""
    return transformers.AutoConfig.for_model(family, **copy.deepcopy({**TINY[family], **keys})).to_dict()


def test_a_tower_of_class_defaults_alone() -> None:
    """Version 4.46 wrote these keys for the tower of Qwen2-VL 7B."""
    values = copy.deepcopy(PUBLISHED["qwen2-vl-7b"])
    values["vision_config"] = {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}
    assert read(values) == read(PUBLISHED["qwen2-vl-7b"])
    values["vision_config"]["in_chans"] = 4
    with pytest.raises(CheckpointError, match="in_chans=4 is not supported, only 3"):
        read(values)


QWEN2_VL = {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 2, "hidden_act": "silu"}
REPEATED: dict[str, tuple[str, dict[str, Any]]] = {
    "all of Qwen2-VL's, the window idle": (
        "qwen2_vl",
        {
            **{key: TINY["qwen2_vl"]["text_config"][key] for key in ("hidden_size", "num_hidden_layers")},
            **QWEN2_VL,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 152064,
            "rope_theta": 5e4,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
        },
    ),
    "Qwen2-VL's base alone": ("qwen2_vl", {"rope_theta": 5e4}),
    "Fuyu's": (
        "fuyu",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "rope_theta": 25e3,
            "partial_rotary_factor": 0.5,
            "vocab_size": 262144,
            "hidden_act": "relu2",
            "qk_layernorm": True,
        },
    ),
}


@pytest.mark.parametrize("case", REPEATED)
def test_decoder_keys_twice(case: str) -> None:
    family, keys = REPEATED[case]
    assert read({**whole(family), **keys}) == read(whole(family))


CONTRADICTIONS = {
    "a width": ("qwen2_vl", {"hidden_size": 128}, "hidden_size=128 contradicts text_config, which has 64"),
    "a base": ("qwen2_vl", {"rope_theta": 1e4}, "rope_theta=10000.0 contradicts"),
    "sections": (
        "qwen2_vl",
        {"rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}},
        "rope_scaling=.* contradicts",
    ),
    "a window": (
        "qwen2_vl",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        "use_sliding_window=True contradicts",
    ),
    "Fuyu's share of a head": ("fuyu", {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 contradicts"),
    "Fuyu's norms": ("fuyu", {"qk_layernorm": False}, "qk_layernorm=False contradicts"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_decoder_keys_twice_and_different(case: str) -> None:
    family, keys, message = CONTRADICTIONS[case]
    values = whole(family)
    rope = values["text_config"].pop("rope_parameters")  # Both keys where version 4 has them.
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    values["text_config"] |= {"rope_theta": theta, "rope_scaling": rope}
    values["text_config"] |= {} if part is None else {"partial_rotary_factor": part}
    values["text_config"].pop("layer_types", None)
    read(values)
    with pytest.raises(CheckpointError, match=message):
        read({**values, **keys})


def test_fuyu_states_its_base_beside_the_block_alone() -> None:
    """Version 4 omitted it in ``text_config``, because it is Persimmon's class default."""
    values = whole("fuyu")
    expected = read(values)
    del values["text_config"]["rope_parameters"]["rope_theta"]
    with pytest.raises(CheckpointError, match="rope_theta is missing"):
        read(values)
    assert read({**values, "rope_theta": 25e3}) == expected
    with pytest.raises(CheckpointError, match="rope_theta is missing"):
        read({**values, "rope_theta": 1e4})


SLIDING = ["sliding_attention", "sliding_attention"]
IDLE: dict[str, tuple[str, dict[str, Any]]] = {
    "as long as the context": ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
    "none": ("mistral", {"sliding_window": None}),
    "not in use": ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    "from a block that is not there": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": None},
    ),
    "in no layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2},
    ),
    "in all, as long as the context": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32768, "layer_types": SLIDING},
    ),
}


@pytest.mark.parametrize("case", IDLE)
def test_windows_that_hide_nothing(case: str) -> None:
    family, keys = IDLE[case]
    values = {**whole(family), **keys}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**{**values, "vocab_size": 8}))
    found = [getattr(block.self_attn, "sliding_window", model.config.sliding_window) for block in model.layers]
    windows = {*found} - {None}
    assert all(window >= values["max_position_embeddings"] for window in windows)
    assert read(values) == read(whole(family))


HIDING: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mistral": ("mistral", {"sliding_window": 4095, "max_position_embeddings": 4096}, "sliding_window=4095 is shorter"),
    "Qwen2's last layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
        "sliding_window=16 is shorter",
    ),
    "Qwen2's layers by name": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": SLIDING},
        "sliding_window=16 is shorter",
    ),
    "layers that slide without a window": ("qwen2", {"layer_types": SLIDING}, "layer_types=.*use_sliding_window"),
    "other layers": ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types="),
    "too few layers": ("qwen2", {"layer_types": ["full_attention"]}, "num_hidden_layers=2"),
}


@pytest.mark.parametrize("case", HIDING)
def test_windows_that_hide_something(case: str) -> None:
    family, keys, message = HIDING[case]
    with pytest.raises(CheckpointError, match=message):
        read({**whole(family), **keys})


LIKE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a size that is no multiple of the patch": (
        "siglip_vision_model",
        {**TINY["siglip_vision_model"], "image_size": 54, "torch_dtype": "bfloat16"},
        {"image_size": 54},
    ),
    "one of a tower in a pair": (
        "clip",
        {**TINY["clip"], "vision_config": {**TINY["clip"]["vision_config"], "image_size": 70}},
        {"vision_config.image_size": 70},
    ),
    "keys of no effect": (
        "mistral",
        {**TINY["mistral"], "attention_bias": False, "sliding_window": 200_000, "bos_token_id": 7},
        {"attention_bias": False, "sliding_window": 200_000, "bos_token_id": 7, "max_position_embeddings": 131_072},
    ),
    "an idle window": (
        "qwen2",
        {**TINY["qwen2"], "sliding_window": 16, "use_sliding_window": False, "layer_types": None},
        {"sliding_window": 16, "use_sliding_window": False},
    ),
}


@pytest.mark.parametrize("case", LIKE)
def test_an_export_keeps_the_keys_of_a_folder_like_it(case: str) -> None:
    family, given, kept = LIKE[case]
    layout = layout_of(family)
    other = {**transformers.AutoConfig.for_model(family).to_dict(), **given, "model_type": family}
    if "vision_config" in given:
        other = {"model_type": family, **given}
    config = layout.model_config(other, "config.json")
    values = layout.with_keys_of(layout.config_values(config), other)
    for path, expected in kept.items():
        found: Any = values
        for key in path.split("."):
            found = found[key]
        assert found == expected, path
    assert "torch_dtype" not in values
    assert forward_config(layout.model_config(values, "again")) == forward_config(config)


def test_an_export_keeps_no_key_that_would_change_the_model() -> None:
    """The other folder has other sizes, a window that would hide tokens, and another RoPE base."""
    layout = layout_of("qwen2")
    config = layout.model_config(whole("qwen2"), "config.json")
    other = {**whole("qwen2"), "hidden_size": 128, "num_hidden_layers": 3, "rope_theta": 7.0, "rms_norm_eps": 0.1}
    other |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "eos_token_id": 11}
    other |= {"layer_types": ["full_attention"] * 3}
    values = layout.with_keys_of(layout.config_values(config), other)
    assert forward_config(layout.model_config(values, "again")) == forward_config(config)
    assert values["eos_token_id"] == 11
    assert "rope_theta" not in values
    assert "layer_types" not in values


def test_nvlm_keeps_what_its_file_says_of_biases() -> None:
    layout = layout_of("NVLM_D")
    published = configuration()
    published["llm_config"] |= {"attention_bias": True, "mlp_bias": False, "max_position_embeddings": 77}
    config = layout.model_config(published, "config.json")
    values = layout.with_keys_of(layout.config_values(config), published)
    assert values["llm_config"]["attention_bias"] is True
    assert values["llm_config"]["max_position_embeddings"] == 77
