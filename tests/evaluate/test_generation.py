"""Generated answers equal those of one prompt at a time without a cache; their scores equal the metric of these."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.errors import DataPipelineError
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.templates import CaptionTemplate, DialogueTemplate, TemplateConfig
from mmscale.errors import ConfigError
from mmscale.evaluate import answer_metrics, check_sets, evaluate
from mmscale.evaluate.answer_metrics import exact_match
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from tests.engine.ranks import run_ranks
from tests.evaluate.emoji_models import ALONE, EMOJI, continued, tiny_model
from tests.evaluate.texts import evaluation, text_data, text_model, write_set

PLAIN = {"kind": "generation", "prompt": "{question} Answer:", "max_new_tokens": 6}
CHAT = {"kind": "generation", "dialogue": {"kind": "dialogue"}, "max_new_tokens": 6}
TURNS = {"kind": "generation", "prompt": None, "dialogue": {"kind": "dialogue"}, "max_new_tokens": 6}


def rows(count: int = 7) -> list[dict[str, Any]]:
    found = []
    for number in range(count):
        question = f"Which {'of these ' * (number % 3)}is number {number}?"
        turns = [
            {"role": "user", "content": f"Hello {number}"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "never read"},
        ]
        found.append({"question": question, "answer": f"a{number}", "messages": turns})
    return found


def read_answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("held", [PLAIN, CHAT, TURNS], ids=["plain", "chat", "turns"])
def test_answers_are_those_of_one_prompt_at_a_time(held: dict[str, Any], tmp_path: Path) -> None:
    model, data, manifest = text_model(), text_data(), write_set(tmp_path, rows())
    template: TemplateConfig = DialogueTemplate()
    if "dialogue" not in held:
        template = CaptionTemplate(prompts=(held["prompt"],), answers=("x",))
    expected = {}
    for sample in read_samples(manifest):
        asked = sample
        if held is CHAT:
            asked = replace(sample, fields={"messages": sample.fields["messages"][2:3]})
        expected[sample.provenance.key] = continued(model, data, template, asked, 6)
    assert len(set(expected.values())) > 2
    right = dict(list(expected.items())[::2])  # Four of seven answers are right.
    fields = [{**row, "answer": right.get(key, ["no", "never"])} for row, key in zip(rows(), expected, strict=True)]
    config = evaluation({**held, "manifest": write_set(tmp_path / "right", fields)})
    found = evaluate(model, config, data, media_spec(model.config), ALONE, answers_folder=tmp_path / "answers")
    result = asdict(found["held"])
    assert {line["key"]: line["answer"] for line in read_answers(tmp_path / "answers")} == expected
    scores = {key: exact_match(text, [right.get(key, "no")], ("case", "punctuation")) for key, text in expected.items()}
    assert sum(scores.values()) == 4
    assert {line["key"]: line["score"] for line in read_answers(tmp_path / "answers")} == scores
    assert result == {
        "score": pytest.approx(4 / 7), "n": 7, "metric": "exact match", "error": pytest.approx((12 / 49 / 6) ** 0.5),
        "control": None, "chance": None, "kind": "generation", "control_error": None,
    }  # fmt: skip


def test_the_control_permutes_the_answers(tmp_path: Path) -> None:
    model, data = text_model(), text_data()
    held = {**PLAIN, "manifest": write_set(tmp_path, rows()), "metric": "wer", "control": True}
    config = evaluation(held)
    evaluate(model, config, data, media_spec(model.config), ALONE, answers_folder=tmp_path / "answers")
    said = {line["key"]: line["answer"] for line in read_answers(tmp_path / "answers")}
    keys = [sample.provenance.key for sample in read_samples(held["manifest"])]
    fields = [{**row, "answer": said[key]} for row, key in zip(rows(), keys, strict=True)]
    config = evaluation({**held, "manifest": write_set(tmp_path / "right", fields)})
    result = evaluate(model, config, data, media_spec(model.config), ALONE)["held"]
    assert len(set(said.values())) > 2
    assert result.score == 1  # type: ignore[union-attr]
    assert result.control == result.chance < 1  # type: ignore[operator, union-attr]
    assert "answers permuted" in result.summary
    one = {**held, "manifest": write_set(tmp_path / "one", rows(1))}
    with pytest.raises(ConfigError, match="control=true permutes answers, so it needs at least 2"):
        evaluate(model, evaluation(one), data, media_spec(model.config), ALONE)
    with pytest.raises(ConfigError, match="control=true permutes answers, so it needs at least 2"):
        check_sets(evaluation(one), data, media_spec(model.config))


@pytest.mark.parametrize("kind", ["cross_attention", "embedding"])
def test_answers_about_images_see_them(kind: str, tmp_path: Path) -> None:
    model, data = tiny_model(kind), text_data()
    manifest = EMOJI / "shards" / "heldout-both.manifest"
    held = {"kind": "generation", "manifest": manifest, "prompt": "of {name}:", "answers": "group", "limit": 5}
    held |= {"max_new_tokens": 5, "metric": "anls"}
    config = evaluation(held, tokens_per_forward=300)
    evaluate(model, config, data, media_spec(model.config), ALONE, answers_folder=tmp_path)
    samples = {sample.provenance.key: sample for sample in read_samples(manifest)}
    template = CaptionTemplate(prompts=("of {name}:",), answers=("x",))
    lines = read_answers(tmp_path)
    assert len(lines) == 5
    for line in lines:
        sample = samples[line["key"]]
        assert line["answer"] == continued(model, data, template, sample, 5)
        assert line["references"] == [sample.fields["group"]]
        assert line["prompt"] == f"of {sample.fields['name']}:"


def test_a_stop_text_ends_an_answer_and_is_left_out(tmp_path: Path) -> None:
    model, manifest = text_model(), write_set(tmp_path, rows())
    spec = media_spec(model.config)
    evaluate(model, evaluation({**PLAIN, "manifest": manifest}), text_data(), spec, ALONE, answers_folder=tmp_path)
    free = {line["key"]: line["answer"] for line in read_answers(tmp_path)}
    stop = next(iter(free.values()))[2:4]
    held = {**PLAIN, "manifest": manifest, "stop": [stop]}
    evaluate(model, evaluation(held), text_data(), spec, ALONE, answers_folder=tmp_path)
    cut = {line["key"]: line["answer"] for line in read_answers(tmp_path)}
    assert cut == {key: text.partition(stop)[0].strip() for key, text in free.items()} != free


def test_samples_are_drawn_with_different_random_numbers_and_again_with_the_same(tmp_path: Path) -> None:
    same = [{"question": "q", "answer": "a"}] * 4
    held = {**PLAIN, "manifest": write_set(tmp_path, same), "sampling": {"temperature": 2.0}}
    found = []
    for _ in range(2):
        model, config = text_model(), evaluation(held, tokens_per_forward=1)  # One sample per forward pass.
        evaluate(model, config, text_data(), media_spec(model.config), ALONE, answers_folder=tmp_path)
        found.append([line["answer"] for line in read_answers(tmp_path)])
    assert found[0] == found[1]
    assert len(set(found[0])) == 4


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Path]]:
    """The results of sharded models on one and on two ranks, and the folders with their answers."""
    place = tmp_path_factory.mktemp("sharded")
    manifest = str(write_set(place, rows()))
    held = {**PLAIN, "manifest": manifest, "stop": ["e"], "metric": "anls"}
    found = {}
    for ranks in (1, 2):
        folder = place / str(ranks)
        arguments = {"held": held, "answers_folder": str(folder)}
        results = run_ranks("tests.evaluate.texts:score_sharded", ranks, arguments)
        assert results == results[:1] * ranks
        found[ranks] = (results[0], folder)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_shards_on_two_ranks_give_the_answers_of_one_process(sharded: dict[int, tuple[Any, Path]], name: str) -> None:
    """A stop text ends the answers of the ranks after different numbers of tokens."""
    one, two = ((results[name], read_answers(folder / name)) for results, folder in sharded.values())
    assert one == two
    assert len({len(line["answer"]) for line in one[1]}) > 1


@pytest.mark.parametrize(
    ("row", "held", "message"),
    [
        ({"answer": None}, {}, "field 'answer' is missing"),
        ({"answer": []}, {}, "expected a text or a list of texts for metric=exact_match"),
        ({"answer": [" "]}, {}, "expected a text or a list of texts"),
        ({"answer": [True]}, {}, "expected a text or a list of texts"),
        ({"answer": ["a", "b", "c"]}, {"metric": "vqa"}, "expected a list of at least 4 texts for metric=vqa"),
        ({"answer": ["!"]}, {"metric": "cider"}, "expected a text or a list of texts for metric=cider"),
        ({}, {"prompt": "{other}"}, "field 'other' is missing"),
        ({"messages": 3}, {"prompt": None, "dialogue": {"kind": "dialogue"}}, "expected a list of turns"),
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_asked_is_found_before_the_start(
    row: dict[str, Any], held: dict[str, Any], message: str, tmp_path: Path
) -> None:
    manifest = write_set(tmp_path, [*rows(3), {**rows(1)[0], **row}])
    config = evaluation({**PLAIN, "manifest": manifest, **held})
    model = text_model()
    with pytest.raises(DataPipelineError, match=f"evaluation set held: .*{message}"):
        check_sets(config, text_data(), media_spec(model.config))
    with pytest.raises(DataPipelineError, match=f"evaluation set held: .*{message}"):
        evaluate(model, config, text_data(), media_spec(model.config), ALONE)


def test_answers_of_vqa_files_numbers_and_lists_are_references(tmp_path: Path) -> None:
    answers: list[Any] = [3, 2.5, ["a", 4], [{"answer": "yes", "answer_id": 1}, {"answer": "no"}]]
    manifest = write_set(tmp_path, [{"question": "q", "answer": answer} for answer in answers])
    model = text_model()
    config = evaluation({**PLAIN, "manifest": manifest})
    evaluate(model, config, text_data(), media_spec(model.config), ALONE, answers_folder=tmp_path)
    found = sorted(line["references"] for line in read_answers(tmp_path))
    assert found == [["2.5"], ["3"], ["a", "4"], ["yes", "no"]]


def test_a_prompt_and_an_answer_that_exceed_the_positions_are_refused(tmp_path: Path) -> None:
    decoder = tiny_model().config.decoder.model_copy(update={"learned_positions": 24, "rope": None})
    model = build_model(ModelConfig(decoder=decoder), seed=3).eval()
    config = evaluation({**PLAIN, "manifest": write_set(tmp_path, rows()), "max_new_tokens": 20})
    with pytest.raises(DataPipelineError, match="max_new_tokens=20 exceeds the model's 24 positions"):
        check_sets(config, text_data(), media_spec(model.config))
    with pytest.raises(DataPipelineError, match="max_new_tokens=20 exceeds the model's 24 positions"):
        evaluate(model, config, text_data(), media_spec(model.config), ALONE)


def test_a_metric_without_its_package_is_found_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(answer_metrics._PACKAGES, "chrf", "no_such_package")
    config = evaluation({**PLAIN, "manifest": write_set(tmp_path, rows()), "metric": "chrf"})
    with pytest.raises(ConfigError, match=r"evaluation set held: metric=chrf.*mmscale\[eval\]"):
        check_sets(config, text_data(), media_spec(text_model().config))


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = evaluation({**PLAIN, "manifest": write_set(tmp_path, rows())})
    model = text_model()
    with pytest.raises(DataPipelineError, match=r"evaluation set held: .*held\.jsonl: Not a directory"):
        evaluate(
            model, config, text_data(), media_spec(model.config), ALONE, answers_folder=tmp_path / "file" / "answers"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "prompt: null asks with the turns of a dialogue; set dialogue"),
        ({"metric": "anls", "ignore": ["case"]}, "ignore: belongs to metric=exact_match"),
        ({"prompt": "{a!r}"}, "only {name}"),
        ({"stop": [""]}, "at least 1 character"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        evaluation({**PLAIN, "manifest": "x", **changes})
