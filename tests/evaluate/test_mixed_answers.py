"""Answers of words and drawings, against one forward pass over the whole sequence for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate.answers import Chat
from mmscale.evaluate.drawings import Drawing
from mmscale.evaluate.mixed_answers import respond_with_drawings
from mmscale.models.build import media_spec
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig
from tests.evaluate.drawing_models import (
    CONTENT,
    END,
    FIRST,
    FRAME_END,
    ROW_END,
    START,
    Kind,
    drawing_data,
    drawing_model,
    with_tokens,
)


def tokenizer_of(kind: Kind) -> Tokenizer:
    return load_tokenizer(drawing_data(kind).tokenizer)


@torch.no_grad()
def last_row(net: MultimodalModel, tokens: list[int]) -> torch.Tensor:
    """Return the hidden row of the last token."""
    spec = media_spec(net.config)
    empty = DocumentBuilder(drawing_data("vocabulary").datasets[0], tokenizer_of("vocabulary"), spec)
    document = with_tokens(empty.build_drawing_prompt("x", 1, 1), tokens)
    hidden: torch.Tensor = net(collate([Pack((document,), lane=-1)], spec)).hidden[-1]
    return hidden


@torch.no_grad()
def continued(net: MultimodalModel, tokens: list[int], allowed: slice) -> int:
    """Return the likeliest next token among ``allowed``, by a forward pass over the whole sequence."""
    logits = net.head(last_row(net, tokens)[None])[0]
    return allowed.indices(len(logits))[0] + int(logits[allowed].argmax())


def eager_model(prompt: list[int], before: int) -> tuple[MultimodalModel, list[int]]:
    """Return a model that begins an image after ``before`` tokens of its answer, and these tokens."""
    net, words = drawing_model("vocabulary"), list[int]()
    for _ in range(before):
        words.append(continued(net, prompt + words, slice(None)))
    hidden = last_row(net, prompt + words)
    with torch.no_grad():
        start = tokenizer_of("vocabulary").special_id(START, "")
        net.head.weight[start] = hidden / hidden.square().sum() * (net.head(hidden[None]).max() + 1)
    return net, words


def answer(net: MultimodalModel, kind: Kind, **options: Any) -> list[str | Drawing]:
    data, spec = drawing_data(kind), media_spec(net.config)
    return respond_with_drawings(net, data, data, spec, "a red fox", sampling=SamplingConfig(), **options)


def test_an_answer_may_draw_between_its_words() -> None:
    tokenizer = tokenizer_of("vocabulary")
    assert tokenizer.bos_id is not None
    prompt = [tokenizer.bos_id, *tokenizer.encode("a red fox")]
    net, before = eager_model(prompt, 3)
    assert len({*before}) > 1
    parts = answer(net, "vocabulary", size=(4, 6), max_new_tokens=8)
    start, content, row_end, frame_end, end = (
        tokenizer.special_id(name, "") for name in (START, CONTENT, ROW_END, FRAME_END, END)
    )
    tokens = prompt + before
    assert continued(net, tokens, slice(None)) == start
    tokens += [start, *tokenizer.encode("2*3"), content]
    codes: list[list[int]] = []
    for _ in range(2):
        codes.append([])
        for _ in range(3):
            tokens.append(continued(net, tokens, slice(FIRST["vocabulary"], None)))
            codes[-1].append(tokens[-1] - FIRST["vocabulary"])
        tokens.append(row_end)
    tokens += [frame_end, end]
    after: list[int] = []
    while len(before) + 1 + len(after) < 8:
        token = continued(net, tokens + after, slice(None))
        if token in (tokenizer.eos_id, start):
            break
        after.append(token)
    drawing = parts[1] if before and tokenizer.decode(before).strip() else parts[0]
    assert isinstance(drawing, Drawing)
    assert drawing.codes.tolist() == codes
    assert [part for part in parts if isinstance(part, str)] == [
        words for words in (tokenizer.decode(before).strip(), tokenizer.decode(after).strip()) if words
    ]


def test_mistakes_are_refused() -> None:
    tokenizer = tokenizer_of("vocabulary")
    assert tokenizer.bos_id is not None
    net, _ = eager_model([tokenizer.bos_id, *tokenizer.encode("a red fox")], 1)
    with pytest.raises(ConfigError, match=r"began an image and wrote '.*' as its size, expected .* give --size"):
        answer(net, "vocabulary", max_new_tokens=8)
    with pytest.raises(ConfigError, match="has a head of its own for images"):
        answer(drawing_model("separate"), "separate")
    with pytest.raises(ConfigError, match="guidance 0"):
        answer(net, "vocabulary", guidance=0.5)


def test_an_answer_without_drawings_leaves_codes_out() -> None:
    tokenizer, block = tokenizer_of("vocabulary"), drawing_data("vocabulary").model_dump()
    net = drawing_model("vocabulary")
    with torch.no_grad():
        net.head.weight[: FIRST["vocabulary"]].zero_()  # Some code always has a logit above 0.
    data = DataConfig.model_validate({**block, "template": {"kind": "dialogue"}})
    chat = Chat(net, data, media_spec(net.config), max_new_tokens=5)
    assert chat.ask("a red fox") == ""
    codes = continued(net, [1, *tokenizer.encode("a red fox")], slice(None))
    assert codes >= FIRST["vocabulary"]
