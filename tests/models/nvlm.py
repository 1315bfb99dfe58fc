"""Reference models of NVLM-D, -X and -H, composed of transformers' InternViT and Qwen2 layers.

They process one document at a time with dense masks. The gated cross-attention is implemented here. ``page_of``
computes the attended crops of each token from the parts of a sample, without code of the loader.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel, Qwen2Config, Qwen2ForCausalLM

from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import Tokenizer

SIDE, PATCH, HEADS = 28, 7, 5
TILES = {(28, 28): 1, (28, 56): 2, (84, 28): 3}
"""Number of tiles of each image in ``SAMPLES``, by (height, width). Sides are multiples of a tile."""
Part = str | tuple[int, int]
SAMPLES: tuple[tuple[Part, ...], ...] = (
    ((28, 56), "red heart"),
    ("look ", (28, 28), "a dog", (84, 28), "and so on"),
    ("text alone",),
    ((28, 56), (84, 28), "two in a row", (28, 28), "last"),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VISION: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": [SIDE, SIDE],
    "patch_size": [PATCH, PATCH],
    "norm_type": "rms_norm",
    "use_qk_norm": True,
}
TEXT: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EVERY = 2


class GatedCrossAttention(nn.Module):
    """Gated cross-attention and feed-forward. Rows that attend to nothing are unchanged."""

    def __init__(self, dim: int, heads: int, kv_heads: int, wide: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.norm, self.mlp_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k, self.v = (nn.Linear(dim, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(dim, wide, bias=False), nn.Linear(dim, wide, bias=False)
        self.down = nn.Linear(wide, dim, bias=False)
        self.attention_gate, self.mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """``hidden`` (T, D), ``source`` (A, D), ``mask`` (T, A)."""
        attends = mask.any(1, keepdim=True)
        q = self.q(self.norm(hidden)).view(-1, self.heads, self.head_dim).transpose(0, 1)
        k, v = (
            each(source)
            .view(-1, self.kv_heads, self.head_dim)
            .transpose(0, 1)
            .repeat_interleave(self.heads // self.kv_heads, 0)
            for each in (self.k, self.v)
        )
        scores = (q @ k.transpose(1, 2) / self.head_dim**0.5).masked_fill(~(mask | ~attends), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        hidden = hidden + self.attention_gate.tanh() * self.o(mixed).masked_fill(~attends, 0)
        normed = self.mlp_norm(hidden)
        changed = self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return hidden + self.mlp_gate.tanh() * changed.masked_fill(~attends, 0)


class Nvlm(nn.Module):
    """``kind`` is "d", "x" or "h"."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.vision_model = InternVLVisionModel(InternVLVisionConfig(**VISION))
        self.language_model = Qwen2ForCausalLM(Qwen2Config(**TEXT))
        width, dim, wide = 4 * VISION["hidden_size"], TEXT["hidden_size"], TEXT["intermediate_size"]
        self.mlp1: nn.Module = nn.Linear(width, dim)
        if kind != "x":
            self.mlp1 = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, wide, bias=False), nn.GELU(), nn.Linear(wide, dim, bias=False)
            )
        layers = range(EVERY - 1, TEXT["num_hidden_layers"], EVERY) if kind != "d" else ()
        self.cross = nn.ModuleDict({str(layer): GatedCrossAttention(dim, 4, 2, wide) for layer in layers})

    def features(self, tiles: Tensor) -> Tensor:
        """Return ``(tiles, features of a tile, D)``, with the pixel shuffle of NVLM-D's published code (version 2)."""
        rows = self.vision_model(tiles).last_hidden_state[:, 1:]
        count, patches, width = rows.shape
        side = int(patches**0.5)
        rows = rows.reshape(count, side, side // 2, width * 2).permute(0, 2, 1, 3)
        rows = rows.reshape(count, side // 2, side // 2, width * 4).permute(0, 2, 1, 3)
        return self.mlp1(rows.reshape(count, -1, width * 4))

    def forward(self, page: Page, tiles: Tensor) -> Tensor:
        """Return the logits of one document, ``(T, V)``. ``tiles`` are its normalised crops in reading order."""
        model = self.language_model.model
        ids = torch.tensor(page.ids)
        hidden = model.embed_tokens(ids)
        features = self.features(tiles) if len(tiles) else hidden.new_zeros(0, 4, hidden.shape[1])
        slots = [index for index, crop in enumerate(page.slots) if crop is not None]
        if slots:
            written = torch.cat([features[crop] for crop in page.embedded])
            hidden = hidden.index_copy(0, torch.tensor(slots), written)
        sources = {
            crop: torch.cat([model.embed_tokens(torch.tensor(tag, dtype=torch.int64)), features[crop]])
            for crop, tag in page.attended.items()
        }
        source = torch.cat([*sources.values(), hidden[:0]])
        owners = [crop for crop, rows in sources.items() for _ in rows]
        mask = torch.tensor([[crop in seen for crop in owners] for seen in page.seen]).view(len(ids), len(owners))
        positions = torch.arange(len(ids))[None]
        rotation = model.rotary_emb(hidden[None], positions)
        for number, layer in enumerate(model.layers):
            if str(number) in self.cross and len(source):
                hidden = self.cross[str(number)](hidden, source, mask)
            hidden = layer(hidden[None], position_embeddings=rotation, position_ids=positions)[0]
        return self.language_model.lm_head(model.norm(hidden))


@dataclass
class Page:
    """A document in the form that ``Nvlm`` takes.

    Attributes:
        ids: Tokens.
        slots: For each token, the crop whose feature replaces it; None for text.
        seen: For each token, the crops that it attends to.
        embedded: Crops whose features replace tokens, in order.
        attended: For each attended crop, the tokens of the tag before its features.
    """

    ids: list[int] = field(default_factory=list)
    slots: list[int | None] = field(default_factory=list)
    seen: list[frozenset[int]] = field(default_factory=list)
    embedded: list[int] = field(default_factory=list)
    attended: dict[int, list[int]] = field(default_factory=dict)

    def put(self, ids: list[int], seen: set[int], crop: int | None = None) -> None:
        self.ids += ids
        self.slots += [crop] * len(ids)
        self.seen += [frozenset(seen)] * len(ids)


def page_of(parts: tuple[Part, ...], kind: str, tokenizer: Tokenizer, image_id: int) -> Page:
    """Return the document of a sample in NVLM-D, -X or -H."""
    page, crops, run = Page(), 0, set[int]()
    page.put([tokenizer.bos_id], run)
    after_text = True
    for part in parts:
        if isinstance(part, str):
            page.put(tokenizer.encode(part), run)
            after_text = True
            continue
        run = set() if after_text else set(run)
        after_text = False
        tiles = TILES[part]
        whole = tokenizer.encode("<tile_global_thumbnail>")
        tags = [tokenizer.encode(f"<tile_{number}>") for number in range(1, tiles + 1)]
        if tiles == 1 and kind != "h":
            tags = []  # The only crop is the overview.
        if kind == "d":
            page.put(tokenizer.encode("<Image>"), set())
            for number, tag in enumerate([*tags, whole]):
                page.put(tag, set())
                page.put([image_id] * 4, set(), crops + number)
                page.embedded.append(crops + number)
            page.put(tokenizer.encode("</Image>"), set())
        elif kind == "x":
            for number, tag in enumerate([*tags, whole]):
                page.put(tag, {crops + number})
                page.attended[crops + number] = []
                run.add(crops + number)
            page.put([image_id], run)
        else:
            first = 1 if tiles == 1 else 0  # With one tile the overview comes before it.
            overview = crops if tiles == 1 else crops + tiles
            page.attended |= {crops + first + number: tag for number, tag in enumerate(tags)}
            run |= {crops + first + number for number in range(tiles)}
            page.put(whole, run)
            page.put([image_id] * 4, run, overview)
            page.embedded.append(overview)
        crops += len(tags) + 1
    page.put([tokenizer.eos_id], run)
    return page


def sample_of(parts: tuple[Part, ...], number: int) -> Sample:
    """Return a sample with random images."""
    stored: list[ImagePart | TextPart] = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            stored.append(TextPart(part))
            continue
        pixels = np.random.default_rng((number, index)).integers(0, 256, (*part, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        stored.append(ImagePart(out.getvalue(), "png"))
    return Sample(tuple(stored), {}, Provenance("x", "shard", str(number), 0))
