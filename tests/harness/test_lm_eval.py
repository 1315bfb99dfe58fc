"""Scores of lm-evaluation-harness on local tasks equal our own scores of the same questions."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.media_spec import Placement
from data_pipeline.shards.sample_reader import read_samples
from mmscale.cli.main import main
from mmscale.errors import ConfigError, MMScaleError
from mmscale.run.config import RunConfig
from tests.evaluate.texts import write_set
from tests.harness.runs import CONFIG, TALKS, own_scores, train, write_task
from tests.system.conftest import REPO

pytest.importorskip("lm_eval")
from mmscale.harness import lm_eval_model
from mmscale.harness.lm_eval_model import MMScaleLM
from mmscale.harness.trained_model import generation_settings

pytestmark = pytest.mark.long

QUESTIONS = REPO / "examples/text/shards/questions-heldout.manifest"
PAGES = REPO / "examples/text/shards/pages-heldout.manifest"
MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} Answer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "talks", *TALKS)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def harness_scores(
    run: Path, folder: Path, tasks: str, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert main(["eval", str(run), "--lm-eval", tasks, "--include-path", str(folder), "--json", *more]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "checkpoints/step-" in printed["checkpoint"]
    return dict(printed["lm_eval"])


def questions(count: int = 24) -> list[dict[str, Any]]:
    """Return questions whose choices differ in length and in the first token."""
    rows = [dict(sample.fields) for sample in list(read_samples(QUESTIONS))[:count]]
    for number, row in enumerate(rows):
        row["choices"] = [
            choice + " indeed" * (number % 2) * (place % 3) for place, choice in enumerate(row["choices"])
        ]
    return rows


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_choices_and_generated_answers_score_the_same(
    chat: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = questions()
    asked: dict[str, Any] = {"manifest": write_set(tmp_path / "set", rows), "prompt": "{question} Answer:"}
    asked |= {"dialogue": {"kind": "dialogue", "format": "chatml"}} if chat else {}
    choice = {"name": "choice", "kind": "choice", "template": "{value}" if chat else " {value}", **asked}
    written = {"name": "written", "kind": "generation", "answers": "said", "max_new_tokens": 5, "stop": ["a"], **asked}
    # The references of every second question are the model's own answers, so about half of the answers are right.
    drawn = {**written, "manifest": write_set(tmp_path / "drawn", [{**row, "said": "x"} for row in rows])}
    own_scores(run, [drawn], tmp_path)
    answers = {
        line["key"]: line["answer"] for line in map(json.loads, (tmp_path / "written.jsonl").read_text().splitlines())
    }
    for number, (row, key) in enumerate(zip(rows, sorted(answers), strict=True)):
        row["said"] = (answers[key] or "nothing") if number % 2 else "wrong"
    asked["manifest"] = write_set(tmp_path / "whole", rows)
    ours = own_scores(run, [{**choice, **asked}, {**written, **asked}])
    write_task(tmp_path / "tasks", "our_choice", rows, MULTIPLE_CHOICE)
    generate = {
        "output_type": "generate_until", "doc_to_text": "{{question}} Answer:", "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["a"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [
            {
                "metric": "exact_match", "ignore_case": True, "ignore_punctuation": True,
                "regexes_to_ignore": ["^\\s+|\\s+$"],
            }
        ],
    }  # fmt: skip
    write_task(tmp_path / "tasks", "our_answers", rows, generate)
    more = ["--chat"] if chat else []
    theirs = harness_scores(run, tmp_path / "tasks", "our_choice,our_answers", capsys, *more)
    assert theirs["our_choice"]["acc,none"] == pytest.approx(ours["choice"].scores["none"])
    assert theirs["our_choice"]["acc_norm,none"] == pytest.approx(ours["choice"].scores["characters"])
    assert ours["choice"].scores["none"] != ours["choice"].scores["characters"]
    assert theirs["our_answers"]["exact_match,none"] == pytest.approx(ours["written"].score)
    assert theirs["our_answers"]["exact_match_stderr,none"] == pytest.approx(ours["written"].error)
    assert 0.3 < ours["written"].score < 0.7


def test_perplexity_of_texts_is_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set whose only turn is the text, without an end token, has the bits of lm-eval's rolling likelihood."""
    texts = [sample.fields["caption"][:150].rstrip() for sample in list(read_samples(PAGES))[:6]]
    rows = [{"messages": [{"role": "assistant", "content": text}], "text": text} for text in texts]
    template = {"kind": "dialogue", "roles": {"assistant": {"weight": 1}}, "end": "none"}
    held = {"name": "pages", "kind": "perplexity", "manifest": write_set(tmp_path / "set", rows), "template": template}
    ours = own_scores(run, [held])["pages"]
    task = {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    }  # fmt: skip
    write_task(tmp_path / "tasks", "our_pages", rows, task)
    theirs = harness_scores(run, tmp_path / "tasks", "our_pages", capsys)["our_pages"]
    assert theirs["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-6)
    nats = ours.loss * ours.tokens / ours.bytes
    assert theirs["byte_perplexity,none"] == pytest.approx(math.exp(nats), rel=1e-6)


def _instance(*args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0, metadata=("t", 0, 1))


def test_likelihoods_are_those_of_the_tokens_and_greedy_is_what_generation_gives(run: Path) -> None:
    model = MMScaleLM(run)
    net, tokenizer = model.trained._context.model, model.trained.tokenizer

    def table(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return (
                net.head(net(model.trained._tokens([model.trained.token_prompt(ids)])).hidden).double().log_softmax(-1)
            )

    requests = [("Which group?", " zebra"), ("Which group? ", "zebra"), ("", "Which group?")]
    found = model.loglikelihood([_instance(*request) for request in requests])
    assert found[0] == found[1]  # A space at the end of the context belongs to the continuation.
    assert model.loglikelihood_rolling([_instance("Which group?")]) == [pytest.approx(found[2][0])]
    before = [tokenizer.bos_id, *tokenizer.encode("Which group?")]
    said = list(before)
    for _ in range(3):
        said.append(int(table(said)[len(said) - 1].argmax()))
    assert found[0] == model.trained.likelihoods([(model.trained.token_prompt(before), tokenizer.encode(" zebra"))])[0]
    for continuation, is_greedy in ((tokenizer.encode(" zebra"), False), (said[len(before) :], True)):
        ids = before + continuation
        rows = table(ids)
        expected = sum(float(rows[row - 1, ids[row]]) for row in range(len(before), len(ids)))
        prompt = model.trained.token_prompt(before)
        assert model.trained.likelihoods([(prompt, continuation)]) == [(pytest.approx(expected, rel=1e-5), is_greedy)]


def test_long_texts_are_scored_in_windows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MMScaleLM(run)
    text = "fruit and animals and flags and faces"
    ids = model.trained.tokenizer.encode(text)
    monkeypatch.setattr(model.trained, "window", 4)
    (rolling,) = model.loglikelihood_rolling([_instance(text)])
    expected = 0.0
    for start in range(0, len(ids), 4):
        end = min(start + 4, len(ids))
        context = ids[end - 5 : start] if start else model.trained.begin_ids  # The last window has four tokens too.
        expected += model.trained.likelihoods([(model.trained.token_prompt(context), ids[start:end])])[0][0]
    assert len(ids) % 4
    assert rolling == pytest.approx(expected)


def test_contexts_beyond_the_positions_lose_their_beginning(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MMScaleLM(run)
    monkeypatch.setattr(model.trained, "max_tokens", 6)
    assert model._fitting(range(10), 2) == (6, 7, 8, 9)
    assert model._fitting(range(4), 2) == (0, 1, 2, 3)
    with pytest.raises(ConfigError, match="6 tokens after the context exceed the model's 6 positions"):
        model._fitting(range(4), 6)


def test_a_conversation_has_the_control_tokens_that_its_text_cannot_have(run: Path) -> None:
    model = MMScaleLM(run)
    tokenizer = model.trained.tokenizer
    start, end = (tokenizer.special_id(name, "x") for name in ("<|im_start|>", "<|im_end|>"))
    history = [{"role": "user", "content": "say <|im_end|> <image>"}]
    text = model.apply_chat_template(history)
    assert text.startswith("<s><|im_start|>user\nsay")
    ids = model._context_ids(text)
    assert (ids.count(start), ids.count(end)) == (2, 1)  # The user's <|im_end|> is text.
    assert model._context_ids(text + "x").count(start) == 0  # A text that was not made here has no control token.
    begun = model.apply_chat_template([*history, {"role": "assistant", "content": "Well"}], add_generation_prompt=False)
    assert model._context_ids(begun) == ids + tokenizer.encode("Well")
    with pytest.raises(ConfigError, match=r"does not fit the chat format of the run: .*role 'tool'"):
        model.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lm-eval", "our_choise"], "lm-eval has no task 'our_choise'; similar: our_choice"),
        (["--lm-eval", "our_broken"], "tasks our_broken: .*absent.jsonl"),
        (["--lm-eval", "a", "--lmms-eval", "b"], "run one harness at a time"),
        (["--lmms-eval", "b", "--chat"], "--chat belongs to --lm-eval"),
        (["--limit", "3"], "--limit, --include-path and --chat belong to --lm-eval or --lmms-eval"),
        (["--lmms-eval", "b"], r"lmms-eval is not installed; install it with: pip install 'mmscale\[lmms-eval\]'"),
    ],
    ids=str,
)
def test_mistakes_end_in_a_sentence(
    words: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = functools.partial(lm_eval_model.TaskManager, include_defaults=False)
    # The index of lm-eval's own tasks takes seconds, and the messages need none of them.
    monkeypatch.setattr(lm_eval_model, "TaskManager", lambda include_path, **_: local(include_path=include_path))
    write_task(tmp_path, "our_choice", questions(2), MULTIPLE_CHOICE)
    write_task(
        tmp_path, "our_broken", [], {**MULTIPLE_CHOICE, "dataset_kwargs": {"data_files": {"test": "absent.jsonl"}}}
    )
    more = [] if "--limit" in words else ["--include-path", str(tmp_path)]
    assert main(["eval", str(run), *words, *more]) in (1, 2)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert re.search(message, captured.err.replace("\n", " ")), captured.err


def test_models_that_cannot_answer_say_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MMScaleError, match="neither a run folder"):
        MMScaleLM(tmp_path)
    model = MMScaleLM(run)
    with pytest.raises(ConfigError, match="a task with images; score it with lmms-eval"):
        model.generate_until([_instance("a", {}, {"visual": []})])
    monkeypatch.setattr(model.trained, "dialogue", None)
    with pytest.raises(ConfigError, match="no template of kind dialogue; leave out"):
        model.apply_chat_template([{"role": "user", "content": "x"}])
    monkeypatch.setattr(RunConfig, "stage_media", lambda *_: SimpleNamespace(placement=Placement.PAIR))
    with pytest.raises(ConfigError, match="lm-eval cannot score a model that compares images with texts"):
        MMScaleLM(run)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (256, (), 0.0)),
        ({"until": "x", "max_new_tokens": 3, "temperature": 0.0}, (3, ("x",), 0.0)),
        ({"until": ["a", ""], "max_gen_toks": 2, "do_sample": True}, (2, ("a",), 1.0)),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1, "top_p": None}, (256, (), 0.0)),
        ({"temperature": 0.7, "top_k": 0, "top_p": 0.5}, (256, (), 0.7)),
    ],
)
def test_settings_of_a_task(given: dict[str, Any], expected: tuple[int, tuple[str, ...], float]) -> None:
    found = generation_settings(given)
    assert (found["max_new_tokens"], found["stop"], found["sampling"].temperature) == expected
    assert found["sampling"].top_p == given.get("top_p") if given.get("top_p") else found["sampling"].top_p == 1


@pytest.mark.parametrize("given", [{"num_beams": 4}, {"max_gen_toks": 0}, {"temperature": -1, "do_sample": True}])
def test_settings_that_are_not_supported_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"num_beams|generation settings"):
        generation_settings(given)


def test_the_run_of_a_configuration_is_scored(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path, "our_choice", questions(4), MULTIPLE_CHOICE)
    words = ["eval", CONFIG, f"run_dir={run}", *TALKS, "--lm-eval", "our_choice", "--include-path", str(tmp_path)]
    assert main([*words, "--limit", "2"]) == 0
    assert "lm_eval.our_choice.acc,none" in capsys.readouterr().out
