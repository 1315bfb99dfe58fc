"""Multimodal models, all on the same pages of pictures and captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.families.pages import BOS, IMAGE_ID, Page, inputs, picture_pages, pictures, tokenizer
from benchmarks.families.pair import ModelPair, our_model, randomise
from benchmarks.families.texts import ROPE, SIZES
from mmscale.hf.layouts.pixels import CLIP
from mmscale.models.build import media_spec

WORDS = (8, 120)
Images = Callable[[Sequence[Page], Tensor], dict[str, Tensor]]
"""Returns the processor's image inputs for pages and their padded ids."""


def _pair(
    name: str,
    theirs: Any,
    pages: Sequence[Page],
    special: Sequence[str],
    transforms: dict[str, Any],
    images: Images,
    bos: str | None = BOS,
) -> ModelPair:
    randomise(theirs)
    ours = our_model(theirs)
    made = inputs(pages, tokenizer(special, bos), media_spec(ours.config), transforms)
    arguments = made.padded | images(pages, made.padded["input_ids"])

    def run_theirs() -> Tensor:
        return theirs(**arguments, use_cache=False).logits[made.real]

    return ModelPair(name, ours, theirs, lambda: ours.head(ours(made.packed).hidden), run_theirs, made.padding)


def fuyu() -> ModelPair:
    """Fuyu: pictures of up to 10 x 10 patches as token embeddings."""
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, PersimmonConfig

    side = 30
    rope = {"rope_type": "default", "rope_theta": 25_000.0, "partial_rotary_factor": 0.5}
    text = PersimmonConfig(**SIZES, rope_parameters=rope)
    ids = {key: SIZES[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    theirs = FuyuForCausalLM(FuyuConfig(text_config=text, patch_size=side, image_token_id=IMAGE_ID, **ids))
    frame: dict[str, Any] = {"height": 300, "width": 300}
    squares: dict[str, Any] = {"size": frame, "patch_size": {"height": side, "width": side}}
    processor = FuyuImageProcessor(**squares)

    def images(pages: Sequence[Page], ids: Tensor) -> dict[str, Tensor]:
        patches = []
        for picture in (picture for page in pages for picture in pictures(page)):
            framed = processor.preprocess([picture], return_tensors="pt")["images"][0][0]
            grid = processor.patchify_image(framed[None])[0].view(frame["height"] // side, frame["width"] // side, -1)
            rows, columns = -(-picture.height // side), -(-picture.width // side)
            patches.append(grid[:rows, :columns].flatten(0, 1))
        return {"pixel_values": torch.cat(patches)[None]}

    transforms = {
        "kind": "padded",
        "max_height": frame["height"],
        "max_width": frame["width"],
        "interpolation": "bilinear",
        "layout": {"row_end": "<row>"},
    }
    return _pair("fuyu, 12 pages", theirs, picture_pages(12, (60, 290), WORDS), ["<row>"], transforms, images)


def qwen2_vl() -> ModelPair:
    """Qwen2-VL: pictures of any size, one feature per 2 x 2 patches."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    start, end = IMAGE_ID + 1, IMAGE_ID + 2
    width, heads = SIZES["hidden_size"], SIZES["num_attention_heads"]
    half = width // heads // 2
    sections = [half // 4, half // 2 - half // 8, half - half // 4 - half // 2 + half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    theirs = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**SIZES, "num_key_value_heads": 2, "rope_parameters": rope},
            vision_config={
                "depth": SIZES["num_hidden_layers"],
                "embed_dim": width,
                "hidden_size": width,
                "num_heads": 6,
            },
            image_token_id=IMAGE_ID,
            vision_start_token_id=start,
            vision_end_token_id=end,
            video_token_id=end + 1,
            tie_word_embeddings=False,
        )
    )
    limits: dict[str, Any] = {"min_pixels": 56 * 56, "max_pixels": 280 * 280}
    processor = Qwen2VLImageProcessor(**limits)

    def images(pages: Sequence[Page], ids: Tensor) -> dict[str, Tensor]:
        found = processor([picture for page in pages for picture in pictures(page)], return_tensors="pt")
        return {**found, "mm_token_type_ids": (ids == IMAGE_ID).int()}

    transforms = {"kind": "native", "layout": {"start": "<start>", "end": "<end>"}, **limits}
    names = ["<start>", "<end>", "<video>"]
    return _pair("qwen2_vl, 12 pages", theirs, picture_pages(12, (60, 290), WORDS), names, transforms, images)


def pixtral() -> ModelPair:
    """Pixtral: pictures of any size, one feature per patch."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessor,
        PixtralVisionConfig,
    )

    text = MistralConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=48,
        sliding_window=None,
        rope_parameters=ROPE,
        tie_word_embeddings=False,
    )
    sizes = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    vision = PixtralVisionConfig(
        **sizes, intermediate_size=SIZES["intermediate_size"], image_size=288, patch_size=16, hidden_act="silu"
    )
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
            image_token_index=IMAGE_ID,
            tie_word_embeddings=False,
        )
    )
    processor = PixtralImageProcessor(size={"longest_edge": 288}, patch_size={"height": 16, "width": 16})

    def images(pages: Sequence[Page], ids: Tensor) -> dict[str, Tensor]:
        return dict(processor([picture for page in pages for picture in pictures(page)], return_tensors="pt"))

    transforms = {"kind": "longest_side", "longest": 288, "layout": {"row_break": "<break>", "end": "<end>"}}
    pages = picture_pages(12, (60, 290), WORDS)
    return _pair("pixtral, 12 pages", theirs, pages, ["<break>", "<end>"], transforms, images)


