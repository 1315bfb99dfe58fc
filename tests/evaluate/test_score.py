from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataPipelineError
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.text.templates import CaptionTemplate
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate import EvaluationConfig, evaluate
from mmscale.evaluate.heldout import EvaluationContext, ImageQuestions, PromptBuilder, candidate_ids
from mmscale.evaluate.pairs import Pair, PairScorer
from mmscale.evaluate.questions import make_blocks
from mmscale.models.build import media_spec
from mmscale.models.multimodal import MultimodalModel
from tests.engine.ranks import run_ranks
from tests.evaluate.emoji_models import ALONE, data_config, evaluation, tiny_model

TRANSFORMS: dict[str, dict[str, Any]] = {
    "embedding": {"kind": "native", "min_pixels": 64, "max_pixels": 576},
    "cross_attention": {"kind": "fixed", "size": 16},
    "hybrid": {"kind": "tiles", "size": 16, "tiling": {"kind": "internvl", "max_tiles": 2}},
}


def _brute_force(model: MultimodalModel, data: DataConfig, sample: Sample, answer: str, *, ends: bool) -> float:
    """Return log P(answer | image) from the training document of that answer alone, with full logits."""
    tokenizer, spec = load_tokenizer(data.tokenizer), media_spec(model.config)
    template = CaptionTemplate(prompts=("name:",), answers=(answer,))
    transforms = data.datasets[0].transforms.model_copy(update={"augment": None})
    dataset = data.datasets[0].model_copy(update={"template": template, "transforms": transforms})
    document = DocumentBuilder(dataset, tokenizer, spec)(sample)
    batch = collate([Pack((document, dummy_document(spec, tokenizer.pad_id)), lane=0)], spec)
    with torch.no_grad():
        table = model.head(model(batch).hidden).double().log_softmax(-1)
    rows = [row for row, label in enumerate(batch.labels.tolist()) if label >= 0]
    if not ends:
        assert batch.labels[rows.pop()] == tokenizer.eos_id
    return sum(float(table[row, batch.labels[row]]) for row in rows)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("kind", ["embedding", "cross_attention", "hybrid"])
def test_likelihoods_equal_one_document_at_a_time(kind: str, ends: bool) -> None:
    model, data = tiny_model(kind), data_config(TRANSFORMS[kind])
    config = evaluation(limit=5, ends=ends)
    spec = media_spec(model.config)
    tokenizer = load_tokenizer(data.tokenizer)
    questions = ImageQuestions.read(config.image_sets[0])
    values = questions.answers[:3]
    pairs = [Pair(sample, candidate_ids(questions.config, value, tokenizer)) for sample in range(5) for value in values]
    prompts = PromptBuilder.of_images(config.image_sets[0], data, tokenizer, spec)
    context = EvaluationContext(model, config, data, tokenizer, spec, ALONE)
    found = PairScorer(context, questions.config, questions.samples, prompts).run(pairs).likelihoods
    expected = [
        _brute_force(model, data, questions.samples[sample], f" {value}", ends=ends)
        for sample in range(5)
        for value in values
    ]
    assert found.tolist() == pytest.approx(expected, rel=2e-5)
    by_image = found.reshape(5, 3)
    assert (np.ptp(by_image, axis=0) > 1e-2).all()  # The image matters, so a wrong image would fail.


def _shares(tables: list[np.ndarray], config: EvaluationConfig) -> tuple[float, float]:
    """Return score and control by their definitions from each block's table of values."""
    questions = ImageQuestions.read(config.image_sets[0])
    blocks = make_blocks(questions.answers, questions.pool, 4, 0)
    right = control = 0
    for table, block in zip(tables, blocks, strict=True):
        for row in range(len(block.samples)):
            right += int(table[row].argmax()) == block.right[row]
            control += int(table[block.control_sample[row]].argmax()) == block.right[row]
    n = len(questions.samples)
    return right / n, control / n


@functools.cache
def _brute_force_tables() -> list[list[list[float]]]:
    """Return the likelihoods of ``evaluation(limit=24)`` by block, sample and candidate."""
    model, data = tiny_model(), data_config()
    questions = ImageQuestions.read(evaluation(limit=24).image_sets[0])
    return [
        [
            [_brute_force(model, data, questions.samples[s], f" {value}", ends=True) for value in block.candidates]
            for s in block.samples
        ]
        for block in make_blocks(questions.answers, questions.pool, 4, 0)
    ]


