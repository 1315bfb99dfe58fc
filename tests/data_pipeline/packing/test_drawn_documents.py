"""Documents with images as tokens, compared with the published orders written out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer as HuggingFaceTokenizer

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import IGNORE, Document
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.history.digest import step_digest
from data_pipeline.history.text_spans import text_spans
from data_pipeline.images.drawn_images import ImageTokensConfig
from data_pipeline.loader.loader import Loader
from data_pipeline.loader.sample_source import with_image_tokenizer
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.randomness import SampleRng
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.truncation import longest_part, split
from data_pipeline.sample import ImagePart, Part, Provenance, Sample, TextPart, VideoPart
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.token_grid import GridTimes, encode_grid
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer
from tests.data_pipeline.conftest import WriteSet, picture

DIGEST, CODES, FIRST = "ab" * 32, 50, 300
PAD, BOS, EOS = 0, 1, 2
GRID = np.arange(6).reshape(2, 3) * 7
NAMES = ["<|image start|>", "<|image token|>", "<|extra_200|>", "<|extra_201|>", "<|image end|>", "<code_3>"]
EMU3 = {
    "start": "<|image start|>",
    "size": "{height}*{width}",
    "content": "<|image token|>",
    "row_end": "<|extra_200|>",
    "frame_end": "<|extra_201|>",
    "end": "<|image end|>",
}
JANUS = {"start": "<|image start|>", "end": "<|image end|>", "grid": [2, 3]}
TEXT = MediaSpec()
TOWER = MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(2, 2))


@pytest.fixture(scope="module")
def marks_path(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of single bytes, with the marks of Emu3 and one code."""
    tokenizer = HuggingFaceTokenizer.from_file(str(tokenizer_path))
    tokenizer.add_tokens(NAMES)
    path = tmp_path_factory.mktemp("marks") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def tokenizer(marks_path: Path) -> Tokenizer:
    return load_tokenizer(HuggingFaceTokenizerConfig(path=marks_path, text_tokens=("<code_3>",)))


def dataset(marks: dict[str, Any], template: dict[str, Any], manifest: Path | str = "x") -> DatasetConfig:
    tokens = {"codebook_size": CODES, "first_id": FIRST, "tokenizer": DIGEST, **marks}
    return DatasetConfig.model_validate(
        {"name": "x", "manifest": manifest, "template": {"kind": "drawing", **template}, "image_tokens": tokens}
    )


def sample(codes: np.ndarray | None = GRID, digest: str = DIGEST, caption: str = "a fox", **fields: Any) -> Sample:
    grid = None if codes is None else encode_grid(codes, CODES + 1, digest)
    parts: tuple[Part, ...] = (ImagePart(picture(1), "png", None, grid), TextPart(caption))
    return Sample(parts, {"caption": caption, **fields}, Provenance("x", "shard.tar", "key7", 0))


CLIP = np.arange(12).reshape(2, 2, 3) * 4
VIDEO_SIZE = {"video_size": "{height}*{width}*{frames} {fps}fps {seconds}s"}


def clip_sample(codes: np.ndarray = CLIP, caption: str = "a fox", **changes: Any) -> Sample:
    """Return a sample with a video as tokens, of frames that were encoded at 2.5 a second."""
    grid = encode_grid(codes, CODES + 1, DIGEST, GridTimes(3.2, 2.5))
    parts: tuple[Part, ...] = (replace(VideoPart(b"", "mp4", grid=grid), **changes), TextPart(caption))
    return Sample(parts, {"caption": caption}, Provenance("x", "shard.tar", "key7", 0))


def learned(document: Document) -> list[float]:
    """Return the loss weight of each token, which the document stores one position earlier."""
    assert ((document.labels == IGNORE) | (document.labels == np.append(document.token_ids[1:], -1))).all()
    weights = np.where(document.labels == IGNORE, 0, document.loss_weights)
    return [0.0, *weights[:-1].tolist()]


