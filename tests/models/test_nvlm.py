"""NVLM-D, -X and -H against reference models from transformers' layers (``nvlm.py``), with documents of the loader.

Distances are the largest difference relative to the largest value. Measured worst cases: logits 5.7e-7, loss 1.2e-7,
gradients 2.2e-6, gradients of gates 3.2e-5. The gradient of a gate is one number, a sum over all tokens and channels
that nearly cancels; both models have the same distance to float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import IGNORE, Document
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, Tokenizer, load_tokenizer
from mmscale.hf.layouts import layout_of
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig, TowerConfig
from mmscale.models.generation import generate
from mmscale.models.multimodal import MultimodalModel
from tests.models.nvlm import EVERY, MEAN, PATCH, SAMPLES, SIDE, STD, TEXT, VISION, Nvlm, page_of, sample_of
from tests.models.reference_models import distance, gradient_distance, randomise, rounding_ratio
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND, GATE_BOUND = 2e-6, 8e-6, 1e-4
KINDS = ("d", "x", "h")
TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "tokenizer.model"
LAYOUTS = {
    "d": {"start": "<Image>", "end": "</Image>"},
    "x": {},
    "h": {"attended_tags": "keys"},
}


def settings(kind: str) -> ModelConfig:
    """Return a tiny version of ``configs/models/nvlm-*-72b.yaml``."""
    vision = layout_of("internvl_vision").model_config({**VISION, "model_type": "internvl_vision"}, "here")
    text = layout_of("qwen2").model_config({**TEXT, "model_type": "qwen2"}, "here")
    assert isinstance(text, ModelConfig)
    wide = TEXT["intermediate_size"]
    mlp = {"kind": "mlp", "merge": 2, "norm": "after_merge", "norm_eps": 1e-5, "bias": False, "hidden_dim": wide}
    attended = {
        "every": EVERY,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "mlp": {"hidden_dim": wide},
    }
    connectors: dict[str, dict[str, Any]] = {
        "d": {"kind": "embedding", "projector": mlp},
        "x": {"kind": "cross_attention", "projector": {"kind": "linear", "merge": 2}, **attended},
        "h": {"kind": "hybrid", "projector": mlp, **attended},
    }
    decoder = text.decoder.model_dump(mode="json")
    block = {"decoder": decoder, "vision": vision.vision, "connector": connectors[kind]}
    return ModelConfig.model_validate(block)


CONNECTOR = {
    "linear.": "mlp1.",
    "norm.": "mlp1.0.",
    "fc1.": "mlp1.1.",
    "fc2.": "mlp1.3.",
}
CROSS = {
    "input_layernorm": "norm",
    "cross_attn.q_proj": "q",
    "cross_attn.k_proj": "k",
    "cross_attn.v_proj": "v",
    "cross_attn.o_proj": "o",
    "cross_attn_attn_gate": "attention_gate",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "cross_attn_mlp_gate": "mlp_gate",
}


def by_our_names(theirs: Nvlm, ours: MultimodalModel, value_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return ``value_of`` each parameter of the reference model, under our names."""
    shapes = {name: tuple(values.shape) for name, values in ours.named_parameters()}
    parts = {name: value_of(values) for name, values in theirs.named_parameters()}
    found: dict[str, Tensor] = {}
    assert ours.config.vision is not None
    towers = TowerConfig(vision=ours.config.vision), ModelConfig(decoder=ours.config.decoder)
    for family, config, ends, prefix in (
        ("internvl_vision", towers[0], ("vision.",), "vision_model."),
        ("qwen2", towers[1], ("decoder.", "head."), "language_model."),
    ):
        own = {name: shape for name, shape in shapes.items() if name.startswith(ends)}
        for stored in layout_of(family).hf_tensors(config, own).values():
            for part, values in stored.split(parts[prefix + stored.name]):
                assert part is not None
                found[part.name] = values
    for name in shapes.keys() - found.keys():
        rest = name.removeprefix("connector.")
        if rest.startswith("projector."):
            begin, new = next(pair for pair in CONNECTOR.items() if rest.startswith(f"projector.{pair[0]}"))
            found[name] = parts[rest.replace(f"projector.{begin}", new)]
        else:
            _, layer, rest = rest.split(".", 2)
            begin, new = next(pair for pair in CROSS.items() if rest.startswith(pair[0]))
            found[name] = parts[f"cross.{layer}.{rest.replace(begin, new, 1)}"]
    return {name: found[name].reshape(shape) for name, shape in shapes.items()}


def both_models(kind: str, seed: int = 0) -> tuple[MultimodalModel, Nvlm]:
    """Return our model and the reference model with the same weights. All parameters of the reference are used."""
    torch.manual_seed(0)
    theirs = Nvlm(kind)
    randomise(theirs, seed)
    ours = build_model(settings(kind), attention="sdpa", seed=None)
    values = by_our_names(theirs, ours, lambda parameter: parameter.detach())
    assert sum(each.numel() for each in values.values()) == sum(each.numel() for each in theirs.parameters())
    ours.load_state_dict(values)
    return ours, theirs


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SentencePieceTokenizerConfig(path=TOKENIZER))


def builder_of(kind: str, tokenizer: Tokenizer) -> tuple[MediaSpec, DocumentBuilder]:
    """Return the ``MediaSpec`` and the loader's document builder."""
    layout = {"tile": "<tile_{n}>", "overview": "<tile_global_thumbnail>", "spell": True, **LAYOUTS[kind]}
    transforms = {"kind": "tiles", "size": SIDE, "tiling": {"kind": "internvl", "max_tiles": 3}, "layout": layout}
    values = {"name": "x", "manifest": "x", "template": {"kind": "interleaved"}, "transforms": transforms}
    spec = media_spec(settings(kind))
    return spec, DocumentBuilder(DatasetConfig.model_validate(values), tokenizer, spec)


