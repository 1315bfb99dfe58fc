"""Learned positions in the decoder: parity with transformers, and errors for sequences that are too long.

Distances are the largest difference over the largest value. Measured worst cases: hidden rows 3.4e-7, logits 2.1e-7,
gradients 2.6e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from data_pipeline.errors import SampleError
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.packer import Budget
from data_pipeline.packing.synthetic_documents import dummy_document
from mmscale.models.build import build_weights, media_spec
from mmscale.models.generation import generate
from mmscale.optim.schedule import decays, tables
from mmscale.shrink.model import shrink
from tests.data_pipeline.packing.test_packer import make_document
from tests.models.packs import pack, text_document
from tests.models.reference_models import copy_weights, distance, gradient_distance, randomise
from tests.models.test_parity import LENGTHS, text_batch, text_model
from tests.models.tiny import VOCAB, config, model
from tests.parity_table import Recorder

BOUND, GRADIENT_BOUND = 2e-6, 8e-6
LEARNED: dict[str, Any] = {"rope": None, "learned_positions": max(LENGTHS)}
BIASED = {"num_heads": 4, "qkv_bias": True, "out_bias": True}
LAYER_NORM = {"kind": "layernorm", "eps": 1e-5}
CLIP_NAMES = [
    (r"embeddings\.token_embedding\.", "decoder.embed_tokens."),
    (r"embeddings\.position_embedding\.", "decoder.embed_positions."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"decoder.layers.\1.self_attn.o_proj."),
    (r"encoder\.layers\.(\d+)\.layer_norm1\.", r"decoder.layers.\1.input_layernorm."),
    (r"encoder\.layers\.(\d+)\.layer_norm2\.", r"decoder.layers.\1.post_attention_layernorm."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"decoder.layers.\1.mlp.up_proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"decoder.layers.\1.mlp.down_proj."),
    (r"encoder\.", "decoder."),
    (r"final_layer_norm\.", "decoder.norm."),
]


@pytest.mark.parity
def test_clip_text_tower(parity: Recorder) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs = CLIPTextModel(CLIPTextConfig(vocab_size=120, max_position_embeddings=max(LENGTHS), **sizes))
    randomise(theirs)
    mlp = {"kind": "dense", "hidden_dim": 96, "gated": False, "activation": "quick_gelu", "bias": True}
    ours = text_model(BIASED, mlp, norm=LAYER_NORM, **LEARNED)
    source = copy_weights(ours, theirs, CLIP_NAMES, optional=r"head\.")
    batch = text_batch(120)
    hidden = ours(batch).hidden
    rows = [theirs(input_ids=ids[None]).last_hidden_state[0] for ids in batch.token_ids.split(LENGTHS)]
    expected = torch.cat(rows)
    parity("clip_text_model", "hidden rows", distance(hidden, expected), BOUND)
    output_gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)) / 8
    hidden.backward(output_gradient)
    expected.backward(output_gradient)
    assert len(source) == len(list(ours.decoder.parameters()))
    parity("clip_text_model", "gradients", gradient_distance(ours, source), GRADIENT_BOUND)


def gpt2_parameters(theirs: nn.Module) -> dict[str, Tensor]:
    """Return GPT-2's values under our names. Its matrices are transposed; queries, keys and values are one matrix."""
    names = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj"}
    names |= {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    out: dict[str, Tensor] = {}
    for full, parameter in theirs.named_parameters():
        name, values = full.removeprefix("transformer."), parameter.detach()
        for old, new in {
            "wte": "decoder.embed_tokens",
            "wpe": "decoder.embed_positions",
            "ln_f": "decoder.norm",
        }.items():
            name = name.replace(old, new)
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        if name.startswith("h."):
            name = f"decoder.layers.{name.removeprefix('h.')}"
            values = values.t() if values.dim() == 2 else values
        if ".attn.c_attn." in name:
            for letter, part in zip("qkv", values.chunk(3), strict=True):
                out[name.replace("attn.c_attn", f"self_attn.{letter}_proj")] = part
        else:
            out[name] = values
    return out


@pytest.mark.parity
def test_gpt2(parity: Recorder) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": max(LENGTHS), "vocab_size": 120}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    randomise(theirs)
    mlp = {"kind": "dense", "hidden_dim": 96, "gated": False, "activation": "gelu_tanh", "bias": True}
    ours = text_model(BIASED, mlp, norm=LAYER_NORM, tie_embeddings=True, **LEARNED)
    values = gpt2_parameters(theirs)
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(values.pop(name))
    assert not values
    batch = text_batch(120)
    logits = ours.head(ours(batch).hidden)
    expected = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in batch.token_ids.split(LENGTHS)])
    parity("gpt2", "logits", distance(logits, expected), BOUND)
    output_gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / 8
    logits.backward(output_gradient)
    expected.backward(output_gradient)
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    gradients = gpt2_parameters(theirs)
    largest = max(float(values.abs().max()) for values in gradients.values())
    for name, parameter in ours.named_parameters():
        scale = max(float(gradients[name].abs().max()), 1e-3 * largest)  # Key biases: rounding only.
        parity("gpt2", "gradients", float((parameter.grad - gradients[name]).abs().max()) / scale, GRADIENT_BOUND)


def test_a_sequence_beyond_the_table_is_rejected_before_the_lookup() -> None:
    net = model(None, rope=None, learned_positions=9)
    spec = media_spec(net.config)
    fits, too_long = (pack([text_document(1, length, VOCAB) for length in lengths], spec) for lengths in ([9, 4], [10]))
    net(fits)
    with pytest.raises(ValueError, match=r"a document of 10 tokens exceeds decoder\.learned_positions=9"):
        net(too_long)
    prompt = pack([text_document(1, 6, VOCAB)], spec)
    assert len(generate(net, prompt, 3, eos_id=-1)[0]) == 3
    with pytest.raises(ValueError, match="a prompt with its new tokens of 10 tokens"):
        generate(net, prompt, 4, eos_id=-1)


def test_documents_are_cut_to_the_table() -> None:
    spec = media_spec(config(None, rope=None, learned_positions=8))
    assert spec.max_document_tokens == 8

    def budget(too_long: str) -> Budget:
        return Budget(PackingConfig(max_tokens=40, too_long=too_long), spec, dummy_document(spec, 0))

    document = make_document(0, 19)
    assert [part.num_tokens for part in budget("split").admit(document)] == [8, 8, 4]
    assert [part.num_tokens for part in budget("truncate").admit(document)] == [8]
    with pytest.raises(SampleError, match=r"positions for 8 tokens of a document; .*set packing\.too_long"):
        budget("error").admit(document)
    assert budget("error").admit(make_document(0, 7))[0].num_tokens == 8


def test_rope_and_learned_positions_exclude_each_other() -> None:
    with pytest.raises(
        ValidationError, match="learned_positions=8: a decoder has one kind of positions; set rope=null"
    ):
        config(None, learned_positions=8)
    assert not hasattr(model(None, rope=None).decoder.embed_positions, "weight")


def test_the_position_table_is_treated_as_a_table() -> None:
    """It decays like matrices, Muon does not update it, and a smoke-test model takes documents of the same length."""
    settings = config(None, rope=None, learned_positions=77)
    net = build_weights(settings)
    table = net.decoder.embed_positions.weight
    assert id(table) in tables(net)
    assert decays("decoder.embed_positions.weight", table.shape)
    assert any(parameter is table for parameter in net.components()["decoder"])
    assert shrink(settings).decoder.learned_positions == 77