def test_the_order_of_emu3(tokenizer: Tokenizer) -> None:
    """Emu3 (arXiv 2409.18869), section 2.2: [BOS] caption [SOV] meta [SOT] tokens [EOV] [EOS], EOL and EOF inside."""
    sov, sot, eol, eof, eov = (tokenizer.special_id(name, "") for name in NAMES[:5])
    codes = (GRID + FIRST).tolist()
    caption, size = tokenizer.encode("a fox"), tokenizer.encode("2*3")
    image = [sov, *size, sot, *codes[0], eol, *codes[1], eol, eof, eov]
    is_code = [False] * 5 + [True] * 3 + [False] + [True] * 3 + [False] * 3
    image_weights = [0.5 if code else 0.25 for code in is_code]

    build = DocumentBuilder(dataset(EMU3, {"image_weight": 0.5, "mark_weight": 0.25}), tokenizer, TEXT)
    first = build(sample())
    assert first.token_ids.tolist() == [BOS, *caption, *image, EOS]
    assert learned(first) == [0.0, *[1.0] * len(caption), *image_weights, 0.25]
    assert first.drawn is not None
    assert first.drawn.tolist() == [False] * (1 + len(caption)) + is_code + [False]
    assert [(extent.start, extent.stop) for extent in first.images] == [(6, 6 + len(image))]

    behind = DocumentBuilder(dataset(EMU3, {"image_weight": 0, "caption_last": 1}), tokenizer, TEXT)(sample())
    assert behind.token_ids.tolist() == [BOS, *image, *caption, EOS]
    assert learned(behind) == [0.0] * (1 + len(image)) + [1.0] * (len(caption) + 1)
    prompt = build.build_prompt(sample())
    assert prompt.token_ids.tolist() == [BOS, *caption]


def test_the_order_of_janus(tokenizer: Tokenizer) -> None:
    """Janus (arXiv 2410.13848): roles as text, the image between its two marks, loss on the image alone."""
    template = {"prompts": ["User: {caption}\n\nAssistant:"], "text_weight": 0, "mark_weight": 0}
    build = DocumentBuilder(dataset(JANUS, template), tokenizer, TOWER)
    document = build(sample())
    text = tokenizer.encode("User: a fox\n\nAssistant:")
    start, end = (tokenizer.special_id(NAMES[i], "") for i in (0, 4))
    codes = (GRID + FIRST).reshape(-1).tolist()
    assert document.token_ids.tolist() == [BOS, *text, start, *codes, end, EOS]
    assert learned(document) == [0.0] * (2 + len(text)) + [1.0] * 6 + [0.0] * 2
    assert document.items == ()


def test_a_listed_id_for_each_code(tokenizer: Tokenizer) -> None:
    listed = list(range(900, 900 + 2 * CODES, 2))[::-1]
    document = DocumentBuilder(dataset({"first_id": None, "ids": listed}, {}), tokenizer, TEXT)(sample())
    assert document.drawn is not None
    assert document.token_ids[document.drawn].tolist() == [listed[code] for code in GRID.reshape(-1)]