def documents(kind: str, tokenizer: Tokenizer) -> tuple[MediaSpec, list[Document]]:
    """Return the documents as the loader builds them."""
    spec, builder = builder_of(kind, tokenizer)
    return spec, [builder(sample_of(parts, number)) for number, parts in enumerate(SAMPLES)]


def tiles_of(document: Document) -> Tensor:
    """Return the normalised crops of a document, channels first."""
    count = SIDE // PATCH
    rows = [np.empty((0, 3 * PATCH**2), np.uint8), *(item.values for item in document.items)]
    patches = torch.from_numpy(np.concatenate(rows))
    pixels = patches.view(-1, count, count, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def loss_of(logits: Tensor, batch: MultimodalBatch) -> Tensor:
    picked = F.cross_entropy(logits.float(), batch.labels, reduction="none", ignore_index=IGNORE)
    return (picked * batch.loss_weights).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_loss_and_gradients(kind: str, tokenizer: Tokenizer, parity: Recorder) -> None:
    """Compare packed documents (several images, none, text before an image) with one forward pass for each."""
    family = {"d": "NVLM_D"}.get(kind, f"nvlm_{kind}")
    ours, theirs = both_models(kind)
    spec, made = documents(kind, tokenizer)
    pages = [page_of(parts, kind, tokenizer, tokenizer.image_id) for parts in SAMPLES]
    assert [document.token_ids.tolist() for document in made] == [page.ids for page in pages]
    batch = collate([Pack(tuple(made), 0)], spec)
    hidden = ours(batch).hidden
    logits, loss = ours.head(hidden), ours.head(hidden, labels=batch.labels, loss_weights=batch.loss_weights)
    tiles = [tiles_of(document) for document in made]
    expected = torch.cat([theirs(page, crops) for page, crops in zip(pages, tiles, strict=True)])
    reference = loss_of(expected, batch)
    parity(family, "logits", distance(logits, expected), BOUND)
    parity(family, "loss", distance(loss, reference), BOUND)
    loss.backward()
    reference.backward()
    carrier = by_our_names(theirs, ours, lambda parameter: parameter.grad)  # type: ignore[arg-type,return-value]
    for name, gradient in carrier.items():
        carrier[name] = torch.zeros_like(gradient)
        carrier[name].grad = gradient
    gates = {name: carrier.pop(name) for name in list(carrier) if name.endswith("_gate")}
    parity(family, "gradients", gradient_distance(ours, carrier), GRADIENT_BOUND)
    if gates:
        parity(family, "gradients of gates", gradient_distance(ours, gates), GATE_BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_error_is_no_larger_than_that_of_the_reference(
    kind: str, tokenizer: Tokenizer, parity: Recorder
) -> None:
    """Measured ratios: 0.93 to 0.95."""
    spec, made = documents(kind, tokenizer)
    batch = collate([Pack(tuple(made), 0)], spec)
    pages = [page_of(parts, kind, tokenizer, tokenizer.image_id) for parts in SAMPLES]
    tiles = [tiles_of(document) for document in made]

    @torch.no_grad()
    def one(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        ours, theirs = (model.bfloat16() for model in both_models(kind, seed))
        rounded = torch.cat([theirs(page, crops.bfloat16()) for page, crops in zip(pages, tiles, strict=True)])
        theirs.float()
        exact = torch.cat([theirs(page, crops) for page, crops in zip(pages, tiles, strict=True)])
        return ours.head(ours(batch).hidden), rounded, exact

    ratio = rounding_ratio(one(seed) for seed in range(4))
    parity({"d": "NVLM_D"}.get(kind, f"nvlm_{kind}"), "error of bfloat16, over the composition's", ratio, 1.05)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_joined_are_one(kind: str, tokenizer: Tokenizer) -> None:
    ours, _ = both_models(kind)
    spec, made = documents(kind, tokenizer)
    packs = [Pack((made[0], made[2]), 0), Pack((made[3],), 1), Pack((dummy_document(spec, 0), made[1]), 2)]
    whole, joined = collate(packs, spec), concatenate([collate([pack], spec) for pack in packs], spec)
    assert torch.equal(whole.media["image"].attended_index, joined.media["image"].attended_index)
    assert torch.equal(ours(whole).hidden, ours(joined).hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_is_that_of_whole_forwards(kind: str, tokenizer: Tokenizer) -> None:
    """Prompts with several images in one pack; the reference computes each whole sequence for every token."""
    ours, theirs = both_models(kind)
    spec, builder = builder_of(kind, tokenizer)
    samples = [*SAMPLES, ("two at the end ", (28, 56), (84, 28))]
    prompts = [builder.build_prompt(sample_of((*parts, "answer"), number)) for number, parts in enumerate(samples)]
    pack = Pack((*prompts[:2], dummy_document(spec, 0), *prompts[2:]), 0)
    said = generate(ours, collate([pack], spec), 5, eos_id=-1)
    assert len({tuple(tokens) for tokens in said}) > 2
    for parts, prompt, tokens in zip(samples, prompts, said, strict=True):
        page = page_of(parts, kind, tokenizer, tokenizer.image_id)
        assert page.ids.pop() == tokenizer.eos_id
        page.slots.pop()
        seen = page.seen.pop()
        assert prompt.token_ids.tolist() == page.ids
        for token in tokens:
            with torch.no_grad():
                assert token == int(theirs(page, tiles_of(prompt))[-1].argmax())
            page.put([token], set(seen))
