"""Documents: labels, slots, spans and positions, compared with values computed by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.document import IGNORE, Document, ImageExtent, Span
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Part, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer

EMBEDDING = MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(2, 2))
ATTENTION = replace(EMBEDDING, placement=Placement.CROSS_ATTENTION)
HYBRID = replace(EMBEDDING, placement=Placement.HYBRID)
PAD, BOS, EOS, IMG = 0, 1, 2, 3


def _png(value: int, side: tuple[int, int] = (16, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", side, (value, value, value)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path))


def _build(tokenizer: Tokenizer, spec: MediaSpec, *parts: str | int, **transforms: object) -> Document:
    """Build a document of texts and gray images in the given order."""
    kind = {"kind": "fixed"} | transforms
    template = {"kind": "interleaved"}
    config = DatasetConfig.model_validate({"name": "x", "manifest": "x", "template": template, "transforms": kind})
    pieces: list[Part] = [TextPart(p) if isinstance(p, str) else ImagePart(_png(p), "png") for p in parts]
    sample = Sample(tuple(pieces), {}, Provenance("x", "shard.tar", "key7", 0))
    return DocumentBuilder(config, tokenizer, spec)(sample)


def test_embedded_images_take_one_slot_a_feature(tokenizer: Tokenizer) -> None:
    document = _build(tokenizer, EMBEDDING, 7, "ab")
    a, b = tokenizer.encode("ab")
    assert document.token_ids.tolist() == [BOS, IMG, IMG, IMG, IMG, a, b, EOS]
    assert document.scatter_index.tolist() == [1, 2, 3, 4]
    assert document.labels.tolist() == [IGNORE] * 4 + [a, b, EOS, IGNORE]
    assert document.loss_weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert document.spans == (Span(0, ()),)
    assert document.position_ids.tolist() == list(range(8))


def test_text_attends_the_images_before_it_up_to_the_next_image(tokenizer: Tokenizer) -> None:
    document = _build(tokenizer, ATTENTION, "a", 1, "b", 2, 3, "c")
    # bos a | img b | img | img c eos: the last two images are consecutive.
    assert document.token_ids[[2, 4, 5]].tolist() == [IMG] * 3
    assert document.spans == (Span(0, ()), Span(2, (0,)), Span(4, (1,)), Span(5, (1, 2)))
    assert document.scatter_index.tolist() == []
    assert document.images == (ImageExtent(2, 0, 3), ImageExtent(4, 1, 5), ImageExtent(5, 2, 6))


def test_hybrid_embeds_the_thumbnail_and_attends_the_tiles(tokenizer: Tokenizer) -> None:
    document = _build(tokenizer, HYBRID, 5, "a")
    assert [item.embedded for item in document.items] == [True, False]
    assert document.scatter_index.tolist() == [1, 2, 3, 4]
    assert document.spans == (Span(0, ()), Span(1, (1,)))


def test_three_axis_positions_follow_the_grid(tokenizer: Tokenizer) -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=1, position_axes=3)
    document = _build(tokenizer, spec, "a", 9, "b", kind="native", min_pixels=1)
    grid = [[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]]
    assert document.position_ids.tolist() == [[0] * 3, [1] * 3, *grid, [4] * 3, [5] * 3]


def test_a_prompt_ends_where_the_answer_begins_and_learns_nothing(tokenizer: Tokenizer) -> None:
    template = {"kind": "caption", "prompts": ["q:"], "answers": ["{name}"]}
    config = DatasetConfig.model_validate({"name": "x", "manifest": "x", "template": template})
    builder = DocumentBuilder(config, tokenizer, ATTENTION)
    sample = Sample((ImagePart(_png(1), "png"),), {"name": "n"})
    whole, prompt = builder(sample), builder.build_prompt(sample)
    count = prompt.num_tokens
    np.testing.assert_array_equal(whole.token_ids[:count], prompt.token_ids)
    assert whole.token_ids[count:].tolist() == [*tokenizer.encode("n"), EOS]
    assert not prompt.loss_weights.any()
    assert whole.labels[count - 1 :].tolist() == [*tokenizer.encode("n"), EOS, IGNORE]


@pytest.mark.parametrize("spec", [EMBEDDING, ATTENTION, HYBRID, replace(EMBEDDING, placement=Placement.NONE)])
def test_dummy_documents_have_every_role_and_no_weight(spec: MediaSpec) -> None:
    dummy = dummy_document(spec, PAD)
    assert dummy.is_dummy
    assert any(item.embedded for item in dummy.items) == spec.needs_embedded
    assert any(not item.embedded for item in dummy.items) == spec.needs_attended
    assert (dummy.labels == IGNORE).all()
    assert not dummy.loss_weights.any()
    assert (dummy.token_ids == PAD).all()
    assert len(dummy.scatter_index) == sum(spec.num_features(item.grid) for item in dummy.items if item.embedded)
    assert dummy.spans[0].start == 0
    assert {item for span in dummy.spans for item in span.items} == {
        i for i, item in enumerate(dummy.items) if not item.embedded
    }


@pytest.mark.fault
def test_image_tokens_without_images_are_refused_with_both_numbers(tokenizer: Tokenizer) -> None:
    class Careless:
        """A tokenizer that encodes text as the image token."""

        bos_id, eos_id, pad_id, image_id = BOS, EOS, PAD, IMG

        def encode(self, text: str) -> list[int]:
            return [IMG if letter == "I" else 9 for letter in text]

    assert _build(Careless(), EMBEDDING, 1, "x").num_tokens == 7  # type: ignore[arg-type]
    with pytest.raises(SampleError, match=r"shard.tar/key7: 6 image tokens, but its 1 images give 4"):
        _build(Careless(), EMBEDDING, 1, "II")  # type: ignore[arg-type]


@pytest.mark.fault
def test_user_text_that_spells_the_image_token_is_plain_text(tokenizer: Tokenizer) -> None:
    document = _build(tokenizer, EMBEDDING, 1, "<image>")
    assert int((document.token_ids == IMG).sum()) == 4


@pytest.mark.fault
def test_a_model_without_tower_refuses_images(tokenizer: Tokenizer) -> None:
    spec = MediaSpec()
    assert _build(tokenizer, spec, "text").items == ()
    with pytest.raises(SampleError, match="no image tower"):
        _build(tokenizer, spec, 1, "text")


@pytest.mark.fault
def test_texts_alone_need_no_transform_that_fits_the_model(tokenizer: Tokenizer) -> None:
    spec = replace(EMBEDDING, fixed_grid=None)  # Without a fixed grid, the size of fixed crops is unknown.
    config = DatasetConfig.model_validate({"name": "x", "manifest": "x", "template": {"kind": "text"}})
    builder = DocumentBuilder(config, tokenizer, spec)
    where = Provenance("x", "shard.tar", "key7", 0)
    assert builder(Sample((TextPart("text"),), {}, where)).items == ()
    with pytest.raises(SampleError, match="would drop them"):
        builder(Sample((ImagePart(_png(1), "png"), TextPart("text")), {}, where))


def test_without_a_token_to_open_them_documents_begin_with_what_they_hold(tokenizer_path: Path) -> None:
    plain = load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path, bos_token=None))
    document = _build(plain, EMBEDDING, 0, "ab")
    assert document.token_ids[0] == plain.image_id
    assert document.images[0].start == 0