def test_the_order_of_a_video(tokenizer: Tokenizer) -> None:
    """Emu3 (arXiv 2409.18869), section 2.2: EOL after each row, EOF after each grid; our text with size and times."""
    sov, sot, eol, eof, eov = (tokenizer.special_id(name, "") for name in NAMES[:5])
    codes = (CLIP + FIRST).tolist()
    caption, size = tokenizer.encode("a fox"), tokenizer.encode("2*3*2 2.5fps 3.2s")
    grids = [token for rows in codes for token in [*rows[0], eol, *rows[1], eol, eof]]
    video = [sov, *size, sot, *grids, eov]
    is_code = [FIRST <= token < FIRST + CODES for token in video]
    weights = [0.5 if code else 0.25 for code in is_code]
    marks = {**EMU3, **VIDEO_SIZE}

    drawn = DocumentBuilder(dataset(marks, {"image_weight": 0.5, "mark_weight": 0.25}), tokenizer, TEXT)(clip_sample())
    assert drawn.token_ids.tolist() == [BOS, *caption, *video, EOS]
    assert learned(drawn) == [0.0, *[1.0] * len(caption), *weights, 0.25]
    assert drawn.drawn is not None
    assert drawn.drawn.tolist() == [False] * (1 + len(caption)) + is_code + [False]
    assert [(extent.start, extent.stop) for extent in drawn.images] == [(6, 6 + len(video))]

    template = {"kind": "caption", "prompts": ["name:"], "answers": ["{caption}"]}
    build = DocumentBuilder(dataset(marks, template), tokenizer, TEXT)
    read = build(clip_sample())
    assert read.token_ids.tolist() == [BOS, *video, *tokenizer.encode("name:"), *caption, EOS]
    assert read.labels[read.labels != IGNORE].tolist() == [*caption, EOS]
    assert build.dry_run(clip_sample()).token_ids.tolist() == read.token_ids.tolist()
    for part in (read, longest_part(read, lambda part: part.num_tokens < read.num_tokens)):
        assert part is not None
        (span,) = [span for span in text_spans(part, tokenizer, TEXT) if not span.is_text]
        assert (span.kind, span.text) == ("video", "video 1: tokens")

    plain = DocumentBuilder(dataset({"end": NAMES[4]}, template), tokenizer, TEXT)(clip_sample())
    assert plain.token_ids.tolist()[1:14] == [*(CLIP + FIRST).reshape(-1).tolist(), eov]
    beside_tower = DocumentBuilder(dataset(marks, {}), tokenizer, TOWER)(clip_sample())
    assert beside_tower.token_ids.tolist() == drawn.token_ids.tolist()


@pytest.mark.parametrize("kind", ["interleaved", "dialogue"])
def test_a_video_without_tokens_is_left_out_where_tokens_are_read(tokenizer: Tokenizer, kind: str) -> None:
    """As one without a block ``video``. A sample that is nothing without it is a bad sample."""
    build = DocumentBuilder(dataset(EMU3, {"kind": kind, "images": "required"}), tokenizer, TEXT)
    turns = [{"role": "user", "content": "<video> it?"}, {"role": "assistant", "content": "a fox"}]
    made = replace(clip_sample(grid=None), fields={"messages": turns})
    with pytest.raises(SampleError, match="video and no image, but it has no token grid; write token grids with"):
        build(made)
    image = sample().parts[0]
    found = build(
        replace(made, parts=(image, *made.parts), fields={"messages": [{**turns[0], "content": "<image>?"}, turns[1]]})
    )
    assert found.drawn is not None
    assert int(found.drawn.sum()) == GRID.size


@pytest.mark.parametrize(("dropped", "padding"), [("empty", []), ("pad", [PAD] * 5)])
def test_texts_are_dropped_at_the_rate_and_equally_again(tokenizer: Tokenizer, dropped: str, padding: list) -> None:
    template = {"text_dropout": 0.1, "dropped_text": dropped}
    build = DocumentBuilder(dataset(JANUS, template), tokenizer, TEXT)
    whole, count = build(sample()), 400
    codes = (GRID + FIRST).reshape(-1).tolist()
    lengths = Counter[int]()
    for number in range(count):
        document = build(sample(), SampleRng(3, number, 1))
        if document.token_ids.tolist() != whole.token_ids.tolist():
            lengths[document.num_tokens] += 1
            assert document.token_ids[1 : len(padding) + 1].tolist() == padding
            assert document.labels[document.loss_weights > 0].tolist() == codes
    assert list(lengths) == [whole.num_tokens - 5 + len(padding)]
    assert abs(lengths.total() / count - 0.1) < 0.045  # Three standard deviations.


def test_the_order_is_drawn_anew_in_each_epoch(tokenizer: Tokenizer) -> None:
    build = DocumentBuilder(dataset(EMU3, {"caption_last": 0.3}), tokenizer, TEXT)
    starts = [[build(sample(), SampleRng(3, i, epoch)).images[0].start for i in range(100)] for epoch in (0, 1, 0)]
    for epoch in starts:
        assert set(epoch) == {1, 6}
        assert abs(epoch.count(1) / 100 - 0.3) < 0.14
    assert starts[0] == starts[2]
    assert starts[0] != starts[1]