def mllama() -> ModelPair:
    """Llama 3.2 Vision: one to four tiles per picture, cross-attention before every fourth block.

    Every page begins with a picture. transformers pads to the largest number of tiles per image, and to the images of
    the page with most of them. Ours pads tiles too, as the published weights require
    (``vision.tiles.attend_absent``), but not images.
    """
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    side, most, layers = 112, 4, SIZES["num_hidden_layers"]
    vision = MllamaVisionConfig(
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"],
        num_hidden_layers=layers,
        num_global_layers=1,
        attention_heads=SIZES["num_attention_heads"],
        vision_output_dim=2 * SIZES["hidden_size"],
        image_size=side,
        patch_size=14,
        max_num_tiles=most,
        intermediate_layers_indices=[0],
    )
    every = min(4, layers)
    crossed = [block + number for number, block in enumerate(range(every - 1, layers, every))]
    sizes = {**SIZES, "num_hidden_layers": layers + len(crossed), "num_key_value_heads": 2}
    text = MllamaTextConfig(**sizes, cross_attention_layers=crossed, rope_parameters=ROPE)
    theirs = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    )
    shape: dict[str, Any] = {"size": {"height": side, "width": side}, "max_image_tiles": most}
    processor = MllamaImageProcessor(**shape, image_mean=list(CLIP[0]), image_std=list(CLIP[1]))

    def images(pages: Sequence[Page], ids: Tensor) -> dict[str, Tensor]:
        by_page: Any = [pictures(page) for page in pages]
        found = dict(processor(by_page, return_tensors="pt"))
        places = [get_cross_attention_token_mask(row, IMAGE_ID) for row in ids.tolist()]
        mask = convert_sparse_cross_attention_mask_to_dense(places, found.pop("num_tiles"), most, ids.shape[1])
        return {**found, "cross_attention_mask": torch.from_numpy(mask)}

    transforms = {"kind": "tiles", "size": side, "tiling": {"kind": "llama"}, "interpolation": "bilinear"}
    return _pair("mllama, 12 pages", theirs, picture_pages(12, (60, 290), WORDS), [], transforms, images, bos=None)


def pairs() -> Iterator[tuple[str, Any]]:
    """Yield (family, builder of a pair)."""
    for build in (mllama, qwen2_vl, pixtral, fuyu):
        yield build.__name__, build
