"""Multiple choice equals brute force: one document per choice, with its tokens summed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

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
from mmscale.evaluate.choice import normalised_likelihoods
from mmscale.models.build import media_spec
from mmscale.models.multimodal import MultimodalModel
from tests.engine.ranks import run_ranks
from tests.evaluate.emoji_models import ALONE, EMOJI, tiny_model
from tests.evaluate.texts import evaluation, score, text_data, text_model, write_set

WORDS = ("cat", "a red apple", "fire engine", "ネコ", "ぶどうとメロンと桃", "消防車")
PLAIN = {"kind": "choice", "template": " {value}", "prompt": "{question} Answer:"}
CHAT = {"kind": "choice", "dialogue": {"kind": "dialogue"}}


def rows(count: int = 14) -> list[dict[str, Any]]:
    """Return questions with two to five choices."""
    rng = np.random.default_rng(4)
    found = []
    for number in range(count):
        choices = [str(word) for word in rng.permutation(WORDS)[: 2 + number % 4]]
        right = int(rng.integers(len(choices)))
        question = f"Which {'of these ' * (number % 3)}is number {number}?"
        more = {"letter": "abcdefg"[right], "said": choices[right], "at": {"choices": choices}}
        found.append({"question": question, "choices": choices, "answer": right, **more})
    return found


def _document(model: MultimodalModel, sample: Sample, template: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Return the log-likelihood of each learned token of a single document, and the tokens."""
    tokenizer, spec = load_tokenizer(text_data().tokenizer), media_spec(model.config)
    dataset = {"name": "x", "manifest": "x", "template": template, "transforms": {"kind": "fixed", "size": 16}}
    document = DocumentBuilder(DatasetConfig.model_validate(dataset), tokenizer, spec)(sample)
    batch = collate([Pack((document, dummy_document(spec, tokenizer.pad_id)), lane=0)], spec)
    with torch.no_grad():
        table = model.head(model(batch).hidden).double().log_softmax(-1)
    learned = [row for row, label in enumerate(batch.labels.tolist()) if label >= 0]
    return [float(table[row, batch.labels[row]]) for row in learned], batch.labels[learned].tolist()


def _shares(model: MultimodalModel, samples: list[Sample], held: dict[str, Any], *, ends: bool) -> dict[str, float]:
    """Return the accuracy by normalisation, and the loss of the right choices."""
    right: dict[str, list[bool]] = {"none": [], "tokens": [], "characters": [], "bytes": []}
    learned: list[float] = []
    for sample in samples:
        fields, likelihoods = sample.fields, []
        choices = fields["choices"]
        for choice in choices:
            if "dialogue" in held:
                turns = [{"role": "user", "content": fields["question"]}, {"role": "assistant", "content": choice}]
                document = Sample(sample.parts, {"messages": turns}, sample.provenance)
                losses, ids = _document(model, document, held["dialogue"])
            else:
                template = {"kind": "caption", "prompts": [held["prompt"]], "field": "choice"}
                document = Sample(sample.parts, {**fields, "choice": f" {choice}"}, sample.provenance)
                losses, ids = _document(model, document, template)
            assert ids[-1] == 2
            likelihoods.append(losses if ends else losses[:-1])
        learned += likelihoods[fields["answer"]]
        sums = np.array([sum(losses) for losses in likelihoods])
        lengths = {
            "none": np.ones(len(choices)),
            "tokens": np.array([len(losses) for losses in likelihoods]),
            "characters": np.array([len(choice) for choice in choices]),
            "bytes": np.array([len(choice.encode()) for choice in choices]),
        }
        for how, length in lengths.items():
            right[how].append(int((sums / length).argmax()) == fields["answer"])
    return {how: sum(found) / len(samples) for how, found in right.items()} | {"loss": -sum(learned) / len(learned)}


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("held", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.long
def test_shares_are_those_of_one_choice_at_a_time(held: dict[str, Any], ends: bool, tmp_path: Path) -> None:
    model, manifest = text_model(), write_set(tmp_path, rows())
    samples = list(read_samples(manifest))
    expected = _shares(model, samples, held, ends=ends)
    loss = expected.pop("loss")
    assert len(set(expected.values())) > 1  # The normalisations give different results, so a mix-up would fail.
    how = "none" if ends else "characters"
    found = score(ALONE, {**held, "manifest": manifest, "ends": ends, "normalise": how})
    assert found["scores"] == pytest.approx(expected)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    share = expected[how]
    assert found["score"] == pytest.approx(share)
    assert found["chance"] == pytest.approx(sum(1 / (2 + number % 4) for number in range(14)) / 14)
    assert (found["n"], found["metric"]) == (14, "right choice among 2 to 5")
    assert found["error"] == pytest.approx((share * (1 - share) / 14) ** 0.5)


def test_choices_are_compared_by_what_each_way_says() -> None:
    found = normalised_likelihoods(np.array([-6.0, -4.0, -9.0]), np.array([2, 1, 9]), ["ab", "é", "ネコ!"])
    expected = {"none": [-6, -4, -9], "tokens": [-3, -4, -1], "characters": [-3, -4, -3], "bytes": [-3, -2, -9 / 7]}
    assert {how: values.tolist() for how, values in found.items()} == expected


def test_questions_about_images_see_them(tmp_path: Path) -> None:
    model, manifest = tiny_model(), EMOJI / "shards" / "heldout-both.manifest"
    groups = ["animals & nature", "food & drink", "objects", "travel & places"]
    held = {
        "kind": "choice", "manifest": manifest, "prompt": "of {name}:", "template": " {value}", "choices": groups,
        "answer": "group", "answer_as": "text", "transforms": {"kind": "fixed", "size": 16},
    }  # fmt: skip
    with pytest.raises(DataPipelineError, match=r"field 'group' is .*expected the text of exactly one choice"):
        evaluate(model, evaluation(held), text_data(), media_spec(model.config), ALONE)
    every = sorted({sample.fields["group"] for sample in read_samples(manifest)})
    config = evaluation({**held, "choices": every, "limit": 6}, tokens_per_forward=300)
    result = evaluate(model, config, text_data(), media_spec(model.config), ALONE)["held"]
    samples = list(read_samples(manifest))
    order = np.random.default_rng([0, len(samples)]).permutation(len(samples))[:6]
    chosen = [
        Sample(
            samples[i].parts,
            {**samples[i].fields, "choices": every, "answer": every.index(samples[i].fields["group"])},
            samples[i].provenance,
        )
        for i in order
    ]
    expected = _shares(model, chosen, {"prompt": "of {name}:"}, ends=False)
    assert result.loss == pytest.approx(expected.pop("loss"), rel=1e-4)
    assert result.scores == pytest.approx(expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"answer": "letter", "answer_as": "letter"},
        {"answer": "said", "answer_as": "text"},
        {"choices": "at.choices"},
    ],
    ids=str,
)
def test_the_right_choice_may_be_said_in_three_ways(fields: dict[str, Any], tmp_path: Path) -> None:
    held = {**PLAIN, "manifest": write_set(tmp_path, rows())}
    assert score(ALONE, {**held, **fields}) == score(ALONE, held)