def test_without_a_tower_other_templates_read_the_tokens(tokenizer: Tokenizer) -> None:
    """Emu3's chat: ``USER: {image}{text} ASSISTANT:`` with the image as tokens that are not learned."""
    caption = {"kind": "caption", "prompts": ["name:"], "answers": ["{caption}"]}
    document = DocumentBuilder(dataset(EMU3, caption), tokenizer, TEXT)(sample())
    drawn = DocumentBuilder(dataset(EMU3, {"caption_last": 1}), tokenizer, TEXT)(sample())
    stop = drawn.images[0].stop
    np.testing.assert_array_equal(document.token_ids[:stop], drawn.token_ids[:stop])
    answer = tokenizer.encode("a fox")
    assert document.labels[document.labels != IGNORE].tolist() == [*answer, EOS]
    with_tower = DocumentBuilder(dataset(EMU3, caption), tokenizer, TOWER)(sample())
    assert with_tower.drawn is None
    assert len(with_tower.items) == 1


def test_a_part_never_ends_inside_an_image(tokenizer: Tokenizer) -> None:
    build = DocumentBuilder(dataset(EMU3, {}), tokenizer, TEXT)
    whole = build(sample(caption="a long text about a fox"))
    (image,) = whole.images
    for most in range(1, whole.num_tokens + 1):
        parts = list(split(whole, lambda part, most=most: part.num_tokens <= most))
        kept = [part for part in parts if part.images]
        if most < image.stop - image.start:
            assert kept == []
            assert all(part.drawn is not None and not part.drawn.any() for part in parts)
        else:
            (part,) = kept
            inside = slice(part.images[0].start, part.images[0].stop)
            np.testing.assert_array_equal(part.token_ids[inside], whole.token_ids[image.start : image.stop])
            assert part.drawn is not None
            assert int(part.drawn.sum()) == GRID.size
        first = longest_part(whole, lambda part, most=most: part.num_tokens <= most)
        assert first is not None
        assert not image.start < first.num_tokens < image.stop


def test_no_label_is_the_first_code_of_another_part(tokenizer: Tokenizer) -> None:
    """Images without a mark before them: a batch finds the labels that are codes in each document alone."""
    text = DocumentBuilder(dataset({}, {"kind": "text"}), tokenizer, TEXT)
    plain = text(Sample((TextPart("only text"),), {}, Provenance("x", "s", "k", 1)))
    image = DocumentBuilder(dataset({}, {}), tokenizer, TEXT)(sample())
    before, after = split(image, lambda part: part.num_tokens <= 7)
    first, _ = split(plain, lambda part: part.num_tokens <= 6)
    assert (int(first.labels[-1]), int(before.labels[-1])) == (int(plain.token_ids[6]), IGNORE)
    batch = collate([Pack((first, after), 0), Pack((before, plain), 1)], TEXT)
    assert batch.learned is not None
    assert batch.drawn_labels is not None
    codes = (batch.labels >= FIRST) & (batch.loss_weights != 0)
    assert torch.equal(batch.learned.codes, codes.nonzero().flatten())
    assert torch.equal(batch.drawn_labels, codes)
    assert torch.equal(batch.learned.index(), batch.loss_weights.nonzero().flatten())


def test_an_image_as_tokens_beside_one_with_crops(tokenizer: Tokenizer) -> None:
    """The cut of a document whose second image has no crops keeps the crops of the others."""
    crops = DocumentBuilder(dataset(EMU3, {"kind": "interleaved"}), tokenizer, TOWER)
    image = ImagePart(picture(2), "png")
    read = crops(Sample((image, TextPart("x"), replace(image, name="1.png")), {}, Provenance("x", "s", "k", 0)))
    mixed = replace(
        read, images=(read.images[0], read.images[0]._replace(start=5, first_item=1, stop=6), read.images[1])
    )
    parts = list(split(mixed, lambda part: part.num_tokens <= 6))
    assert [len(part.items) for part in parts] == [1, 1]
    assert [[each.first_item for each in part.images] for part in parts] == [[0, 1], [0]]


