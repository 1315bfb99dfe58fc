"""Image tokenizers, and models that draw, each beside the class of transformers with the same weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.families.pair import our_model, randomise
from data_pipeline.batch import MultimodalBatch
from data_pipeline.media_spec import Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document, plain_document
from data_pipeline.sample import Provenance
from mmscale.checkpoint.imports import import_folder
from mmscale.models.build import media_spec
from mmscale.models.generation import ImageGrid, draw
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.sampling import SamplingConfig

TOKENIZERS: dict[str, dict[str, Any]] = {
    "JanusVQVAE": {"base_channels": 64},
    "Emu3VQVAE": {"base_channels": 64, "hidden_size": 256},
}
"""Keys that differ from the published tokenizers: a half and a quarter of their channels. Codebooks are as published:
16384 codes of 8 channels, 32768 of 4."""
DECODER: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 2048,
}
"""Sizes of the decoders that draw."""
TEXT, PROMPT, BEGIN = 512, 24, 5
"""Ids of text, tokens of a prompt, and the id after which an image begins."""
CODES = {"janus": 16384, "emu3": 32768}
TOLERANCE = 1e-4
"""Largest difference of decoded images, in units of their range from -1 to 1."""


@dataclass(frozen=True)
class TokenizerPair:
    """An image tokenizer of transformers and ours with the same weights."""

    name: str
    ours: ImageTokenizer
    theirs: Any
    batch: int = 16
    """Images of a batch where files are encoded."""

    @torch.no_grad()
    def their_tokens(self, images: Tensor) -> Tensor:
        """Return their tokens ``(N, h, w)``."""
        if self.name == "JanusVQVAE":
            sides = [side // self.ours.stride for side in images.shape[2:]]
            found: Tensor = self.theirs.encode(images).image_tokens
            return found.view(len(images), *sides)
        return torch.stack(self.theirs.encode(images, torch.tensor([images.shape[2:]] * len(images))).image_tokens)

    @torch.no_grad()
    def their_images(self, tokens: Tensor) -> Tensor:
        """Return their images ``(N, 3, H, W)``."""
        images: Tensor = self.theirs.decode(tokens.flatten(1) if self.name == "JanusVQVAE" else tokens)
        return images

    def check(self, images: Tensor) -> Tensor:
        """Return our tokens.

        Raises:
            RuntimeError: more than one token in a hundred differs from theirs, or an image of equal tokens differs.
        """
        tokens = self.ours.encode(images)
        self.require_equal(tokens, self.their_tokens(images))
        difference = float((self.ours.decode(tokens) - self.their_images(tokens).clamp(-1, 1)).abs().max())
        if difference > TOLERANCE:
            raise RuntimeError(f"{self.name}: images of the same tokens differ by {difference:.1e}")
        return tokens

    def require_equal(self, ours: Tensor, theirs: Tensor) -> None:
        """Raise ``RuntimeError`` if more than one token in a hundred differs: rounding decides between near codes."""
        share = float((ours != theirs).float().mean())
        if share > 0.01:
            raise RuntimeError(f"{self.name}: {share:.1%} of the tokens differ")

    def save(self, run: Path) -> None:
        """Write a run folder with a checkpoint of the tokenizer."""
        self.theirs.save_pretrained(run / "theirs")
        import_folder(run / "theirs", run / "checkpoints")


def tokenizer_pair(name: str, side: int) -> TokenizerPair:
    """Return the pair of a class for square images of ``side`` pixels; its codes are distributed as its latents."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**TOKENIZERS[name])
    if name == "JanusVQVAE":
        config.num_patches = side >> (len(config.channel_multiplier) - 1)
    theirs = getattr(transformers, name)(config).eval()
    randomise(theirs)
    latents = our_model(theirs).image_tokenizer.latents(_noise(side)).detach()
    codes = theirs.quantize.embedding.weight
    spread, mean = latents.std((0, 2, 3)), latents.mean((0, 2, 3))
    with torch.no_grad():
        codes.copy_(mean + spread * torch.randn(codes.shape, generator=torch.Generator().manual_seed(1)))
    return TokenizerPair(name, our_model(theirs).image_tokenizer.eval(), theirs)