@pytest.mark.parametrize("normalise", ["none", "tokens", "prior"])
@pytest.mark.long
def test_score_and_control_follow_their_definitions(normalise: str) -> None:
    model, data = tiny_model(), data_config()
    config = evaluation(limit=24, normalise=normalise)
    result = evaluate(model, config, data, media_spec(model.config), ALONE)["both"]
    questions = ImageQuestions.read(config.image_sets[0])
    tokenizer = load_tokenizer(data.tokenizer)
    blocks, raw = make_blocks(questions.answers, questions.pool, 4, 0), _brute_force_tables()
    by_candidate: dict[str, list[tuple[int, float]]] = {}
    for block, table in zip(blocks, raw, strict=True):
        for sample, row in zip(block.samples, table, strict=True):
            for value, likelihood in zip(block.candidates, row, strict=True):
                by_candidate.setdefault(value, []).append((sample, likelihood))

    def compared(sample: int, value: str, likelihood: float) -> float:
        if normalise == "tokens":
            return likelihood / (len(tokenizer.encode(f" {value}")) + 1)
        if normalise == "prior":
            return likelihood - float(np.mean([other for image, other in by_candidate[value] if image != sample]))
        return likelihood

    tables = [
        np.array(
            [
                [compared(sample, value, x) for value, x in zip(block.candidates, row, strict=True)]
                for sample, row in zip(block.samples, table, strict=True)
            ]
        )
        for block, table in zip(blocks, raw, strict=True)
    ]
    assert (result.score, result.control) == _shares(tables, config)
    assert (result.chance, result.n, result.metric) == (0.25, 24, "name among 4")
    assert result.error == pytest.approx((result.score * (1 - result.score) / 24) ** 0.5)
    right = [
        (row[answer], len(tokenizer.encode(f" {block.candidates[answer]}")) + 1)
        for block, table in zip(blocks, raw, strict=True)
        for row, answer in zip(table, block.right, strict=True)
    ]
    assert result.loss == pytest.approx(-sum(x for x, _ in right) / sum(tokens for _, tokens in right), rel=1e-5)


def test_a_model_that_ignores_the_image_scores_as_its_control() -> None:
    model = tiny_model()
    for block in model.connector.modules():  # type: ignore[union-attr]
        for name, parameter in block.named_parameters(recurse=False):
            if "gate" in name:
                torch.nn.init.zeros_(parameter)
    result = evaluate(model, evaluation(limit=40), data_config(), media_spec(model.config), ALONE)["both"]
    # The same answer wins for every image: one of the four samples of a block is right by chance.
    assert result.score == result.control == pytest.approx(0.25)


def test_equal_likelihoods_count_as_a_blind_pick() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.head.weight)
    config = evaluation(field="group", template=" {value}", normalise="tokens", choices=4, limit=30)
    result = evaluate(model, config, data_config(), media_spec(model.config), ALONE)["both"]
    assert (result.score, result.control) == pytest.approx((0.25, 0.25))


@pytest.mark.dist
def test_two_ranks_give_the_score_of_one() -> None:
    arguments = {"limit": 11, "choices": 3}
    (alone,) = run_ranks("tests.evaluate.emoji_models:score", 1, arguments)
    for result in run_ranks("tests.evaluate.emoji_models:score", 2, arguments):
        assert result == alone


def test_a_damaged_image_is_named() -> None:
    model, data = tiny_model(), data_config()
    config = evaluation(limit=4)
    questions = ImageQuestions.read(config.image_sets[0])
    broken = Sample((ImagePart(b"no image", "png"),), {}, questions.samples[1].provenance)
    questions.samples[1] = broken
    spec, tokenizer = media_spec(model.config), load_tokenizer(data.tokenizer)
    prompts = PromptBuilder.of_images(config.image_sets[0], data, tokenizer, spec)
    context = EvaluationContext(model, config, data, tokenizer, spec, ALONE)
    runner = PairScorer(context, questions.config, questions.samples, prompts)
    with pytest.raises(DataPipelineError, match=f"set both: .*{broken.provenance.key}"):
        runner.run([Pair(sample, (5,)) for sample in range(4)])


def test_a_missing_field_and_an_empty_answer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"field 'nome' of .* is None, expected a text; the sample has the fields"):
        ImageQuestions.read(evaluation(field="nome").image_sets[0])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"template": "name"}, "with {value} in it"),
        ({"template": "{value} {group}"}, "no other field"),
        ({"choices": 1}, "greater than or equal to 2"),
        ({"normalise": "length"}, "'none', 'tokens' or 'prior'"),
    ],
)
def test_wrong_questions_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        evaluation(**block)


def test_sets_need_names_of_their_own_and_captions_known_ones() -> None:
    one = evaluation().sets[0].model_dump()
    with pytest.raises(ValidationError, match="names of sets must differ"):
        EvaluationConfig.model_validate({"sets": [one, one]})
    with pytest.raises(ValidationError, match=r"names \['stile'\]"):
        EvaluationConfig.model_validate({"sets": [one], "captions": {"sets": ["stile"]}})