def test_batches_mark_codes_and_the_labels_that_are_codes(tokenizer: Tokenizer) -> None:
    build = DocumentBuilder(dataset(EMU3, {"image_weight": 0.5}), tokenizer, TEXT)
    text = DocumentBuilder(dataset(EMU3, {"kind": "text"}), tokenizer, TEXT)
    plain = text(Sample((TextPart("only text"),), {}, Provenance("x", "s", "k", 1)))
    packs = [
        Pack((build(sample()), plain), 0),
        Pack((plain,), 1),
        Pack(
            (
                plain,
                build(sample(GRID.T)),
            ),
            2,
        ),
    ]
    whole = collate(packs, TEXT)
    joined = concatenate([collate([pack], TEXT) for pack in packs], TEXT)
    assert whole.drawn is not None
    assert joined.drawn is not None
    torch.testing.assert_close(joined.drawn, whole.drawn)
    torch.testing.assert_close(whole.drawn, (whole.token_ids >= FIRST) & (whole.token_ids < FIRST + CODES))
    assert whole.drawn_labels is not None
    torch.testing.assert_close(whole.drawn_labels, (whole.labels >= FIRST) & (whole.labels < FIRST + CODES))
    assert set(whole.loss_weights[whole.drawn_labels].tolist()) == {0.5}
    none = collate(packs[1:2], TEXT)
    assert (none.drawn, none.drawn_labels) == (None, None)
    assert len(whole.pairs) == 0


