"""The plan counts images as tokens of the decoder, for data that do not exist here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.media_spec import AudioSpec, MediaSpec, Placement
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.plan.load import ExampleDocument, example_documents, stage_load
from mmscale.run.config import RunConfig

EMU3 = {"start": "s", "size": "{height}*{width}", "content": "c", "row_end": "r", "frame_end": "f", "end": "e"}
REPO = Path(__file__).resolve().parents[2]
TOWER = MediaSpec(Placement.EMBEDDING, patch_size=16, fixed_grid=(2, 2))


def data(template: dict[str, Any], max_tokens: int = 5120, **tokens: Any) -> DataConfig:
    dataset = {"name": "x", "manifest": "none", "template": template}
    block = {"codebook_size": 50, "first_id": 300, **tokens}
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "tokenizers", "path": "none"},
            "datasets": [dataset],
            "image_tokens": block,
            "packing": {"max_tokens": max_tokens},
            "lanes": 1,
        }
    )


@pytest.mark.parametrize(
    ("tokens", "spec", "codes", "marks"),
    [
        ({"grid": [24, 24], "start": "s", "end": "e"}, TOWER, 24 * 24, 2),  # Janus
        (EMU3, MediaSpec(), 64 * 48, 2 + 5 + 64 + 2),  # Emu3: 512 x 384 pixels, 8 a code
        ({"encoded": "in_step"}, MediaSpec(code_size=16), 32 * 24, 0),
    ],
)
def test_an_assumed_document_has_the_tokens_of_its_image(tokens: Any, spec: MediaSpec, codes: int, marks: int) -> None:
    example = ExampleDocument(tokens=100, height=512, width=384)
    (document,) = example_documents(data({"kind": "drawing"}, **tokens), spec, example)
    assert document.drawn is not None
    assert (int(document.drawn.sum()), document.num_tokens) == (codes, codes + marks + 100)
    learned = document.labels[document.loss_weights > 0]
    assert int((learned >= 300).sum()) == codes
    (read,) = example_documents(data({"kind": "caption"}, **tokens), spec, example)
    if spec is TOWER:
        assert read.drawn is None
    else:
        assert int((read.labels[read.loss_weights > 0] >= 300).sum()) == 0
        assert read.num_tokens == document.num_tokens


def test_the_note_of_a_grid_names_its_codes(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "data.image_tokens.grid=[8, 4]"]
    run = load(REPO / "configs/recipes/emoji-draw.yaml", words, RunConfig).value
    assert "(image of 4x8 codes)" in stage_load(run, 0, ExampleDocument(None, 480, 640)).source


def test_an_image_that_no_pack_holds_is_reduced_with_its_aspect() -> None:
    for most in (64, 700, 5000):
        (document,) = example_documents(data({"kind": "drawing"}, most, **EMU3), MediaSpec(), ExampleDocument())
        assert 0.6 * most < document.num_tokens < most
        assert document.drawn is not None
        assert document.drawn.any()


def test_a_grid_that_no_pack_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"64 tokens, and a document has at most 63; increase data\.packing\.max_tok"):
        example_documents(data({"kind": "drawing"}, 64, grid=[8, 8]), MediaSpec(), ExampleDocument())


def hearing(max_tokens: int) -> DataConfig:
    heard = {"name": "x", "manifest": "none", "template": {"kind": "interleaved"}, "audio": {}}
    values = data({"kind": "text"}, max_tokens).model_dump()
    return DataConfig.model_validate({**values, "datasets": [heard], "image_tokens": None})


@pytest.mark.parametrize("most", [20, 100, 4000])
def test_a_clip_that_no_pack_holds_is_shortened(most: int) -> None:
    """Ten seconds are 1000 frames, which become 250 tokens."""
    spec = MediaSpec(audio=AudioSpec(padded=False, reductions=((4, 4, 0),)))
    (document,) = example_documents(hearing(most), spec, ExampleDocument())
    assert document.num_tokens < most
    assert document.items[0].grid[0] == min(1000, 4 * (most - 2))


def test_a_clip_of_fixed_length_that_no_pack_holds_is_refused() -> None:
    spec = MediaSpec(audio=AudioSpec(reductions=((2, 2, 0),)))
    with pytest.raises(ConfigError, match=r"data\.audio: the smallest clip of sound has 1500 tokens, .* room for 99"):
        example_documents(hearing(1600), spec, ExampleDocument())


def looking(max_tokens: int, **transforms: Any) -> DataConfig:
    seen = {"name": "x", "manifest": "none", "template": {"kind": "caption"}, "transforms": transforms}
    values = data({"kind": "text"}, max_tokens).model_dump()
    return DataConfig.model_validate({**values, "datasets": [seen], "image_tokens": None})


def test_an_image_for_a_tower_fits_its_pack() -> None:
    """Native patches of 28 pixels, merged: 1024 x 768 has 37 x 27 features, 999 of them in one image."""
    spec, native = MediaSpec(Placement.EMBEDDING, patch_size=14, merge=2), {"kind": "native", "max_pixels": 1 << 22}
    for most, pixels in ((2048, 1024), (900, 896), (64, 256)):
        (document,) = example_documents(looking(most, **native), spec, ExampleDocument())
        assert document.num_tokens <= most
        assert document.items[0].grid[2] == 2 * round(pixels / 28)
    with pytest.raises(
        ConfigError, match=r"data set x, image of 2000x1000: \d+ tokens and .*; a pack holds 900 tokens"
    ):
        example_documents(looking(900, **native), spec, ExampleDocument(None, 1000, 2000))
    fixed = {"kind": "fixed", "size": 224}
    with pytest.raises(ConfigError, match=r"image of 1024x768: 65 tokens and .*; a pack holds 64 tokens"):
        example_documents(looking(64, **fixed), spec, ExampleDocument())
    with pytest.raises(ConfigError, match="an image has 12288 tokens, and a document has at most 5119; increase"):
        example_documents(data({"kind": "drawing"}), MediaSpec(), ExampleDocument(None, 768, 1024))


def test_tiles_by_aspect_end_with_a_square_image() -> None:
    """InternVL's rule cuts 4:3 into 12 tiles at any size: with the overview 13 x 4 tokens. 3 x 3 tiles have 10 x 4."""
    spec = MediaSpec(Placement.EMBEDDING, patch_size=16, fixed_grid=(2, 2))
    for most, tiles in ((64, 13), (50, 10)):
        (document,) = example_documents(looking(most, kind="tiles"), spec, ExampleDocument())
        assert (len(document.items), document.num_tokens) == (tiles, min(most, 4 * tiles + 256))
