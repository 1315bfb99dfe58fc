"""Imported Emu3 gives the logits, loss and gradients of transformers, and an export restores the folder bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.config import DatasetConfig
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import Provenance, Sample, TextPart, VideoPart
from data_pipeline.shards.token_grid import GridTimes, encode_grid
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of
from mmscale.objectives.next_token import NextToken
from tests.hf.pages import load, save_tokenizer
from tests.hf.reference_models import assert_restored, import_reference, their_gradients, trained_parameters
from tests.models.packs import Doc, pack
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 8e-6
CODES, FIRST, ROW_END, IMAGE = 64, 100, 99, 98
SIDE = 32


def reference_model(seed: int = 0, **text: Any) -> Any:
    """Return a tiny random model whose ids 100 to 163 are the codes of its image tokenizer."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    names = {f"<|visual token {code:06d}|>": FIRST + code for code in range(CODES)}
    config = Emu3Config(
        text_config={
            "vocab_size": 170,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **text,
        },
        vq_config={
            "codebook_size": CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 2],
            "num_res_blocks": 1,
            "hidden_size": 64,
        },
        vocabulary_map={**names, "<|extra_200|>": ROW_END, "<image>": IMAGE},
    )
    model = Emu3ForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def drawing(theirs: Any, seed: int) -> tuple[list[int], Tensor]:
    """Return the tokens of an image of 4 x 4 codes with row ends, and its pixels, from the model's own tokenizer."""
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ids = theirs.model.get_image_tokens(pixels, torch.tensor([[SIDE, SIDE]]))
    return ids.tolist(), pixels


def test_the_same_logits_loss_and_gradients(tmp_path: Path, parity: Recorder) -> None:
    """An image is the same tokens whether it was encoded before or their model encodes its pixels."""
    theirs = reference_model()
    ours = import_reference(theirs, tmp_path)
    assert ours.config.decoder.image_ids == range(FIRST, FIRST + CODES)
    block = ours.config.decoder
    assert block.dropout == block.attention_dropout == theirs.config.text_config.attention_dropout == 0.1
    ours.eval()
    docs, logits = [], []
    for seed, (before, after) in enumerate([([1, 5], [7, 8, 9]), ([1, 20, 30, 40], [2])]):
        image, pixels = drawing(theirs, seed)
        docs.append(Doc([*before, *image, *after], spans=[(0, [])]))
        ids = torch.tensor([[*before, *[IMAGE] * len(image), *after]])
        logits.append(theirs(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[SIDE, SIDE]])).logits[0])
    batch = pack(docs, MediaSpec())
    hidden = ours(batch).hidden
    parity("emu3", "logits", distance(ours.head(hidden), torch.cat(logits)), BOUND)
    weights = torch.where((batch.labels >= FIRST) & (batch.labels < FIRST + CODES), 0.5, 1.0) * batch.loss_weights
    loss = ours.head(hidden, labels=batch.labels, loss_weights=weights)
    reference = (F.cross_entropy(torch.cat(logits), batch.labels, reduction="none", ignore_index=-100) * weights).sum()
    parity("emu3", "loss", distance(loss, reference), BOUND)
    loss.backward()
    reference.backward()
    gradients = their_gradients(theirs, tmp_path)
    for name, parameter in trained_parameters(ours):
        parity("emu3", "gradients", distance(parameter.grad, gradients.pop(name)), GRADIENT_BOUND)
    assert all(name.startswith("image_tokenizer.") for name in gradients)


@pytest.mark.parametrize("draws", [False, True], ids=["read", "drawn"])
def test_the_loss_of_videos_as_tokens(tmp_path: Path, parity: Recorder, draws: bool) -> None:
    """Over the text after a video, or over its codes: by transformers' model on ids and weights written by hand."""
    theirs = reference_model()
    ours = import_reference(theirs, tmp_path)
    marks = ["<sov>", "<sot>", "<eol>", "<eof>", "<eov>"]
    text = load(save_tokenizer(tmp_path / "tokenizer.json", ["<image>", *marks]), "<image>")
    sov, sot, eol, eof, eov = (text.special_id(name, "") for name in marks)
    tokens = dict(zip(("start", "content", "row_end", "frame_end", "end"), marks, strict=True))
    tokens |= {"video_size": "{frames}", "codebook_size": CODES, "first_id": FIRST}
    template = {"kind": "drawing", "text_weight": 0, "image_weight": 0.5} if draws else {"kind": "caption"}
    block = {"name": "x", "manifest": "x", "template": template, "image_tokens": tokens}
    build = DocumentBuilder(DatasetConfig.model_validate(block), text, MediaSpec())
    documents, reference, total = [], torch.zeros(()), 0.0
    for number, frames in enumerate((1, 3)):
        codes = np.random.default_rng(number).integers(0, CODES, (frames, 2, 3))
        grid = encode_grid(codes, CODES, "ab" * 32, GridTimes(1, 4))
        parts = (VideoPart(b"", "mp4", grid=grid), TextPart('"!#'))
        documents.append(build(Sample(parts, {"caption": '"!#'}, Provenance("x", "shard", "key", number))))
        rows = [[*(FIRST + row), eol] for plane in codes for row in plane]
        planes = [token for plane in range(frames) for token in [*rows[2 * plane], *rows[2 * plane + 1], eof]]
        video = [sov, *text.encode(str(frames)), sot, *planes, eov]
        words = text.encode('"!#')
        ids = [1, *words, *video, 2] if draws else [1, *video, *words, 2]
        is_code = [FIRST <= token < FIRST + CODES for token in ids]
        weights = [0.5 * code for code in is_code] if draws else [0.0] * (1 + len(video)) + [1.0] * (len(words) + 1)
        logits = theirs(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        reference = reference + (losses * torch.tensor(weights[1:])).sum()
        total += sum(weights)
    batch = collate([Pack(tuple(documents), 0)], MediaSpec())
    assert NextToken().weight(batch) == total
    parity("emu3", "loss of videos as tokens", distance(NextToken()(ours.eval(), batch).loss_sum, reference), BOUND)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"<|visual token 000003|>": 7}, "must have consecutive ids"),
        ({"<|visual token 000000|>": "x"}, "must have consecutive ids"),
        ({f"<|visual token {code:06d}|>": 150 + code for code in range(CODES)}, "first_id=150"),
    ],
)
def test_other_ids_of_codes_are_rejected(change: dict[str, Any], message: str) -> None:
    values = json.loads(reference_model().config.to_json_string(use_diff=False))
    values["vocabulary_map"] |= change
    with pytest.raises(CheckpointError, match=re.escape(message)):
        layout_of("emu3").model_config(values, "config.json")


def test_export_restores_the_folder(tmp_path: Path) -> None:
    assert_restored(reference_model(), tmp_path)
