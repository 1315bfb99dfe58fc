"""Tiny random Hugging Face models with the same weights: same outputs, same gradients, in float32.

Differences are the largest in a tensor, relative to its largest value. Measured worst cases: 6e-7 in outputs, 3.5e-6 in
gradients of sums over 60 tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.vision import patch_coordinates
from tests.models.reference_models import copy_weights, distance, gradient_distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 8e-6
LENGTHS = [17, 1, 42]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def text_batch(vocab: int, position_ids: Tensor | None = None, lengths: list[int] = LENGTHS) -> MultimodalBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths]) if position_ids is None else position_ids
    ones = torch.ones(len(ids))
    return MultimodalBatch(
        ids, ids, ones, positions, Segments.from_lengths(lengths), ones.bool(), weight=float(len(ids))
    )


def text_model(attention: dict[str, Any], mlp: dict[str, Any], **decoder: Any) -> MultimodalModel:
    block = {"vocab_size": 120, "hidden_dim": 64, "num_layers": 3, "attention": attention, "mlp": mlp, **decoder}
    return build_model(ModelConfig.model_validate({"decoder": block}))


def assert_same_text(ours: MultimodalModel, theirs: Any, table: list[tuple[str, str]], parity: Recorder) -> None:
    """Compare our packed documents with one call of their model for each document."""
    family = theirs.config.model_type
    randomise(theirs)
    source = copy_weights(ours, theirs, table)
    batch = text_batch(120)
    logits = ours.head(ours(batch).hidden)
    documents = batch.token_ids.split(LENGTHS)
    expected = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in documents])
    parity(family, "logits", distance(logits, expected), BOUND)
    output_gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / 8
    logits.backward(output_gradient)
    expected.backward(output_gradient)
    parity(family, "gradients", gradient_distance(ours, source), GRADIENT_BOUND)


HEADED = [(r"model\.", "decoder."), (r"lm_head\.", "head.")]


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool, parity: Recorder) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 16, **LLAMA3}
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=120,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            rope_parameters=rope,
        )
    )
    ours = text_model(
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 24},
        {"kind": "dense", "hidden_dim": 128},
        rope={"theta": 5e5, "scaling": {**LLAMA3, "original_context": 16}},
        tie_embeddings=tied,
    )
    assert_same_text(ours, theirs, HEADED, parity)


def test_qwen2_with_biases(parity: Recorder) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=120,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    ours = text_model(
        {"num_heads": 4, "num_kv_heads": 1, "qkv_bias": True},
        {"kind": "dense", "hidden_dim": 128},
        norm={"eps": 1e-6},
        rope={"theta": 1e6},
    )
    assert_same_text(ours, theirs, HEADED, parity)


def test_olmo2_with_norms_after_sub_layers_and_full_qk_norm(parity: Recorder) -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    theirs = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=120,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
    )
    ours = text_model(
        {"num_heads": 4, "qk_norm": "full"},
        {"kind": "dense", "hidden_dim": 128},
        norm={"eps": 1e-6},
        norm_placement="post",
        rope={"theta": 5e5},
    )
    table = [
        (r"model\.layers\.(\d+)\.post_attention_layernorm", r"decoder.layers.\1.input_layernorm"),
        (r"model\.layers\.(\d+)\.post_feedforward_layernorm", r"decoder.layers.\1.post_attention_layernorm"),
    ]
    assert_same_text(ours, theirs, [*table, *HEADED], parity)


@pytest.mark.parametrize("renormalise", [True, False])
def test_olmoe(renormalise: bool, parity: Recorder) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    theirs = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=120,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=renormalise,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )
    experts = {"kind": "moe", "num_experts": 8, "experts_per_token": 3, "expert_dim": 32, "renormalise": renormalise}
    ours = text_model({"num_heads": 4, "qk_norm": "full"}, experts, rope={"theta": 1e4})
    assert_same_text(ours, theirs, HEADED, parity)


def test_mixtral_chooses_before_its_softmax(parity: Recorder) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=120,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    experts = {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert_dim": 32, "router": "topk_then_softmax"}
    ours = text_model({"num_heads": 4, "num_kv_heads": 2}, experts, rope={"theta": 1e6})
    assert_same_text(ours, theirs, HEADED, parity)


def mllama_text() -> tuple[Any, Any, dict[str, Tensor]]:
    """Return our model with cross-attention, theirs, and what ``copy_weights`` returned for them."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 64, **LLAMA3}
    theirs = MllamaForCausalLM(
        MllamaTextConfig(
            vocab_size=120,
            hidden_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            cross_attention_layers=[3],
            pad_token_id=0,
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
    )
    randomise(theirs)
    dense = {"kind": "dense", "hidden_dim": 128}
    ours: Any = build_model(
        ModelConfig.model_validate(
            {
                "decoder": {
                    "vocab_size": 128,  # Theirs has 8 more rows in the embedding than in the head.
                    "hidden_dim": 64,
                    "num_layers": 4,
                    "attention": {"num_heads": 4, "num_kv_heads": 2},
                    "mlp": dense,
                    "rope": {"theta": 5e5, "scaling": {**LLAMA3, "original_context": 64}},
                },
                "vision": {
                    "patch_size": 2,
                    "hidden_dim": 64,
                    "num_layers": 1,
                    "attention": {"num_heads": 2},
                    "mlp": dense,
                    "positions": {"kind": "rotary_2d"},
                },
                "connector": {"kind": "cross_attention", "every": 4},
            }
        )
    )
    table = [
        (r"model\.layers\.3\.", "connector.blocks.3."),
        (r"model\.layers\.4\.", "decoder.layers.3."),
        (r"model\.", "decoder."),
    ]
    source = copy_weights(ours, theirs, table, optional=r"vision|head|connector\.projector")
    with torch.no_grad():
        ours.head.weight[:120] = theirs.lm_head.weight
        projector: Any = ours.connector.projector.linear
        projector.weight.copy_(torch.eye(64))
    return ours, theirs, source


def test_mllama_text_with_cross_attention(parity: Recorder) -> None:
    """The image comes first: for text before an image, Hugging Face differs from Meta's code, which ours follows."""
    ours, theirs, source = mllama_text()
    lengths, num_keys = [11, 6], [9, 14]
    batch = text_batch(120, lengths=lengths)
    features = torch.randn(sum(num_keys), 64, generator=torch.Generator().manual_seed(4))
    empty = torch.empty(0, dtype=torch.int64)
    media = MediaBlock(
        torch.empty(0), torch.empty(0), ((1, 1, 9), (1, 2, 7)), Segments.from_lengths(num_keys), empty, empty,
        torch.arange(sum(num_keys)), batch.segments, Segments.from_lengths(num_keys),
    )  # fmt: skip
    hidden = ours.decoder.embed_tokens(batch.token_ids)
    hidden, attended = ours.connector.connect(hidden, features, hidden[:0], media, batch.segments, None)
    hidden, _ = ours.decoder(hidden, batch.position_ids, batch.segments, None, attended)
    logits = ours.head(hidden)[:, :120]
    expected = torch.cat(
        [
            theirs(
                input_ids=ids[None],
                cross_attention_states=states[None],
                # Without a mask its attention would be causal.
                cross_attention_mask=torch.zeros(1, 1, len(ids), len(states)),
            ).logits[0]
            for ids, states in zip(batch.token_ids.split(lengths), features.split(num_keys), strict=True)
        ]
    )
    parity("mllama", "logits", distance(logits, expected), BOUND)
    output_gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / 8
    logits.backward(output_gradient)
    expected.backward(output_gradient)
    parity("mllama", "gradients", gradient_distance(ours, source), GRADIENT_BOUND)


def vision_media(values: Tensor, grids: tuple[tuple[int, int, int], ...]) -> MediaBlock:
    empty = torch.empty(0, dtype=torch.int64)
    none = Segments.from_lengths([])
    items = Segments.from_lengths([t * h * w for t, h, w in grids])
    return MediaBlock(values, torch.tensor(grids), grids, items, empty, empty, empty, none, none)


def vision_model(**vision: Any) -> MultimodalModel:
    block = {
        "decoder": {
            "vocab_size": 8,
            "hidden_dim": 16,
            "num_layers": 1,
            "attention": {"num_heads": 1},
            "mlp": {"kind": "dense", "hidden_dim": 8},
        },
        "vision": vision,
        "connector": {"kind": "embedding"},
    }
    return build_model(ModelConfig.model_validate(block))


BIASED = {"num_heads": 4, "qkv_bias": True, "out_bias": True}
BLOCK_NAMES = [
    (r"(.*)\.layer_norm1", r"\1.input_layernorm"),
    (r"(.*)\.layer_norm2", r"\1.post_attention_layernorm"),
    (r"(.*)out_proj", r"\1o_proj"),
    (r"(.*)fc1", r"\1up_proj"),
    (r"(.*)fc2", r"\1down_proj"),
]


def test_clip_vision(parity: Recorder) -> None:
    """Class token, learned positions, ``pre_norm``, and features of two blocks (as in Molmo)."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
        )
    )
    randomise(theirs)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    ours = vision_model(
        patch_size=7,
        hidden_dim=32,
        num_layers=3,
        attention=BIASED,
        mlp={"hidden_dim": 64, "gated": False, "activation": "quick_gelu", "bias": True},
        norm={"kind": "layernorm"},
        positions={"kind": "learned", "grid": [4, 4]},
        class_token=True,
        pre_norm=True,
        post_norm=False,
        feature_layers=[1],
        mean=mean,
        std=std,
    )
    tower = ours.vision
    assert tower is not None
    renames = {r"(.*?)encoder\.layers": "layers", r"(.*?)pre_layrnorm": "pre_norm"}
    renames |= {r"(.*?)embeddings\.class_embedding": "positions.class_embedding"}
    renames |= {r"(.*?)embeddings\.patch_embedding": "patch_embed.projection"}
    renames |= {r"(.*?)embeddings\.position_embedding\.weight": "positions.position_embedding"}
    source = copy_weights(tower, _renamed(theirs, list(renames.items()), BLOCK_NAMES), [(r"", "")])
    pixels = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    patches = pixels.view(3, 3, 4, 7, 4, 7).permute(0, 2, 4, 1, 3, 5).reshape(48, 3 * 49)
    features = tower(vision_media(patches, ((1, 4, 4),) * 3))
    scaled = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    states = theirs(pixel_values=scaled, output_hidden_states=True).hidden_states
    expected = torch.cat([states[3], states[2]], dim=-1)[:, 1:].flatten(0, 1)
    parity("clip_vision_model", "features", distance(features, expected), BOUND)
    output_gradient = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)) / 8
    features.backward(output_gradient)
    expected.backward(output_gradient)
    parity("clip_vision_model", "gradients", gradient_distance(tower, source), GRADIENT_BOUND)


class _renamed(torch.nn.Module):  # noqa: N801
    """A module whose parameters have other names."""

    def __init__(self, module: torch.nn.Module, *tables: list[tuple[str, str]]) -> None:
        super().__init__()
        import re

        self.pairs = []
        for name, parameter in module.named_parameters():
            for table in tables:
                for pattern, replacement in table:
                    name = re.sub(f"^{pattern}", replacement, name)
            self.pairs.append((name, parameter))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.pairs)


def test_pixtral_vision_at_native_resolution(parity: Recorder) -> None:
    from transformers import PixtralVisionConfig, PixtralVisionModel

    theirs = PixtralVisionModel(
        PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=4,
            hidden_act="silu",
        )
    )
    randomise(theirs)
    ours = vision_model(
        patch_size=4,
        hidden_dim=32,
        num_layers=2,
        attention={"num_heads": 2},
        mlp={"hidden_dim": 64},
        positions={"kind": "rotary_2d", "layout": "alternating"},
        pre_norm=True,
        post_norm=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    tower = ours.vision
    assert tower is not None
    first = [(r"patch_conv", "patch_embed.projection"), (r"ln_pre", "pre_norm"), (r"transformer\.layers", "layers")]
    inner = [
        (r"(.*)attention_norm", r"\1input_layernorm"),
        (r"(.*)ffn_norm", r"\1post_attention_layernorm"),
        (r"(.*)\.attention\.", r"\1.self_attn."),
        (r"(.*)feed_forward", r"\1mlp"),
    ]
    source = copy_weights(tower, _renamed(theirs, first, inner), [(r"", "")])
    sizes = [(12, 20), (24, 8)]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]
    patches = torch.cat(
        [
            i.view(3, h // 4, 4, w // 4, 4).permute(1, 3, 0, 2, 4).reshape(-1, 48)
            for i, (h, w) in zip(images, sizes, strict=True)
        ]
    )
    features = tower(vision_media(patches, tuple((1, h // 4, w // 4) for h, w in sizes)))
    expected = torch.cat(
        [
            theirs(pixel_values=image[None] / 255, image_sizes=torch.tensor([size])).last_hidden_state[0]
            for image, size in zip(images, sizes, strict=True)
        ]
    )
    parity("pixtral", "features", distance(features, expected), BOUND)
    output_gradient = torch.randn(features.shape, generator=generator) / 8
    features.backward(output_gradient)
    expected.backward(output_gradient)
    parity("pixtral", "gradients", gradient_distance(tower, source), GRADIENT_BOUND)


def test_qwen2_vl_positions_and_merger(parity: Recorder) -> None:
    """Two-axis image rotations, the 2x2 merger, and three-axis text rotations."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig, Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, Qwen2VLTextModel

    from mmscale.models.connector_config import MlpProjectorConfig
    from mmscale.models.connectors.projector import Projector, merge_order
    from mmscale.nn.rope import Rotary2dConfig, image_rotation

    assert Qwen2VLConfig is not None
    rows, columns = (torch.from_numpy(a) for a in patch_coordinates([(1, 4, 6)]))
    ours = image_rotation(rows, columns, 16, Rotary2dConfig(), torch.float32)
    inverse = 1.0 / 1e4 ** (torch.arange(0, 8, 2).float() / 8)
    expected = torch.cat([rows[:, None] * inverse, columns[:, None] * inverse], dim=1)
    parity("qwen2_vl", "image rotation", distance(ours.cos, expected.cos()), BOUND)
    parity("qwen2_vl", "image rotation", distance(ours.sin, expected.sin()), BOUND)

    merger = PatchMerger(dim=24, context_dim=16, spatial_merge_size=2)
    randomise(merger)
    projector = Projector(16, 24, MlpProjectorConfig(merge=2, norm="before_merge", hidden_dim=64))
    copy_weights(projector, merger, [(r"ln_q", "norm"), (r"mlp\.0", "fc1"), (r"mlp\.2", "fc2")])
    features = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    order = torch.from_numpy(merge_order([(1, 4, 6)], 2))
    parity("qwen2_vl", "merger", distance(projector(features, [(1, 4, 6)]), merger(features[order])), BOUND)

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    shape = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    theirs = Qwen2VLTextModel(
        Qwen2VLTextConfig(
            **shape, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_parameters=rope
        )
    )
    randomise(theirs)
    net = text_model(
        {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True},
        {"kind": "dense", "hidden_dim": 128},
        norm={"eps": 1e-6},
        rope={"theta": 1e6, "sections": [2, 3, 3]},
    )
    copy_weights(net.decoder, theirs, [(r"", "")])
    positions = torch.randint(0, 30, (20, 3), generator=torch.Generator().manual_seed(5))
    batch = text_batch(120, positions, [20])
    expected = theirs(
        inputs_embeds=theirs.embed_tokens(batch.token_ids[None]), position_ids=positions.t()[:, None]
    ).last_hidden_state[0]
    parity("qwen2_vl", "hidden rows", distance(net(batch).hidden, expected), BOUND)