def test_the_spans_of_a_document_name_its_tokens(tokenizer: Tokenizer) -> None:
    spans = text_spans(DocumentBuilder(dataset(EMU3, {}), tokenizer, TEXT)(sample()), tokenizer, TEXT)
    found = [(span.kind, span.num_tokens) for span in spans]
    assert found == [("read", 1), ("learned", 5), ("image", 15), ("read", 1)]
    assert [span.text for span in spans if span.kind == "image"] == ["image 1: tokens"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (sample(None), "has no token grid; write token grids with: mmscale data encode"),
        (sample(GRID.T), r"a grid of 3x2 codes, but the model draws 2x3 \(image_tokens.grid\)"),
        (sample(GRID + 15), r"has the code 50, but codes end at 49 \(image_tokens.codebook_size=50\)"),
        (sample(digest="cd" * 32), "of the image tokenizer cdcdcdcdcdcd..., but image_tokens.tokenizer names abababab"),
        (sample(caption="see <code_3>"), "the text spells a code of an image"),
        (replace(sample(), parts=()), "0 images and 0 videos, but template.kind=drawing takes exactly one image"),
        (replace(sample(), parts=sample().parts * 2), "2 images and 0 videos, but"),
        (sample(caption=" "), "the answer is empty"),
        (clip_sample(CLIP[:, :1]), r"video mp4 is a grid of 1x3 codes, but the model draws 2x3"),
        (clip_sample(CLIP + 6), "video mp4 has the code 50"),
        (clip_sample(grid=encode_grid(GRID, CODES, DIGEST)), "video mp4 has a token grid with 2 sides"),
        (replace(sample(), parts=(sample().parts[0], clip_sample().parts[0])), "1 images and 1 videos, but"),
    ],
)
def test_bad_samples_are_refused_with_the_reason(tokenizer: Tokenizer, made: Sample, reason: str) -> None:
    ids = list(range(FIRST, FIRST + CODES))
    ids[3] = tokenizer.special_id("<code_3>", "")
    build = DocumentBuilder(dataset({**JANUS, "first_id": None, "ids": ids}, {}), tokenizer, TEXT)
    with pytest.raises(SampleError, match=reason) as raised:
        build(made)
    assert raised.value.key == "key7"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"first_id": None}, "give either first_id or ids"),
        ({"ids": [1, 2]}, "give either first_id or ids"),
        ({"first_id": None, "ids": [1, 2, 2]}, "2 different ids for codebook_size=3 codes"),
        ({"first_id": 2**31 - 2}, "the last code has the id 2147483648, above"),
        ({"size": "{height}"}, "expected {height} and {width}"),
        ({"size": "{height}*{width}{x.y}"}, "expected {height} and {width}"),
        ({"video_size": "{height} {rate}"}, "video_size='{height} {rate}': only {fps}, {frames}, {height}, {seconds}"),
        ({"video_size": "{height}}"}, "are allowed in braces"),
        ({"tokenizer": "AB" * 32}, "should match pattern"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ImageTokensConfig.model_validate({"codebook_size": 3, "first_id": 7, **values})


@pytest.mark.fault
def test_settings_that_do_not_fit_the_tokenizer_are_refused(tokenizer: Tokenizer) -> None:
    for marks, reason in [
        ({"start": "<nothing>"}, "image_tokens.start"),
        ({"first_id": 0}, "the id 3 of the image token is also the id of a code"),
        ({**EMU3, "first_id": tokenizer.special_id(NAMES[2], "")}, r"of <\|extra_200\|> is also"),
    ]:
        with pytest.raises(DataConfigError, match=reason):
            DocumentBuilder(dataset(marks, {}), tokenizer, TEXT)
    nothing = dataset(EMU3, {}).model_copy(update={"image_tokens": None})
    with pytest.raises(DataConfigError, match=r"needs data\.image_tokens"):
        DocumentBuilder(nothing, tokenizer, TEXT)
    with pytest.raises(DataConfigError, match="gives an image as tokens"):
        DocumentBuilder(dataset(EMU3, {}), tokenizer, replace(TOWER, placement=Placement.PAIR))


def test_a_run_takes_the_tokenizer_of_the_manifest_and_refuses_another(write_set: WriteSet, marks_path: Path) -> None:
    members = [
        {"png": picture(i), "png.tokens": encode_grid((GRID + i) % CODES, CODES, DIGEST), "txt": b"x" * (i % 5 + 1)}
        for i in range(40)
    ]
    for i, codes in enumerate((CLIP, CLIP[:1], CLIP[::-1], CLIP)):
        members[9 * i] = {"mp4.tokens": encode_grid(codes, CODES, DIGEST, GridTimes(1, 8)), "txt": b"a clip"}
    path = write_set("x", members)
    shards = [Manifest.open(path).shard_path(number) for number in range(Manifest.open(path).num_shards)]
    write_manifest(path, shards, image_tokenizer=DIGEST)

    def config(digest: str | None, workers: int = 0) -> DataConfig:
        raw = dataset({**EMU3, "tokenizer": digest}, {"text_dropout": 0.5, "caption_last": 0.5}, path)
        tokenizer = {"kind": "tokenizers", "path": marks_path}
        values = {"tokenizer": tokenizer, "datasets": [raw], "lanes": 4, "packing": {"max_tokens": 60}}
        return DataConfig.model_validate({**values, "workers": workers})

    def digests(rank: int, world_size: int, workers: int = 0) -> list[str]:
        with Loader(config(None, workers), TEXT, seed=1, rank=rank, world_size=world_size) as loader:
            return [step_digest(list(next(loader).microbatches)) for _ in range(4)]

    assert digests(0, 1) == digests(0, 1, workers=2)
    with Loader(config(DIGEST), TEXT, seed=1) as loader:
        step = next(loader)
        drawn = [batch.drawn for batch in step.microbatches]
        assert all(each is not None and each.any() for each in drawn)
    with pytest.raises(DataConfigError, match=r"data set x: its token grids are of the image tokenizer abab"):
        Loader(config("cd" * 32), TEXT, seed=1)
    found = with_image_tokenizer(config(None).datasets[0], Manifest.open(path)).image_tokens
    assert found is not None
    assert found.tokenizer == DIGEST
