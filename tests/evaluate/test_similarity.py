"""Scores of contrastive models equal those of single pairs: the nearest candidate wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Sample
from data_pipeline.text.templates import CaptionTemplate
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate import EvaluationConfig, check_sets, evaluate, unanswerable_sets
from mmscale.evaluate.answers import caption_images, respond
from mmscale.evaluate.heldout import EvaluationContext, ImageQuestions
from mmscale.evaluate.questions import make_blocks
from mmscale.evaluate.similarity import similarities
from mmscale.models.build import media_spec
from tests.evaluate.emoji_models import ALONE, EMOJI, data_config, evaluation, held_out, tiny_model

DATA = data_config()


def one_by_one(model: Any, sample: Sample, answer: str, prompt: str = "name:") -> float:
    """Return the cosine of a pair that is alone in its batch, built with the training template."""
    tokenizer, spec = load_tokenizer(DATA.tokenizer), media_spec(model.config)
    template = CaptionTemplate(prompts=(prompt,), answers=(f" {answer}",))
    transforms = DATA.datasets[0].transforms.model_copy(update={"augment": None})
    dataset = DATA.datasets[0].model_copy(update={"template": template, "transforms": transforms})
    document = DocumentBuilder(dataset, tokenizer, spec)(replace(sample, fields={}))
    with torch.no_grad():
        vectors = model(collate([Pack((document, dummy_document(spec, tokenizer.pad_id)), lane=0)], spec))
    return float((vectors.images * vectors.texts).sum())


def test_scores_are_of_the_nearest_candidates() -> None:
    model, config = tiny_model("contrastive"), evaluation(limit=9)
    spec, questions = media_spec(model.config), ImageQuestions.read(config.image_sets[0])
    blocks = make_blocks(questions.answers, questions.pool, 4, 0)
    asks = [(sample, value) for block in blocks for sample in block.samples for value in block.candidates]
    expected = [one_by_one(model, questions.samples[sample], value) for sample, value in asks]
    context = EvaluationContext(model, config, DATA, load_tokenizer(DATA.tokenizer), spec, ALONE)
    found = similarities(context, config.image_sets[0], questions.samples, asks)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.ptp(found) > 1e-2
    right, start = 0, 0
    for block in blocks:
        table = np.array(expected[start : start + 4 * len(block.samples)]).reshape(-1, 4)
        right += sum(int(row.argmax()) == answer for row, answer in zip(table, block.right, strict=True))
        start += table.size
    result = evaluate(model, config, DATA, spec, ALONE)["both"]
    assert result.score == pytest.approx(right / 9)
    assert result.loss is None


def test_what_such_a_model_cannot_be_asked() -> None:
    model = tiny_model("contrastive")
    spec = media_spec(model.config)
    texts = EMOJI / "shards/train-text.manifest"
    read = {"name": "read", "kind": "perplexity", "manifest": texts, "template": {"kind": "text"}}
    config = EvaluationConfig.model_validate({"sets": [held_out(limit=4), read]})
    check_sets(config, DATA, spec)
    assert [held.name for held in unanswerable_sets(config, spec, DATA)] == ["read"]
    assert list(evaluate(model, config, DATA, spec, ALONE)) == ["both"]
    assert caption_images(model, config, DATA, spec, ALONE) == []
    for name, value in (("ends", False), ("normalise", "tokens")):
        with pytest.raises(ConfigError, match=f"set both: {name}=.*compares whole texts with images"):
            check_sets(evaluation(**{name: value}), DATA, spec)
    with pytest.raises(ConfigError, match="compares images with texts"):
        respond(model, DATA, spec, prompt="x")
