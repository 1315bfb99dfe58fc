"""Documents of pairs: no text attends the image, and cutting keeps the end token."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.document import IGNORE
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Budget, Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer

SPEC = MediaSpec(Placement.PAIR, patch_size=8, fixed_grid=(2, 2), class_features=1)
CAPTION = {"kind": "caption", "answers": ["{caption}"]}
ASKED = {**CAPTION, "prompts": ["say:"]}


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path))


def builder(tokenizer: Tokenizer, spec: MediaSpec = SPEC, **options: Any) -> DocumentBuilder:
    config = {"name": "x", "manifest": "x", "template": CAPTION, **options}
    return DocumentBuilder(DatasetConfig.model_validate(config), tokenizer, spec)


def sample(text: str, images: int = 1) -> Sample:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(out, "PNG")
    parts = tuple(ImagePart(out.getvalue(), f"{n}.png") for n in range(images))
    return Sample(parts, {"caption": text}, Provenance("x", "shard.tar", "key7", 0))


def test_a_pair_is_a_text_and_beside_it_its_image(tokenizer: Tokenizer) -> None:
    document = builder(tokenizer)(sample("abc"))
    text = tokenizer.encode("abc")
    assert document.token_ids.tolist() == [tokenizer.bos_id, *text, tokenizer.eos_id]
    assert document.labels.tolist() == [*text, tokenizer.eos_id, IGNORE]
    assert document.loss_weights.tolist() == [0] * len(text) + [1, 0]  # A pair counts once.
    dummy = dummy_document(SPEC, tokenizer.pad_id)
    assert (dummy.num_tokens, dummy.num_patches) == (1, 4)
    batch = collate([Pack((document, dummy, document), 0), Pack((dummy,), -1)], SPEC)
    assert batch.pairs.tolist() == [[0, 0], [2, 2]]  # No pair for dummy documents.
    assert batch.weight == 2
    media = batch.media["image"]
    assert media.items.num == 4
    assert len(media.gather_index) == len(media.scatter_index) == len(media.attended_index) == 0
    assert media.span_tokens.total == batch.segments.total
    measured = builder(tokenizer).dry_run(sample("abc"))
    assert (measured.token_ids == document.token_ids).all()


def test_a_cut_text_keeps_its_end_token_and_its_image(tokenizer: Tokenizer) -> None:
    """As CLIP's tokenizer: cut off the end, and make the last token the end token."""
    document = builder(tokenizer)(sample("a long text of many tokens"))
    dummy = dummy_document(SPEC, tokenizer.pad_id)
    for room in range(2, document.num_tokens):
        (part,) = Budget(PackingConfig(max_tokens=room, too_long="truncate"), SPEC, dummy).admit(document)
        kept = document.token_ids[: room - 1].tolist()
        assert part.token_ids.tolist() == [*kept, tokenizer.eos_id]
        assert part.labels.tolist() == [*kept[1:], tokenizer.eos_id, IGNORE]
        assert part.loss_weights.tolist() == [0] * (room - 2) + [1, 0]
        assert part.is_cut
        assert len(part.items) == part.num_images == 1
    assert document.token_ids[-1] == tokenizer.eos_id
    with pytest.raises(DataConfigError, match=r"too_long=split.* would have no image"):
        Budget(PackingConfig(max_tokens=9, too_long="split"), SPEC, dummy)
    native = replace(SPEC, fixed_grid=None, class_features=0)
    tight = Budget(PackingConfig(max_tokens=9, max_cost=4, too_long="truncate"), native, dummy_document(native, 0))
    with pytest.raises(SampleError, match="no learned token is left"):  # A token fits, the image does not.
        tight.admit(document)


@pytest.mark.fault
@pytest.mark.parametrize("images", [0, 2])
def test_a_sample_without_exactly_one_image_is_a_bad_one(tokenizer: Tokenizer, images: int) -> None:
    with pytest.raises(SampleError, match=rf"shard.tar/key7: {images} images, but a pair is one image and one text"):
        builder(tokenizer)(sample("a", images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": {"kind": "text"}}, "template.kind=text: gives no image"),
        (
            {"template": {"kind": "annotations", "field": "x", "each": {**CAPTION, "prompts": ["say:"]}}},
            "several texts of one image",
        ),
        ({"template": {**CAPTION, "loss_weight": "sample"}}, "loss_weight=sample: each pair counts once"),
        ({"transforms": {"kind": "tiles"}}, "compares one crop of an image"),
        ({"transforms": {"kind": "fixed", "layout": {"start": "<image>"}}}, "the text contains no image tokens"),
    ],
)
def test_what_a_pair_cannot_be_is_refused(tokenizer: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataConfigError, match=message):
        builder(tokenizer, **options)
