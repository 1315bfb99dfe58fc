"""The benchmark of image tokens: a tiny run compares both sides, and refuses sides that compute something else."""

from __future__ import annotations

import pytest
import torch

from benchmarks import image_tokens
from benchmarks.families import drawing

TINY = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drawing.TOKENIZERS, "JanusVQVAE", {**TINY, "num_embeddings": 50})
    monkeypatch.setitem(drawing.TOKENIZERS, "Emu3VQVAE", {**TINY, "codebook_size": 50, "hidden_size": 32})
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    for key, value in {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2}.items():
        monkeypatch.setitem(drawing.DECODER, key, value)
    for family in drawing.CODES:
        monkeypatch.setitem(drawing.CODES, family, 64)


@pytest.mark.parametrize("name", drawing.TOKENIZERS)
def test_tokenizers(name: str, tiny: None) -> None:
    pair = drawing.tokenizer_pair(name, 16)
    encode, decode = image_tokens.measure_tokenizer(pair, images=2, side=16, turns=2)
    assert (encode.unit, encode.count) == ("images", 2)
    assert [case.unit for case in decode.cases()] == ["images/s", "images/core-s"]
    assert all(case.ours > 0 and case.peers["transformers"] > 0 for case in (*encode.cases(), *decode.cases()))
    assert len(pair.ours.encode(image_tokens.pictures(2, 16)).unique()) > 3
    with torch.no_grad():
        pair.ours.decoder.conv_out.bias += 0.5
    with pytest.raises(RuntimeError, match="images of the same tokens differ"):
        pair.check(image_tokens.pictures(2, 16))


@pytest.mark.parametrize("family", drawing.DRAWERS)
def test_drawing(family: str, tiny: None) -> None:
    drawer = drawing.DRAWERS[family](2, 3)
    row = image_tokens.measure_drawing(drawer, turns=1)
    assert row.count == 2 * drawer.num_steps == 2 * {"janus": 9, "emu3": 11}[family]
    with torch.no_grad():
        drawer.ours.decoder.norm.weight.mul_(-1)
    with pytest.raises(RuntimeError, match="transformers"):
        drawer.check()


def test_files(tiny: None) -> None:
    row = image_tokens.measure_files(drawing.tokenizer_pair("JanusVQVAE", 16), 3, 16, jobs=1, turns=1)
    assert row.case == "JanusVQVAE, 3 JPEG files of 16 px, jobs: 1"
