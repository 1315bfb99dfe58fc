"""A tiny Molmo in plain torch: decoder and tower of transformers, and the code between them image by image.

It follows allenai/molmo, olmo/model.py (``MolmoVisionBackbone.forward``, ``Molmo.forward``) and olmo/image_vit.py, with
a batch dimension, dense masks and loops. ``save`` writes weights with the names and shapes of the published folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.data_pipeline.images.molmo_reference import Prepared, Sizes
from tests.hf.molmoe_keys import MOLMOE
from tests.models.reference_models import randomise

SIZES = Sizes(crop=24, patch=4, margin=2, most=4)
VOCAB, NEW = 90, 6
"""Rows of the embedding table; the ids 90 to 95 come after them."""
VIT = {"width": 16, "heads": 2, "layers": 4, "mlp": 40}
PICKED = (-2, -3)
FAMILIES = ("qwen2", "olmo2", "olmoe")
TOWER = {
    "image_default_input_size": [SIZES.crop, SIZES.crop],
    "image_patch_size": SIZES.patch,
    "image_emb_dim": VIT["width"],
    "image_num_heads": VIT["heads"],
    "image_head_dim": VIT["width"] // VIT["heads"],
    "image_num_layers": VIT["layers"],
    "image_mlp_dim": VIT["mlp"],
    "image_norm_eps": 1e-5,
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Example:
    """A document in the form that their collator expects.

    Attributes:
        ids: Token ids, ``(T,)``.
        images: For each image its crops, and the positions of their features in the document.
        subsegments: ``(T,)``. A token attends to earlier tokens whose number is not below its own.
        positions: Position ids, ``(T,)``.
    """

    ids: Tensor
    images: tuple[Prepared, ...]
    subsegments: Tensor
    positions: Tensor


class Molmo(nn.Module):
    """``family`` is the family of the decoder, ``vocab`` the number of rows of its table."""

    def __init__(self, family: str, vocab: int = VOCAB) -> None:
        super().__init__()
        keys: dict[str, Any] = {
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2 if family == "qwen2" else 4,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "attn_implementation": "eager",
            "pad_token_id": 0,
        }
        keys |= {"num_experts": 6, "num_experts_per_tok": 2} if family == "olmoe" else {}
        self.decoder = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **keys))
        tower = transformers.CLIPVisionConfig(
            hidden_size=VIT["width"],
            intermediate_size=VIT["mlp"],
            num_hidden_layers=VIT["layers"],
            num_attention_heads=VIT["heads"],
            image_size=SIZES.crop,
            patch_size=SIZES.patch,
            hidden_act="quick_gelu",
            attn_implementation="eager",
        )
        self.tower = transformers.CLIPVisionModel(tower)
        width, dim, mlp = VIT["width"], 32, 56
        self.new_embedding = nn.Parameter(torch.zeros(NEW, dim))
        self.head = nn.Linear(dim, vocab, bias=False)
        self.pad_embed = nn.Parameter(torch.zeros(2, 2 * width))
        self.wq, self.wk, self.wv = (nn.Linear(2 * width, width) for _ in range(3))
        self.wo = nn.Linear(width, width)
        self.w1, self.w3 = nn.Linear(width, mlp, bias=False), nn.Linear(width, mlp, bias=False)
        self.w2 = nn.Linear(mlp, dim, bias=False)
        randomise(self)

    def forward(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the logits of every document."""
        length = max(len(example.ids) for example in examples)
        ids, positions, numbers = (
            torch.stack([F.pad(getattr(one, name), (0, length - len(one.ids))) for one in examples])
            for name in ("ids", "positions", "subsegments")
        )
        table = torch.cat([self.decoder.embed_tokens.weight, self.new_embedding])
        x = F.embedding(ids, table)
        for row, example in enumerate(examples):
            for image in example.images:
                features, index = self.connected(image), torch.from_numpy(image.index)
                for crop, to in zip(features, index, strict=True):
                    x = x.clone()
                    x[row, to[to >= 0]] += crop[to >= 0]
        seen = (numbers.unsqueeze(2) <= numbers.unsqueeze(1)) & torch.ones(length, length).tril().bool()
        mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min).to(x.dtype).unsqueeze(1)
        out = self.decoder(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = self.head(out.last_hidden_state)
        return [logits[row, : len(example.ids)] for row, example in enumerate(examples)]

    def connected(self, image: Prepared) -> Tensor:
        """Return the projected features, ``(crops, features, D)``."""
        out = []
        for crop, mask in zip(image.crops, image.masks, strict=True):
            features = self.seen(torch.from_numpy(crop).to(self.pad_embed.dtype))
            share = torch.from_numpy(mask)
            none = share == 0
            features = features + self.pad_embed[0] * none.to(features.dtype).unsqueeze(1)
            features = features + self.pad_embed[1] * ((share < 1) & ~none).to(features.dtype).unsqueeze(1)
            side = SIZES.crop // SIZES.patch
            plane = features.view(side, side, -1)
            squares = [plane[i : i + 2, j : j + 2].reshape(4, -1) for i in range(0, side, 2) for j in range(0, side, 2)]
            pooled = torch.stack([self.pooled(square) for square in squares])
            out.append(self.w2(F.silu(self.w1(pooled)) * self.w3(pooled)))
        return torch.stack(out)

    def seen(self, crop: Tensor) -> Tensor:
        """Return the outputs of two blocks for each patch of a crop, concatenated."""
        side = SIZES.crop // SIZES.patch
        squares = crop.view(side, side, SIZES.patch, SIZES.patch, 3).permute(4, 0, 2, 1, 3)
        pixels = squares.reshape(3, SIZES.crop, SIZES.crop)
        mean, std = (torch.tensor(values, dtype=crop.dtype).view(3, 1, 1) for values in (MEAN, STD))
        out = self.tower(pixel_values=((pixels - mean) / std)[None], output_hidden_states=True)
        outputs = out.hidden_states[1:]  # The first hidden state is the input of the first block.
        return torch.cat([outputs[layer][0, 1:] for layer in PICKED], dim=-1)

    def pooled(self, square: Tensor) -> Tensor:
        """Pool four patches: their mean is the query that attends to them."""
        heads = VIT["heads"]
        q, k, v = self.wq(square.mean(0, keepdim=True)), self.wk(square), self.wv(square)
        q, k, v = (rows.view(len(rows), heads, -1).transpose(0, 1) for rows in (q, k, v))
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.wo((weights @ v).transpose(0, 1).reshape(-1))


def published(reference: Molmo, of: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """Return tensors by published name; ``of`` maps a parameter to its values or its gradient."""
    ours = {name: of(parameter) for name, parameter in reference.named_parameters()}
    out = {
        "model.transformer.wte.embedding": ours["decoder.embed_tokens.weight"],
        "model.transformer.wte.new_embedding": ours["new_embedding"],
        "model.transformer.ln_f.weight": ours["decoder.norm.weight"],
        "model.vision_backbone.pad_embed": ours["pad_embed"],
    }
    family = reference.decoder.config.model_type
    experts = family == "olmoe"
    out["lm_head.weight" if experts else "model.transformer.ff_out.weight"] = ours["head.weight"]
    norms = ("post_attention", "post_feedforward") if family == "olmo2" else ("input", "post_attention")
    for n in range(2):
        block, mine = f"model.transformer.blocks.{n}.", f"decoder.layers.{n}."
        attention, mlp = (f"{block}attn.", f"{block}mlp.") if experts else (block, block)
        for end in ("weight", "bias") if family == "qwen2" else ("weight",):
            fused = torch.cat([ours[f"{mine}self_attn.{name}_proj.{end}"] for name in "qkv"])
            out[f"{attention}att_proj.{end}"] = fused
        out |= {f"{mlp}{name}": values for name, values in _feed_forward(ours, f"{mine}mlp.").items()}
        out[f"{attention}attn_out.weight"] = ours[f"{mine}self_attn.o_proj.weight"]
        out[f"{attention}attn_norm.weight"], out[f"{mlp}ff_norm.weight"] = (
            ours[f"{mine}{name}_layernorm.weight"] for name in norms
        )
        for name in () if family == "qwen2" else ("q_norm", "k_norm"):
            out[f"{attention}{name}.weight"] = ours[f"{mine}self_attn.{name}.weight"]
    for name in ("wq", "wk", "wv", "wo"):
        for end in ("weight", "bias"):
            out[f"model.vision_backbone.image_pooling_2d.{name}.{end}"] = ours[f"{name}.{end}"]
    for name in ("w1", "w2", "w3"):
        out[f"model.vision_backbone.image_projector.{name}.weight"] = ours[f"{name}.weight"]
    return out | {f"model.vision_backbone.image_vit.{name}": values for name, values in _tower(ours).items()}


def _feed_forward(ours: dict[str, Tensor], mine: str) -> dict[str, Tensor]:
    if f"{mine}gate.weight" not in ours:
        fused = torch.cat([ours[f"{mine}{name}_proj.weight"] for name in ("up", "gate")])
        return {"ff_proj.weight": fused, "ff_out.weight": ours[f"{mine}down_proj.weight"]}
    out = {"gate.weight": ours[f"{mine}gate.weight"]}
    for number, (both, down) in enumerate(
        zip(ours[f"{mine}experts.gate_up_proj"], ours[f"{mine}experts.down_proj"], strict=True)
    ):
        gate, up = both.chunk(2)
        for name, values in (("gate", gate), ("up", up), ("down", down)):
            out[f"experts.{number}.{name}_proj.weight"] = values
    return out


def _tower(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    start = next(name for name in ours if name.startswith("tower") and "class_embedding" in name)
    mine = start.removesuffix("embeddings.class_embedding")
    convolution = ours[f"{mine}embeddings.patch_embedding.weight"]
    out = {
        "class_embedding": ours[start],
        "positional_embedding": ours[f"{mine}embeddings.position_embedding.weight"],
        "patch_embedding.weight": convolution.permute(0, 2, 3, 1).flatten(1),
    }
    pairs = [("pre_ln", "pre_layrnorm")]
    for n in range(VIT["layers"]):
        block, layer = f"transformer.resblocks.{n}.", f"encoder.layers.{n}."
        pairs += [(f"{block}attention.w{name}", f"{layer}self_attn.{name}_proj") for name in "qkv"]
        pairs += [(f"{block}attention.wo", f"{layer}self_attn.out_proj")]
        pairs += [(f"{block}feed_forward.w{i}", f"{layer}mlp.fc{i}") for i in (1, 2)]
        pairs += [(f"{block}attention_norm", f"{layer}layer_norm1"), (f"{block}ffn_norm", f"{layer}layer_norm2")]
    for theirs, name in pairs:
        for end in ("weight", "bias"):
            out[f"{theirs}.{end}"] = ours[f"{mine}{name}.{end}"]
    return out


def save(reference: Molmo, folder: Path, of: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
    """Write a folder as published, plus the sizes of the tower, which are constants of the published code."""
    decoder = reference.decoder.config
    config = {**MOLMOE, **_molmoe_sizes(decoder)} if decoder.model_type == "olmoe" else _dense_config(decoder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: values.contiguous() for name, values in published(reference, of).items()}
    save_file(tensors, folder / "model.safetensors")


def _molmoe_sizes(decoder: Any) -> dict[str, Any]:
    """Return the keys of MolmoE's ``config.json`` that the tiny model changes."""
    return {
        "vocab_size": decoder.vocab_size - 2,
        "embedding_size": decoder.vocab_size,
        "additional_vocab_size": NEW,
        "d_model": decoder.hidden_size,
        "n_layers": decoder.num_hidden_layers,
        "n_heads": decoder.num_attention_heads,
        "n_kv_heads": decoder.num_key_value_heads,
        "mlp_hidden_size": 2 * decoder.intermediate_size,
        "layer_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_parameters["rope_theta"],
        "moe_num_experts": decoder.num_experts,
        "moe_top_k": decoder.num_experts_per_tok,
        "vit_layers": list(PICKED),
        "vision_backbone": {
            **MOLMOE["vision_backbone"],
            **TOWER,
            "image_num_key_value_heads": VIT["heads"],
            "image_pos_patch_size": SIZES.patch,
            "image_num_pos": 1 + (SIZES.crop // SIZES.patch) ** 2,
        },
    }


def _dense_config(decoder: Any) -> dict[str, Any]:
    post = decoder.model_type == "olmo2"
    return {
        "model_type": "molmo",
        "architectures": ["MolmoForCausalLM"],
        "auto_map": {"AutoConfig": "config_molmo.MolmoConfig"},
        "vocab_size": decoder.vocab_size - 2,
        "embedding_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": 2 * decoder.intermediate_size,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": None if post else decoder.num_key_value_heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "layer_norm_type": "rms",
        "rope_theta": 5e5,
        "clip_qkv": None,
        "qkv_bias": not post,
        "attention_layer_norm": post,
        "norm_after": post,
        "weight_tying": False,
        "tie_word_embeddings": False,
        "use_position_ids": True,
        "use_cache": True,
        "additional_vocab_size": NEW,
        "vit_layers": list(PICKED),
        "vision_backbone": TOWER,
    }


def fill(reference: Molmo, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of a folder into the model: the inverse of ``published``."""
    count = 0
    marked = {}
    for name, parameter in reference.named_parameters():
        marked[name] = torch.arange(count, count + parameter.numel(), dtype=torch.float64).view(parameter.shape)
        count += parameter.numel()
    values = torch.full((count,), float("nan"), dtype=torch.float64)
    numbered = iter(marked.values())
    places = published(reference, lambda parameter: next(numbered))
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        values[place.long().flatten()] = tensors[name].double().flatten()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            found = values[marked[name].long()]
            # Molmo does not use the last norm of CLIP's tower.
            parameter.copy_(torch.where(found.isnan(), parameter, found))


def example(ids: Sequence[int], images: Sequence[tuple[int, Prepared]], branches: Sequence[int]) -> Example:
    """Return a document in their form from its images with their first tokens, and the starts of its branches."""
    numbers = np.full(len(ids), 10_000 if branches else 1)
    for number, start in enumerate(branches):
        numbers[start:] = number + 1
    positions = np.zeros(len(ids), int)
    for number in np.unique(numbers):
        positions = np.where(numbers == number, np.cumsum(numbers >= number) - 1, positions)
    placed = tuple(
        Prepared(image.crops, image.tokens, np.where(image.index < 0, image.index, image.index + first), image.masks)
        for first, image in images
    )
    return Example(torch.tensor(ids), placed, torch.from_numpy(numbers), torch.from_numpy(positions))
