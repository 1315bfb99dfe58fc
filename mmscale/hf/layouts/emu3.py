"""Emu3: Llama whose vocabulary holds the codes of an image tokenizer, and that tokenizer."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, with_prefix
from mmscale.hf.layouts import decoder, emu3_vqgan, image_blocks
from mmscale.hf.layouts.image_blocks import tokenizer_of
from mmscale.models.config import ModelConfig, TokenizerConfig
from mmscale.models.image_tokens import VocabularyImageTokensConfig
from mmscale.nn.block import DenseMlpConfig

_CODE = "<|visual token {:06d}|>"
_ROW_END, _PLACEHOLDER = "<|extra_200|>", "<image>"
_ROW_END_BEFORE, _PLACEHOLDER_BEFORE = 8, 208
"""Distance of these tokens from code 0 in the published vocabulary, where ``<image>`` replaces ``<|extra_0|>``."""

_SPECIAL_IDS = {"bos_token_id": 151_849, "eos_token_id": 151_850, "pad_token_id": 151_643}
"""Special tokens of the published vocabulary."""


def _rules(config: ModelConfig) -> NameRules:
    tokenizer = emu3_vqgan.LAYOUT.rules(tokenizer_of(config))
    return (*with_prefix(tokenizer, theirs=("", "vqmodel.")), *with_prefix(decoder.RULES, theirs=("", "text_model.")))


def _to_model(keys: Keys) -> ModelConfig:
    text = keys.required_object("text_config", "emu3_text_model")
    text.must_be("model_type", "emu3_text_model")
    bias = text.read("attention_bias", bool, False)
    model = decoder.to_model(
        text,
        attention={"qkv_bias": bias, "out_bias": bias},
        mlp_bias=text.read("mlp_bias", bool, False),
        drops=True,
        tie_embeddings=keys.read("tie_word_embeddings", bool),
        **dict.fromkeys(("dropout", "attention_dropout"), text.read("attention_dropout", float)),
        image_tokens=_image_tokens(keys),
    )
    text.raise_on_unread()
    tokenizer = emu3_vqgan.LAYOUT.to_model(vq := keys.required_object("vq_config", "emu3_vqgan"))
    vq.must_be("model_type", "emu3_vqgan")
    vq.raise_on_unread()
    assert isinstance(tokenizer, TokenizerConfig)
    return ModelConfig.model_validate({"decoder": model.decoder, "image_tokenizer": tokenizer.image_tokenizer})


def _image_tokens(keys: Keys) -> dict[str, Any]:
    """Return ``decoder.image_tokens`` of the codes in ``vocabulary_map``, whose ids must be consecutive."""
    ids = keys.read("vocabulary_map", dict)
    count = sum(name.startswith("<|visual token") for name in ids)
    first = ids.get(_CODE.format(0))
    if type(first) is not int or any(ids.get(_CODE.format(code)) != first + code for code in range(count)):
        raise CheckpointError(
            f"{keys.where}: vocabulary_map: the visual tokens {_CODE.format(0)}, {_CODE.format(1)}, ... must have "
            "consecutive ids"
        )
    return {"kind": "vocabulary", "first_id": first, "codes": count}


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    block, tokens = config.decoder, config.decoder.image_tokens
    if not isinstance(tokens, VocabularyImageTokensConfig) or not isinstance(block.mlp, DenseMlpConfig):
        raise CheckpointError("emu3 holds dense decoders with decoder.image_tokens.kind=vocabulary")
    text = {
        "model_type": "emu3_text_model",
        **decoder.to_keys(config),
        "attention_dropout": block.dropout,
        # The class accepts no null. A vocabulary without the published ids gets 0.
        **{key: token if token < block.num_ids else 0 for key, token in _SPECIAL_IDS.items()},
    }
    biases = {"attention_bias": block.attention.qkv_bias, "mlp_bias": block.mlp.bias}
    text |= {key: value for key, value in biases.items() if value}  # transformers leaves out false ones.
    first = tokens.first_id
    names = {_CODE.format(code): first + code for code in range(tokens.codes)}
    marks = {_ROW_END: max(first - _ROW_END_BEFORE, 0), _PLACEHOLDER: max(first - _PLACEHOLDER_BEFORE, 0)}
    return {
        "text_config": text,
        "vq_config": {"model_type": "emu3_vqgan", **emu3_vqgan.LAYOUT.to_keys(tokenizer_of(config))},
        "vocabulary_map": {**names, **marks},
        "tie_word_embeddings": block.tie_embeddings,
    }


LAYOUT = FamilyLayout(
    "emu3",
    "Emu3ForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    tuple(rf"text_model\.{name}" for name in decoder.UNUSED),
    aliases=(  # Version 5 of transformers uses these names in memory and writes those of the published folder.
        (r"^model\.text_model\.", "text_model.model."),
        (r"^lm_head\.", "text_model.lm_head."),
        (r"^model\.vqmodel\.", "vqmodel."),
    ),
    modules=(
        (r"^text_model\.model\.", "model.text_model."),
        (r"^text_model\.lm_head\.", "lm_head."),
        (r"^vqmodel\.", "model.vqmodel."),
    ),
    auto_class="AutoModelForImageTextToText",
    buffers=True,
    training_only=image_blocks.TRAINING_ONLY,
)
