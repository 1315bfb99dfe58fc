"""Perplexity equals transformers' loss on the same ids, and whole forward passes of single documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import DataPipelineError
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.evaluate import evaluate
from mmscale.evaluate.heldout import draw_samples
from mmscale.models.build import media_spec
from mmscale.models.multimodal import MultimodalModel
from tests.evaluate.emoji_models import ALONE, EMOJI, tiny_model
from tests.evaluate.texts import evaluation, score, text_data, text_model, write_set
from tests.hf.test_decoders import imported
from tests.models.reference_models import randomise

PAGES = {"kind": "perplexity", "manifest": EMOJI / "shards" / "train-text.manifest", "template": {"kind": "text"}}
WEIGHTED = [
    {"parts": [{"text": "a rose "}, {"text": "is a rose", "weight": 0.25}, {"text": " is a flower", "weight": 0}]},
    {"parts": [{"text": "grapes and peas", "weight": 2}]},
    {"caption": "π and é"},
]
TALKS = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "yes, a rose"}]},
    {"messages": [{"role": "user", "content": "b?"}, {"role": "assistant", "content": "no", "weight": 0.5}]},
]


@pytest.mark.parity
def test_the_loss_is_that_of_transformers_on_the_same_ids(tmp_path: Path) -> None:
    """Measured difference: 2.5e-8 of the loss; the bound allows for another order of float32 sums."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    held = evaluation({**PAGES, "limit": 5, "max_tokens": 4096, "seed": 2})
    result = evaluate(ours.eval(), held, text_data(), media_spec(ours.config), ALONE)["held"]

    tokenizer = load_tokenizer(text_data().tokenizer)
    texts = [sample.fields["caption"] for sample in read_samples(PAGES["manifest"])]  # type: ignore[arg-type]
    sums = []
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            loss = float(theirs(input_ids=ids, labels=ids).loss)
        sums.append((loss * (ids.shape[1] - 1), ids.shape[1] - 1, len(text.encode())))
    losses, tokens, num_bytes = (
        sum(sums[i][column] for i in draw_samples(held.sets[0], len(texts))) for column in range(3)
    )
    print(f"loss differs by {abs(result.loss / (losses / tokens) - 1):.1e} of it")
    assert result.n == 5
    assert (result.tokens, result.bytes) == (tokens, num_bytes)
    assert result.loss == pytest.approx(losses / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(losses / math.log(2) / num_bytes, rel=1e-6)


def _alone(
    model: MultimodalModel, samples: list[Sample], template: dict[str, Any]
) -> list[tuple[float, float, float, int]]:
    """Return, for each document, weighted and unweighted negative log-likelihood, weight, and learned tokens."""
    tokenizer, spec = load_tokenizer(text_data().tokenizer), media_spec(model.config)
    dataset = {"name": "x", "manifest": "x", "template": template, "transforms": {"kind": "fixed", "size": 16}}
    builder = DocumentBuilder(DatasetConfig.model_validate(dataset), tokenizer, spec)
    found = []
    for sample in samples:
        batch = collate([Pack((builder(sample), dummy_document(spec, tokenizer.pad_id)), lane=0)], spec)
        with torch.no_grad():
            table = model.head(model(batch).hidden).double().log_softmax(-1)
        rows = [row for row, label in enumerate(batch.labels.tolist()) if label >= 0]
        losses = [-float(table[row, batch.labels[row]]) for row in rows]
        weights = [float(batch.loss_weights[row]) for row in rows]
        weighted = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
        found.append((weighted, sum(losses), sum(weights), len(rows)))
    return found


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        (WEIGHTED, {"kind": "interleaved"}),
        (WEIGHTED, {"kind": "text", "loss_weight": "sqrt"}),
        (TALKS, {"kind": "dialogue"}),
        (None, {"kind": "caption", "prompts": ["name: "], "answers": ["{name}"]}),
        (None, {"kind": "annotations", "field": "captions", "each": {"kind": "caption", "prompts": ["say: "]}}),
    ],
    ids=["pages", "texts", "dialogues", "images", "branches"],
)
def test_weights_count_and_documents_do_not_know_each_other(
    rows: list[dict[str, Any]] | None, template: dict[str, Any], tmp_path: Path
) -> None:
    if rows is None:
        model, manifest = tiny_model(), EMOJI / "shards" / "heldout-both.manifest"
    else:
        model, manifest = text_model(), write_set(tmp_path / "set", rows)
    held = {
        "kind": "perplexity",
        "manifest": manifest,
        "template": template,
        "transforms": {"kind": "fixed", "size": 16},
    }
    config = evaluation({**held, "limit": 9}, tokens_per_forward=200 if rows is None else 40)
    samples = list(read_samples(manifest))
    found = _alone(model, [samples[i] for i in draw_samples(config.sets[0], len(samples))], template)
    result = evaluate(model, config, text_data(), media_spec(model.config), ALONE)["held"]
    weighted, plain, weights, tokens = (sum(column) for column in zip(*found, strict=True))
    assert (result.n, result.tokens) == (len(found), tokens)
    assert result.loss == pytest.approx(weighted / weights, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(plain / math.log(2) / result.bytes, rel=1e-5)
    spread = sum((loss - result.loss * weight) ** 2 for loss, _, weight, _ in found) * len(found) / (len(found) - 1)
    assert result.error == pytest.approx(math.sqrt(spread) / weights, rel=1e-3)


def test_only_learned_text_has_bytes(tmp_path: Path) -> None:
    result = score(
        ALONE, {"kind": "perplexity", "manifest": write_set(tmp_path, WEIGHTED), "template": {"kind": "text"}}
    )
    assert result["bytes"] == len("a rose is a rosegrapes and peasπ and é".encode())
    talks = {"kind": "perplexity", "manifest": write_set(tmp_path / "talks", TALKS), "template": {"kind": "dialogue"}}
    assert score(ALONE, talks)["bytes"] == len("yes, a roseno")


def test_long_documents_are_cut_and_no_token_is_lost() -> None:
    whole = score(ALONE, {**PAGES, "limit": 4, "max_tokens": 4096})
    cut = score(ALONE, {**PAGES, "limit": 4})
    assert {key: cut[key] for key in ("n", "tokens", "bytes")} == {key: whole[key] for key in ("n", "tokens", "bytes")}
    assert cut["loss"] != pytest.approx(whole["loss"], rel=1e-3)  # Most tokens have less context.


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    images = {**PAGES, "manifest": EMOJI / "shards" / "heldout-both.manifest"}
    with pytest.raises(DataPipelineError, match=r"evaluation set held: .*template.kind=text would drop them"):
        score(ALONE, images)
    with pytest.raises(DataPipelineError, match="but the model has no image tower"):
        score(ALONE, {**images, "template": {"kind": "caption"}})
    rows = [{"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}]
    manifest = write_set(tmp_path, rows)
    config = json.loads(json.dumps({"kind": "perplexity", "manifest": str(manifest), "template": {"kind": "dialogue"}}))
    assert (
        score(ALONE, {**config, "max_tokens": 8})["tokens"] == 2
    )  # The document is cut, and one part has all learned tokens.