def _noise(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


@dataclass(frozen=True)
class Drawer(ABC):
    """A model of transformers that draws, and ours with the same weights.

    Attributes:
        name: Family.
        ours, theirs: The models.
        prompts: ``(N, PROMPT)``, token ids of N prompts of equal length. The last one begins the image.
        images: N.
        side: Rows and columns of the grid of codes.
    """

    name: str
    ours: Any
    theirs: Any
    prompts: Tensor
    side: int
    guidance: float = 3.0
    top_k: int = 2048
    """Codes to choose from, as in Emu3's recipe."""

    @property
    def images(self) -> int:
        return len(self.prompts)

    @property
    @abstractmethod
    def grid(self) -> ImageGrid:
        """Grid of each image."""

    @property
    def num_steps(self) -> int:
        """Tokens of an image, ends of rows included."""
        return self.grid.num_steps

    @property
    @abstractmethod
    def without_text(self) -> Tensor:
        """Token ids of the prompts without text, for guidance."""

    @abstractmethod
    def their_draw(self, sampling: SamplingConfig) -> Callable[[], Tensor]:
        """Return a function that draws all images and returns the tokens ``(N, num_steps)``."""

    def draw(self, sampling: SamplingConfig) -> list[Tensor]:
        """Draw all images with ours."""
        grids = [self.grid] * self.images
        return draw(self.ours, self._batch(), grids, sampling, guidance=self.guidance)

    def _batch(self) -> MultimodalBatch:
        spec, origin = media_spec(self.ours.config), Provenance("benchmark", "", "", 0)
        rows = [*self.prompts.tolist(), *self.without_text.tolist()]
        documents = [plain_document(spec, row, 0, [], origin) for row in rows]
        if spec.placement is not Placement.NONE:
            documents.append(dummy_document(spec, 0))
        return collate([Pack(tuple(documents), 0)], spec)

    def check(self) -> None:
        """Draw with both sides, always the most likely code.

        Raises:
            RuntimeError: one of the first codes of an image differs. Later ones may: rounding decides between near
                codes, and other codes follow.
        """
        greedy = SamplingConfig()
        ours, theirs = torch.stack(self.draw(greedy)), self.their_draw(greedy)()
        first = min(self.side, 4)
        codes = theirs[:, :first] - (self.ours.config.decoder.image_ids.start if self.grid.row_end is not None else 0)
        if not ours[:, 0, :first].equal(codes):
            raise RuntimeError(f"{self.name}: codes {ours[:, 0, :first].tolist()}, transformers {codes.tolist()}")


class JanusDrawer(Drawer):
    """``JanusForConditionalGeneration.generate(generation_mode="image")``."""

    @property
    def grid(self) -> ImageGrid:
        return ImageGrid(self.side, self.side)

    @property
    def without_text(self) -> Tensor:
        return self.prompts.masked_fill((self.prompts != DECODER["bos_token_id"]) & (self.prompts != BEGIN), 0)

    def their_draw(self, sampling: SamplingConfig) -> Callable[[], Tensor]:
        options = _options(sampling) | {"guidance_scale": self.guidance, "generation_mode": "image"}
        mask = torch.ones_like(self.prompts)
        return lambda: self.theirs.generate(input_ids=self.prompts, attention_mask=mask, **options)


class Emu3Drawer(Drawer):
    """``Emu3ForConditionalGeneration.generate`` with allowed tokens by position, as its documentation shows."""

    @property
    def grid(self) -> ImageGrid:
        return ImageGrid(self.side, self.side, BEGIN + 1)

    @property
    def without_text(self) -> Tensor:
        return self.prompts[:, :1].new_tensor([[DECODER["bos_token_id"], BEGIN]]).expand(self.images, -1)

    def their_draw(self, sampling: SamplingConfig) -> Callable[[], Tensor]:
        codes, row_end = self.theirs.vocabulary_mapping.image_tokens, [BEGIN + 1]
        width, length = self.side + 1, self.prompts.shape[1]

        def allowed(batch_id: int, ids: Tensor) -> list[int]:
            del batch_id
            return codes if (len(ids) - length + 1) % width else row_end

        without = self.without_text
        options = _options(sampling) | {
            "guidance_scale": self.guidance,
            "max_new_tokens": self.num_steps,
            "prefix_allowed_tokens_fn": allowed,
            "negative_prompt_ids": without,
            "negative_prompt_attention_mask": torch.ones_like(without),
        }
        mask = torch.ones_like(self.prompts)
        return lambda: self.theirs.generate(self.prompts, attention_mask=mask, **options)[:, length:]


def _options(sampling: SamplingConfig) -> dict[str, Any]:
    if not sampling.is_random:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": 1.0}


def _prompts(images: int) -> Tensor:
    text = torch.randint(16, TEXT, (images, PROMPT - 2), generator=torch.Generator().manual_seed(4))
    return F.pad(F.pad(text, (1, 0), value=DECODER["bos_token_id"]), (0, 1), value=BEGIN)


def janus(images: int, side: int) -> Drawer:
    """Return the pair of Janus; its tower and image tokenizer, which drawing tokens does not use, are tiny."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    width = DECODER["hidden_size"]
    config = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8 * side,
            patch_size=8,
            projection_dim=width,
            num_image_tokens=side**2,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=CODES["janus"],
            latent_channels=32,
            base_channels=32,
            channel_multiplier=(1, 1, 1, 1, 1),
            num_res_blocks=1,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        text_config=LlamaConfig(vocab_size=TEXT, **DECODER),
        image_token_id=3,
    )
    theirs: Any = JanusForConditionalGeneration(config).eval()
    randomise(theirs)
    theirs.generation_config.update(bos_token_id=1, pad_token_id=0)
    theirs.generation_config.generation_kwargs = {"boi_token_id": BEGIN}
    return JanusDrawer("Janus", our_model(theirs).eval(), theirs, _prompts(images), side)


def emu3(images: int, side: int) -> Drawer:
    """Return the pair of Emu3; its image tokenizer, which drawing tokens does not use, is tiny."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    codes = CODES["emu3"]
    names = {f"<|visual token {code:06d}|>": TEXT + code for code in range(codes)}
    config = Emu3Config(
        text_config={**DECODER, "vocab_size": TEXT + codes},
        vq_config={
            "codebook_size": codes,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
        },
        vocabulary_map={**names, "<|extra_200|>": BEGIN + 1, "<image>": 3},
    )
    theirs: Any = Emu3ForConditionalGeneration(config).eval()
    randomise(theirs)
    return Emu3Drawer("Emu3", our_model(theirs).eval(), theirs, _prompts(images), side)


DRAWERS: dict[str, Callable[[int, int], Drawer]] = {"janus": janus, "emu3": emu3}