def test_equal_likelihoods_count_as_a_blind_pick(tmp_path: Path) -> None:
    model = text_model()
    torch.nn.init.zeros_(model.head.weight)
    same = [{"question": "q", "choices": ["a", "b"], "answer": 0}, {"question": "r", "choices": [*"abcd"], "answer": 1}]
    config = evaluation({**PLAIN, "manifest": write_set(tmp_path, same), "normalise": "tokens"})
    found = evaluate(model, config, text_data(), media_spec(model.config), ALONE)["held"]
    assert found.score == found.chance == pytest.approx(0.375)


@pytest.mark.dist
def test_two_ranks_give_the_values_of_one(tmp_path: Path) -> None:
    """Scores this kind and perplexity in one launch of the ranks."""
    pages = {"kind": "perplexity", "manifest": str(EMOJI / "shards" / "train-text.manifest"), "limit": 5}
    sets = [{**PLAIN, "manifest": str(write_set(tmp_path, rows()))}, {**pages, "template": {"kind": "text"}}]
    alone = [score(ALONE, held) for held in sets]
    for results in run_ranks("tests.evaluate.texts:score_all", 2, {"sets": sets}):
        assert results == alone


@pytest.mark.parametrize(
    ("row", "held", "message"),
    [
        ({"answer": 3}, {}, r"field 'answer' is 3, expected a number from 0 to 1"),
        ({"answer": "a"}, {}, "expected a number"),
        ({"answer": True}, {}, "expected a number"),
        ({"answer": "C"}, {"answer_as": "letter"}, "expected a letter from A to B"),
        ({"answer": ""}, {"answer_as": "letter"}, "expected a letter from A to B"),
        ({"answer": "z"}, {"answer_as": "text"}, "expected the text of exactly one choice"),
        ({"answer": 0, "choices": ["x"]}, {}, "expected a list of at least two texts"),
        ({"answer": 0, "choices": "xy"}, {}, "expected a list of at least two texts"),
        ({"answer": 0, "choices": ["x", " "]}, {}, "expected a list of at least two texts"),
        ({"answer": 0}, {"prompt": "{context}"}, "'context' is missing"),
        ({"answer": 0}, {"answer": "key"}, "'key' is missing"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    row: dict[str, Any], held: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bad = {"question": "q", "choices": ["x", "y"], **row}
    with pytest.raises(DataPipelineError, match=f"evaluation set held: .*000[01]: .*{message}"):
        score(ALONE, {**PLAIN, "manifest": write_set(tmp_path, [rows()[0], bad]), **held})


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"choices": ["a"]}, "at least two different texts"),
        ({"choices": ["a", "a"]}, "at least two different texts"),
        ({"prompt": "{a!r}"}, r"only \{name\} and"),
        ({"template": "value"}, "with {value} in it"),
        ({"normalise": "prior"}, "characters"),
        ({"kind": "chioce"}, "'images', 'perplexity', 'choice'"),
    ],
)
def test_wrong_sets_are_refused(held: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        evaluation({**PLAIN, "manifest": "x", **held})
