"""Models that see, each on pages with pictures of the sizes that it is made for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.families.pages import IMAGE_ID, Page, inputs, picture_pages, pictures, tokenizer
from benchmarks.families.pair import Pair, our_twin, randomise
from benchmarks.families.texts import SIZES
from mmscale.models.build import media_spec

PATCH = 14
WORDS = (8, 120)
Images = Callable[[Sequence[Page]], dict[str, Tensor]]


def _pair(
    name: str,
    theirs: Any,
    pages: Sequence[Page],
    special: Sequence[str],
    transforms: dict[str, Any],
    images: Images,
) -> Pair:
    randomise(theirs)
    ours = our_twin(theirs)
    made = inputs(pages, tokenizer(special), media_spec(ours.config), transforms)
    arguments = made.padded | images(pages)

    def run_theirs() -> Tensor:
        return theirs(**arguments, use_cache=False).logits[made.real]

    return Pair(name, ours, theirs, lambda: ours.head(ours(made.packed).hidden), run_theirs, made.padding)


def fuyu() -> Pair:
    """Pictures of up to 10 x 10 patches in token slots."""
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, PersimmonConfig

    side = 30
    rope = {"rope_type": "default", "rope_theta": 25_000.0, "partial_rotary_factor": 0.5}
    text = PersimmonConfig(**SIZES, rope_parameters=rope)
    ids = {key: SIZES[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    theirs = FuyuForCausalLM(FuyuConfig(text_config=text, patch_size=side, image_token_id=IMAGE_ID, **ids))
    frame = {"height": 300, "width": 300}
    processor = FuyuImageProcessor(size=frame, patch_size={"height": side, "width": side})

    def images(pages: Sequence[Page]) -> dict[str, Tensor]:
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


def pairs() -> Iterator[tuple[str, Any]]:
    """Names, and what builds each."""
    yield "fuyu", fuyu
