"""Layout tokens, compared with token sequences of published models."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from pydantic import ValidationError
from transformers.models.qwen2_vl import Qwen2VLConfig, Qwen2VLModel

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document, ImageExtent, Span
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.image_tokens import ImageLayoutConfig
from data_pipeline.images.tilings import grids
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.truncation import split
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import (
    HuggingFaceTokenizerConfig,
    SentencePieceTokenizerConfig,
    Tokenizer,
    load_tokenizer,
)

IMG = "<image>"
LAYOUT = ["<start>", "<end>", "<vs>", "<ve>", "<row>", "<break>", "<tile_1>", "<tile_2>", "<tile_3>", "<whole>"]
EMBEDDING = MediaSpec(Placement.EMBEDDING, patch_size=2)
TILED = {"kind": "tiles", "size": 4, "tiling": {"kind": "internvl", "max_tiles": 3}}
TAGS = {"start": "<start>", "end": "<end>", "tile": "<tile_{n}>", "overview": "<whole>"}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    model.add_special_tokens(LAYOUT)
    path = tmp_path_factory.mktemp("layout") / "tokenizer.json"
    model.save(str(path))
    return load_tokenizer(HuggingFaceTokenizerConfig(path=path))


def _png(height: int, width: int) -> bytes:
    """Return an image whose 2 x 2 pixel squares have numbered values in reading order."""
    numbers = np.arange(height * width // 4, dtype=np.uint8).reshape(height // 2, width // 2)
    out = io.BytesIO()
    Image.fromarray(np.kron(numbers, np.ones((2, 2), np.uint8))).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _builder(
    tokenizer: Tokenizer, spec: MediaSpec, layout: dict[str, Any] | None, **transforms: Any
) -> DocumentBuilder:
    config = {
        "name": "x",
        "manifest": "x",
        "template": {"kind": "interleaved"},
        "transforms": {"layout": layout, "kind": "padded", "max_height": 20, "max_width": 20, **transforms},
    }
    if transforms.get("kind", "padded") != "padded":
        config["transforms"] = {"layout": layout, **transforms}
    return DocumentBuilder(DatasetConfig.model_validate(config), tokenizer, spec)


def _build(builder: DocumentBuilder, *sizes: tuple[int, int]) -> Document:
    images = [ImagePart(_png(*size), "png") for size in sizes]
    return builder(Sample((*images, TextPart("a")), {}, Provenance("x", "shard", "key", 0)))


def _names(tokenizer: Tokenizer, document: Document) -> str:
    """Return the tokens between bos and the text: names, and a count for consecutive placeholders."""
    names = {tokenizer.special_id(name, "test"): name for name in [*LAYOUT, IMG]}
    out: list[str] = []
    for token in document.token_ids[1:-2].tolist():
        name = names.get(token) or chr(token)
        if name == IMG and out and out[-1].isdigit():
            out[-1] = str(int(out[-1]) + 1)
        else:
            out.append("1" if name == IMG else name)
    return " ".join(out)


def _features(document: Document, spec: MediaSpec) -> list[int]:
    """Return the pixel value of each feature, in the order of the tokens."""
    block = collate([Pack((document,), 0)], spec).media["image"]
    order = np.argsort(block.scatter_index.numpy())
    return block.values.numpy()[block.gather_index.numpy()[order], 0].tolist()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (None, "6"),
        # Fuyu: a newline after each row.
        ({"row_end": "<row>"}, "3 <row> 3 <row>"),
        # Pixtral: a break after each row, the last one replaced by the end of the image.
        ({"row_break": "<break>", "end": "<end>"}, "3 <break> 3 <end>"),
        # Qwen2-VL, InternVL.
        ({"start": "<start>", "end": "<end>"}, "<start> 6 <end>"),
    ],
)
def test_one_view_in_its_tokens(tokenizer: Tokenizer, layout: dict[str, Any] | None, expected: str) -> None:
    document = _build(_builder(tokenizer, EMBEDDING, layout), (4, 6))
    assert _names(tokenizer, document) == expected
    assert document.images == (ImageExtent(1, 0, document.num_tokens - 2),)
    assert (document.token_ids[document.scatter_index] == tokenizer.image_id).all()
    assert _features(document, EMBEDDING) == list(range(6))
    assert not document.loss_weights[: document.images[0].stop - 1].any()
    assert document.position_ids.tolist() == list(range(document.num_tokens))


def test_nvlm_tags_embedded_tiles(tokenizer: Tokenizer) -> None:
    builder = _builder(tokenizer, EMBEDDING, TAGS, **TILED)
    two = _build(builder, (4, 8))
    assert _names(tokenizer, two) == "<start> <tile_1> 4 <tile_2> 4 <whole> 4 <end>"
    assert _features(two, EMBEDDING)[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    # A single tile has the tag of the overview, as in NVLM-D.
    assert _names(tokenizer, _build(builder, (4, 4))) == "<start> <whole> 4 <end>"


def test_nvlm_spells_its_tags_as_text(tokenizer: Tokenizer) -> None:
    layout = {"tile": "t{n}", "overview": "tg", "start": "<I>", "end": "</I>", "spell": True}
    document = _build(_builder(tokenizer, EMBEDDING, layout, **TILED), (4, 8))
    text = [*tokenizer.encode("<I>t1"), *[tokenizer.image_id] * 4, *tokenizer.encode("t2")]
    assert document.token_ids[1 : 1 + len(text)].tolist() == text


def test_idefics3_breaks_rows_of_tiles(tokenizer: Tokenizer) -> None:
    """``spell: tags`` encodes the tags as text and the other names as tokens."""
    tiling = {"kind": "idefics3", "longest_side": 8}
    names = {"crop_start": "<vs>", "end": "<vs>", "tile": "r{row}c{column}", "overview": "whole", "spell": "tags"}
    breaks = {"tile_row_break": "\n", "overview_break": "\n\n"}
    builder = _builder(tokenizer, EMBEDDING, {**names, **breaks}, **{**TILED, "tiling": tiling})
    ids, start = tokenizer.encode, [tokenizer.special_id("<vs>", "")]
    features = [tokenizer.image_id] * 4
    expected: list[int] = []
    for row in (1, 2):
        for column in (1, 2):
            expected += [*start, *ids(f"r{row}c{column}"), *features]
        expected += ids("\n" if row == 1 else "\n\n")
    expected += [*start, *ids("whole"), *features, *start]
    assert _build(builder, (8, 8)).token_ids[1 : 1 + len(expected)].tolist() == expected
    one = _builder(tokenizer, EMBEDDING, {**names, **breaks}, **{**TILED, "tiling": {**tiling, "split": False}})
    alone = [*start, *ids("whole"), *features, *start]
    assert _build(one, (8, 8)).token_ids[1 : 1 + len(alone)].tolist() == alone
    few = _builder(tokenizer, EMBEDDING, {**names, **breaks}, **{**TILED, "tiling": tiling, "split_up_to": 1})
    assert len(_build(few, (8, 8)).items) == 5
    assert len(_build(few, (8, 8), (4, 8)).items) == 2
    assert ImageLayoutConfig(**names).tokens(grids(1, 4)) == ["<vs>", "<vs>"]


def test_tags_tell_the_place_of_a_tile_and_the_number_of_its_image(tokenizer: Tokenizer) -> None:
    """MM1.5 describes indices (k, i, j). Its exact format and the start of its counts are not published."""
    layout = {"tile": "({image},{row},{column})#{n} ", "overview": "({image}) ", "spell": True}
    builder = _builder(tokenizer, EMBEDDING, layout, **{**TILED, "tiling": {"kind": "internvl", "max_tiles": 6}})
    shapes = [(1, 2), (3, 2), (1, 1), (2, 1)]
    document = _build(builder, *((4 * rows, 4 * columns) for rows, columns in shapes))
    text = ""
    for image, (rows, columns) in enumerate(shapes, 1):
        number = 0
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                number += 1
                text += f"({image},{row},{column})#{number} |" if rows * columns > 1 else ""
        text += f"({image}) |"
    expected: list[int] = []
    for tag in text.removesuffix("|").split("|"):
        expected += [*tokenizer.encode(tag), *[tokenizer.image_id] * 4]
    assert document.token_ids[1 : 1 + len(expected)].tolist() == expected
    # Without the image number, tiles of different images may have the same tag.
    stacked = _build(_builder(tokenizer, EMBEDDING, {"tile": "<tile_{column}>"}, **TILED), (8, 4), (4, 8))
    assert _names(tokenizer, stacked) == "<tile_1> 4 <tile_1> 8 <tile_1> 4 <tile_2> 8"
    with pytest.raises(DataConfigError, match=r"layout\.tile: tokenizer .* has no token '<tile_1_1>'"):
        _builder(tokenizer, EMBEDDING, {"tile": "<tile_{row}_{column}>"}, **TILED)


def test_every_tag_is_known_before_an_image_is() -> None:
    tags = ImageLayoutConfig(tile="{row}.{column}").tags(grids(1, 6))
    shapes = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7) if rows * columns <= 6]
    assert sorted(tags) == sorted(
        {f"{r + 1}.{c + 1}" for rows, columns in shapes for r in range(rows) for c in range(columns)}
    )
    assert ImageLayoutConfig(tile="<{n}>").tags(grids(1, 3)) == ["<1>", "<2>", "<3>"]
    assert ImageLayoutConfig(tile="<{n}>").tokens(grids(1, 2)) == ["<1>", "<2>"]
    assert ImageLayoutConfig(tile="<{n}{image}>", spell=True).tokens(grids(1, 2)) == []


def test_attended_tiles_are_tagged_each_seeing_its_own(tokenizer: Tokenizer) -> None:
    spec = MediaSpec(Placement.CROSS_ATTENTION, patch_size=2, fixed_grid=(2, 2))
    document = _build(_builder(tokenizer, spec, TAGS, **TILED), (4, 8))
    # NVLM-X: the tag of tile k attends only tile k, and text attends all tiles.
    assert _names(tokenizer, document) == "<start> <tile_1> <tile_2> <whole> 1 <end>"
    spans = (Span(0, ()), Span(1, (0, 1, 2)), Span(2, (0,)), Span(3, (1,)), Span(4, (2,)), Span(5, (0, 1, 2)))
    assert document.spans == spans
    two = _build(_builder(tokenizer, spec, {"tile": "<tile_{n}>"}, **TILED), (4, 4), (4, 8))
    # The second image follows the first without text in between, so later tokens attend both.
    assert two.spans == (Span(0, ()), Span(1, (0,)), Span(2, (1,)), Span(3, (2,)), Span(4, (0, 1, 2, 3)))


def test_a_hybrid_embeds_the_overview_behind_the_tags(tokenizer: Tokenizer) -> None:
    spec = MediaSpec(Placement.HYBRID, patch_size=2, fixed_grid=(2, 2))
    builder = _builder(tokenizer, spec, TAGS, **TILED)
    two, one = _build(builder, (4, 8)), _build(builder, (4, 4))
    assert _names(tokenizer, two) == "<start> <tile_1> <tile_2> <whole> 4 <end>"
    assert two.spans == (Span(0, ()), Span(1, (0, 1)), Span(2, (0,)), Span(3, (1,)), Span(4, (0, 1)))
    # A single crop is both overview and tile, as in NVLM-H.
    assert _names(tokenizer, one) == "<start> <tile_1> <whole> 4 <end>"
    assert [item.embedded for item in one.items] == [True, False]


@pytest.mark.parametrize("merge", [1, 2])
def test_molmo_runs_its_rows_through_all_crops(tokenizer: Tokenizer, merge: int) -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=2 // merge, merge=merge)
    layout = {"crop_start": "<vs>", "crop_end": "<ve>", "row_end": "<row>", "join_tiles": True}
    # Crops of 6 x 6 features with a margin of 1: 20 x 28 pixels are cut into 2 x 3 crops without resizing.
    tiling = {"kind": "molmo", "margin": merge, "max_tiles": 12}
    document = _build(_builder(tokenizer, spec, layout, kind="tiles", size=12, tiling=tiling), (20, 28))
    overview = " ".join(["6 <row>"] * 6)
    crops = " ".join(["14 <row>"] * 10)
    assert _names(tokenizer, document) == f"<vs> {overview} <ve> <vs> {crops} <ve>"
    assert len(document.items) == 7
    if merge == 1:  # The kept features of the crops are those of the whole image, in reading order.
        assert _features(document, spec)[36:] == list(range(140))
    assert document.scatter_index.size == 36 + 140


@pytest.mark.parametrize("placement", [Placement.EMBEDDING, Placement.CROSS_ATTENTION, Placement.HYBRID])
def test_a_cut_document_keeps_images_whole_with_their_layout(tokenizer: Tokenizer, placement: Placement) -> None:
    spec = MediaSpec(placement, patch_size=2, fixed_grid=(2, 2))
    builder = _builder(tokenizer, spec, TAGS, **TILED)
    parts = [
        part for size in ((4, 8), (4, 4), (8, 4)) for part in (ImagePart(_png(*size), "png"), TextPart("abcdefgh"))
    ]
    whole = builder(Sample(tuple(parts), {}, Provenance("x", "shard", "key", 0)))
    room = 24 if placement is Placement.EMBEDDING else 14
    pieces = list(split(whole, lambda document: document.num_tokens <= room))
    assert len(pieces) > 2
    np.testing.assert_array_equal(np.concatenate([piece.token_ids for piece in pieces]), whole.token_ids)
    start, end = tokenizer.special_id("<start>", ""), tokenizer.special_id("<end>", "")
    for piece in pieces:
        assert [piece.token_ids[image.start] for image in piece.images] == [start] * piece.num_images
        assert [piece.token_ids[image.stop - 1] for image in piece.images] == [end] * piece.num_images
    if spec.needs_embedded:
        features = [value for piece in pieces if piece.images for value in _features(piece, spec)]
        assert features == _features(whole, spec)
    if spec.needs_attended:
        seen = [_attended(piece) for piece in pieces]
        assert [items for rows in seen for items in rows] == _attended(whole)


def _attended(document: Document) -> list[list[bytes]]:
    """Return, for each token, the pixels of the crops that it attends."""
    ends = [*(span.start for span in document.spans[1:]), document.num_tokens]
    rows = []
    for span, end in zip(document.spans, ends, strict=True):
        rows += [[document.items[item].values.tobytes() for item in span.items]] * (end - span.start)
    return rows


def test_qwen2_vl_positions_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=1, merge=2, position_axes=3)
    layout = {"start": "<start>", "end": "<end>"}
    builder = _builder(tokenizer, spec, layout, kind="native", min_pixels=4, max_pixels=400)
    document = _build(builder, (4, 8), (10, 4))
    start, end = tokenizer.special_id("<start>", ""), tokenizer.special_id("<end>", "")
    config = Qwen2VLConfig(
        image_token_id=tokenizer.image_id,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=end,
        text_config={"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 0},
        vision_config={"depth": 0, "embed_dim": 8, "hidden_size": 8, "num_heads": 1, "spatial_merge_size": 2},
    )
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    grids = torch.tensor([item.grid for item in document.items])
    theirs, _ = Qwen2VLModel(config).get_rope_index(
        ids, mm_token_type_ids=(ids == tokenizer.image_id).int(), image_grid_thw=grids
    )
    assert document.position_ids.T.tolist() == theirs[:, 0].tolist()


@pytest.mark.parametrize(
    ("spec", "layout", "transforms", "message"),
    [
        (
            EMBEDDING,
            {"row_end": "<nl>"},
            {},
            r"layout\.row_end: tokenizer .* has no token '<nl>'; .*add_special_tokens",
        ),
        (EMBEDDING, {"end": IMG}, {}, r"layout\.end='<image>': is the image token"),
        (EMBEDDING, TAGS, {}, "need transforms.kind=tiles"),
        (EMBEDDING, {"tile": "<tile_{n}>"}, {**TILED, "tiling": {"max_tiles": 4, "kind": "llama"}}, "'<tile_4>'"),
        (MediaSpec(Placement.CROSS_ATTENTION, patch_size=2), {"row_end": "<row>"}, TILED, "the text contains none"),
        (MediaSpec(Placement.HYBRID, patch_size=2), {"join_tiles": True}, TILED, "attends tiles"),
        (MediaSpec(Placement.HYBRID, patch_size=2), {"overview_break": " "}, TILED, "overview_break: .*attends tiles"),
        (EMBEDDING, {"tile_row_break": " "}, {}, "tile_row_break, tile, join_tiles need transforms.kind=tiles"),
        (MediaSpec(Placement.EMBEDDING, patch_size=2, position_axes=3), {"row_end": "<row>"}, {}, "three axes"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(
    tokenizer: Tokenizer, spec: MediaSpec, layout: dict[str, Any], transforms: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataConfigError, match=message):
        _builder(tokenizer, spec, layout, **transforms)


class UnsafeTokenizer:
    """A tokenizer that encodes the name of a special token in a text as that token."""

    def __init__(self, safe: Tokenizer) -> None:
        self._safe = safe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._safe, name)

    def encode(self, text: str) -> list[int]:
        return [self._safe.special_id(text, "test")] if text in LAYOUT else self._safe.encode(text)


def test_text_that_spells_a_layout_token_is_refused(tokenizer: Tokenizer) -> None:
    builder = _builder(UnsafeTokenizer(tokenizer), EMBEDDING, {"row_end": "<row>"})  # type: ignore[arg-type]
    assert builder(Sample((TextPart("<ve>"),))).num_tokens == 3  # This layout does not use <ve>.
    with pytest.raises(SampleError, match="the text spells <row>"):
        builder(Sample((TextPart("<row>"),)))
    # A correct tokenizer spells it out.
    assert _builder(tokenizer, EMBEDDING, {"row_end": "<row>"})(Sample((TextPart("<row>"),))).num_tokens == 7


def test_a_missing_piece_says_how_to_train_it() -> None:
    bundled = Path(__file__).resolve().parents[3] / "examples" / "emoji" / "tokenizer.model"
    pieces = load_tokenizer(SentencePieceTokenizerConfig(path=bundled))
    with pytest.raises(
        DataConfigError, match=r"has no piece '<row>'; train .* mmscale data tokenizer --special '<row>'"
    ):
        _builder(pieces, EMBEDDING, {"row_end": "<row>"})


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tile": "<{line}>"}, r"only \{n\}, \{row\}, \{column\}, \{image\} is allowed in braces"),
        ({"tile": "<{row>"}, "is allowed in braces"),
        ({"overview": "<{n}>"}, r"overview='<\{n\}>': only \{image\} is allowed"),
        ({"tile": "<{image}>"}, "write tags as text"),
        ({"tile": "<{n}>", "join_tiles": True}, "tile and join_tiles exclude each other"),
        ({"tile_row_break": " ", "join_tiles": True}, "tile_row_break and join_tiles exclude each other"),
    ],
)
def test_contradictions_are_refused(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImageLayoutConfig.model_validate(layout)


HYBRID = MediaSpec(Placement.HYBRID, patch_size=2)


def test_tags_of_attended_tiles_among_the_keys(tokenizer: Tokenizer) -> None:
    """NVLM-H: the text contains only the overview's tag; among the keys, a tile's features follow its tag."""
    layout = {"tile": "<tile_{n}>", "overview": "<whole>", "attended_tags": "keys"}
    document = _build(_builder(tokenizer, HYBRID, layout, **TILED), (4, 8))
    assert _names(tokenizer, document) == "<whole> 4"
    tags = [tokenizer.special_id(f"<tile_{number}>", "test") for number in (1, 2)]
    assert [item.tag for item in document.items] == [(tags[0],), (tags[1],), ()]
    block = collate([Pack((document,), 0)], HYBRID).media["image"]
    assert block.tag_ids.tolist() == tags
    assert block.attended_index.tolist() == [12, 0, 1, 2, 3, 13, 4, 5, 6, 7]  # 12 features, then the tags.


@pytest.mark.parametrize(
    ("spec", "layout"),
    [(EMBEDDING, {"tile": "<tile_{n}>"}), (HYBRID, {"overview": "<whole>"})],
    ids=["embedded", "none"],
)
def test_tags_among_keys_that_do_not_exist_are_refused(
    tokenizer: Tokenizer, spec: MediaSpec, layout: dict[str, Any]
) -> None:
    with pytest.raises(DataConfigError, match="attended_tags=keys: needs the tags themselves"):
        _builder(tokenizer, spec, {**layout, "attended_tags": "keys"}, **TILED)
