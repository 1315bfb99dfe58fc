"""Answers about sounds and videos equal decoding by hand, and the report plays the media of the first questions."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.sample import AudioPart, Provenance, Sample, StoredFrames, TextPart, VideoPart
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.templates import CaptionTemplate, DialogueTemplate, InterleavedTemplate
from mmscale.errors import ConfigError
from mmscale.evaluate import answer_media, check_sets, evaluate
from mmscale.evaluate.answers import Chat, respond
from mmscale.evaluate.heldout import unanswerable_sets
from mmscale.evaluate.result import Params, RunResult, write_result
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.report.build import build_report
from tests.evaluate.emoji_models import ALONE, EMOJI, continued, data_config, tiny_model
from tests.evaluate.emoji_models import evaluation as questions
from tests.evaluate.texts import evaluation
from tests.report.pages import Page
from tests.sounds import encoded as encoded_sound
from tests.videos import encoded as encoded_video


def _hearing_model() -> MultimodalModel:
    """Return a random model that sees and hears, and whose answers depend on both by more than rounding."""
    block = tiny_model("embedding").config.model_dump()
    audio = {"tower": {"kind": "frames", "num_bins": 16, "stack": 8}, "projector": {"kind": "linear"}}
    model = build_model(ModelConfig.model_validate({**block, "audio": audio}), seed=3).eval()
    assert isinstance(model, MultimodalModel)
    with torch.no_grad():
        model.head.weight.mul_(20)
        model.audio_connector.linear.weight.mul_(5)
    return model


def _data(**blocks: Any) -> DataConfig:
    values = data_config().model_dump()
    return DataConfig.model_validate({**values, "datasets": [{**values["datasets"][0], **blocks}]})


def test_a_question_about_sounds_is_what_greedy_decoding_by_hand_gives(tmp_path: Path) -> None:
    model, path, other = _hearing_model(), tmp_path / "a.wav", tmp_path / "b.wav"
    path.write_bytes(encoded_sound(6400, kind="wav"))
    other.write_bytes(encoded_sound(9600, kind="wav", seed=3))
    spec, data = media_spec(model.config), _data(audio={})
    answers = []
    for file in (path, other):
        (answer,) = respond(model, data, spec, sounds=[file], prompt="what? <audio>", max_new_tokens=6)
        parts = (TextPart("what? "), AudioPart(file.read_bytes(), "wav"), TextPart("the answer"))
        sample = Sample(parts, {}, Provenance("t", "t", "t", 0))
        assert answer == continued(model, data, InterleavedTemplate(), sample, 6)
        answers.append(answer)
    assert answers[0] != answers[1]
    for prompt, words in (("<audio> <audio>", "audio number 2, and --audio gives 1"), ("<video>", "no video is given")):
        with pytest.raises(ConfigError, match=words):
            respond(model, data, spec, sounds=[path], prompt=prompt)
    with pytest.raises(ConfigError, match="the first data set has no block audio"):
        respond(model, _data(), spec, sounds=[path])
    deaf = tiny_model("embedding")
    with pytest.raises(ConfigError, match="no audio tower"):
        respond(deaf, data, media_spec(deaf.config), sounds=[path])


def test_a_conversation_keeps_its_sounds(tmp_path: Path) -> None:
    model, path = _hearing_model(), tmp_path / "a.wav"
    path.write_bytes(encoded_sound(6400, kind="wav"))
    data = _data(audio={}, template={"kind": "dialogue"})
    chat = Chat(model, data, media_spec(model.config), max_new_tokens=6)
    first, second = chat.ask("who?", sounds=[path]), chat.ask("more?")
    turns = [
        {"role": "user", "content": "<audio>who?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "more?"},
    ]
    for number, answer in ((1, first), (3, second)):
        sample = Sample((AudioPart(path.read_bytes(), "wav"),), {"messages": turns[:number]})
        assert answer == continued(model, data, DialogueTemplate(), sample, 6)
    chat.reset()
    assert chat.ask("more?") != second
    with pytest.raises(ConfigError, match="the first data set has no block audio"):
        Chat(model, _data(template={"kind": "dialogue"}), media_spec(model.config)).ask("who?", sounds=[path])


def test_a_model_with_ears_alone_answers_sets_about_sounds() -> None:
    """Sets of kind ``images`` may ask about sounds; a model that reads neither leaves them out."""
    block = {**_hearing_model().config.model_dump(), "vision": None, "connector": None}
    speech = EMOJI.parent / "omni/shards/speech-heldout-both.manifest"
    config = questions(manifest=speech, field="transcript", choices=2, limit=4)
    hearing, deaf = (media_spec(ModelConfig.model_validate(each)) for each in (block, {**block, "audio": None}))
    assert unanswerable_sets(config, hearing, _data(audio={})) == ()
    assert unanswerable_sets(config, deaf, _data(audio={})) == config.sets
    assert unanswerable_sets(config, hearing, _data()) == config.sets
    check_sets(config, _data(audio={}), hearing)


def test_many_or_large_media_of_a_question_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_media, "_MOST_BYTES", 50)
    parts = tuple(AudioPart(bytes(20), f"{number}.wav") for number in range(12))
    shown = answer_media.copy_media(tmp_path, "held", 0, Sample(parts, {}, Provenance("t", "t", "t", 0)))
    assert ["file" in one for one in shown] == [True, True] + [False] * 6
    assert len(list((tmp_path / "held").iterdir())) == 2


def test_a_frame_of_one_row_of_pixels_is_squeezed() -> None:
    wide = io.BytesIO()
    Image.new("RGB", (4000, 1)).save(wide, "png")
    row = answer_media._frames(VideoPart(StoredFrames((wide.getvalue(),) * 2, 2.0), "frames"))
    assert row is not None
    assert Image.open(io.BytesIO(row)).size == (2 * 384, 96)


def test_the_report_plays_the_media_of_questions(tmp_path: Path) -> None:
    model, run = _hearing_model(), tmp_path / "run"
    media = {"wav": encoded_sound(6400, kind="wav"), "mp4": encoded_video(8), "opus": encoded_sound(6400, kind="opus")}
    with ShardWriter(tmp_path, "part") as writer:
        for number, (kind, content) in enumerate(media.items()):
            writer.write(f"{number}", {kind: content, "json": json.dumps({"words": f"word {number}"}).encode()})
    write_manifest(tmp_path / "set.manifest", writer.shards)
    data = _data(audio={}, video={"min_pixels": 64, "max_pixels": 1024})
    held = {"kind": "generation", "manifest": tmp_path / "set.manifest", "prompt": "say:", "answers": "words"}
    config = evaluation({**held, "max_new_tokens": 4}, tokens_per_forward=300)
    found = evaluate(model, config, data, media_spec(model.config), ALONE, answers_folder=run / "answers")
    lines = [json.loads(line) for line in (run / "answers" / "held.jsonl").read_text().splitlines()]
    template = CaptionTemplate(prompts=("say:",), answers=("x",))
    sounds = Sample((AudioPart(media["wav"], "wav"),), {}, Provenance("t", "t", "t", 0))
    heard = next(line for line in lines if line["key"] == "0")
    assert heard["answer"] == continued(model, data, template, sounds, 4)
    for line in lines:  # The set has an order of its own.
        kind, (shown,) = list(media)[int(line["key"])], line["media"]
        assert (run / "answers" / shown["file"]).read_bytes() == media[kind]
        assert ("frames" in shown) == (kind == "mp4")
    (run / "config.yaml").write_text("{}\n")
    result = RunResult(1, 0, "fp32", 1, 1.0, Params(1, 1, {}), found, "fp32: a test")
    write_result(run, result)
    page = Page(build_report(run).read_text())
    sources = [(tag, attributes["src"] or "") for tag, attributes in page.tags if "src" in attributes]
    played = [(tag, url.partition(";")[0]) for tag, url in sources]
    tags = {
        "0": [("audio", "data:audio/wav")],
        "1": [("video", "data:video/mp4"), ("img", "data:image/png")],
        "2": [("audio", "data:audio/ogg")],
    }
    assert played == [tag for line in lines for tag in tags[line["key"]]]
    assert page.runs_its_own_script_alone()
    assert "word 1" in page.text
