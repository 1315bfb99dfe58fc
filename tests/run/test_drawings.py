"""A run of four steps that draws for its report, and ``mmscale generate --images`` with its checkpoints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmscale.cli.main import main
from mmscale.cli.next_steps import next_steps
from mmscale.cli.trained import open_trained
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.evaluate import mixed_answers
from mmscale.evaluate.drawings import Drawing, draw_images
from mmscale.models.sampling import SamplingConfig
from mmscale.report.build import render
from mmscale.run.config import RunConfig
from mmscale.run.drawings import check_drawings
from mmscale.run.evaluation import answerable
from mmscale.run.file_checks import check_files
from mmscale.shrink.run import dropped_settings
from tests.evaluate.drawing_models import drawing_run
from tests.evaluate.drawing_sets import drawing_set, write_run
from tests.evaluate.emoji_models import EMOJI
from tests.system.conftest import Run

SAMPLING = SamplingConfig(temperature=1.0, seed=7)


def test_a_finished_run_proposes_to_draw(tmp_path: Path) -> None:
    words = ["evaluation.drawings.tokenizer='a b'"]
    config = load(drawing_run(tmp_path, "vocabulary"), words, RunConfig).value
    (command,) = (command for command, what in next_steps(config) if what == "draw")
    drawn = ["--prompt", "fox", "--images", "4", "--size", "6", "--guidance", "2", "--tokenizer", "a b"]
    place = str(config.run_dir)
    assert "evaluation.drawings" in dropped_settings(config)
    assert shlex.split(command) == ["mmscale", "generate", place, *drawn, "--output", f"{place}/drawn"]


def test_the_data_to_draw_with_are_those_of_the_last_stage_that_draws(tmp_path: Path) -> None:
    talk = "{name: talk, steps: 2, data: {datasets: [{name: texts, manifest: x, template: {kind: text}}]}}"
    stages = f"stages=[{{name: draw, steps: 2}}, {talk}]"
    config = load(drawing_run(tmp_path, "vocabulary"), [stages], RunConfig).value
    assert [config.evaluation_data(number).datasets[0].name for number in (0, 1)] == ["texts", "texts"]
    assert [config.drawing_data(number).datasets[0].name for number in (0, 1)] == ["drawn", "drawn"]
    check_drawings(config)


def test_a_set_of_drawings_is_scored_in_the_stages_that_draw(tmp_path: Path) -> None:
    path = drawing_run(tmp_path, "vocabulary")
    block = json.loads(path.read_text())
    texts = {"name": "texts", "manifest": str(EMOJI / "shards/train-text.manifest"), "template": {"kind": "text"}}
    blind = {"decoder": {"image_tokens": None}, "image_tokenizer": None}
    reads = {"name": "reads", "steps": 2, "train": ["decoder"], "model": blind, "data": {"datasets": [texts]}}
    full = block["model"]
    drawing = {"decoder": {"image_tokens": full["decoder"]["image_tokens"]}, "image_tokenizer": full["image_tokenizer"]}
    draws = {**block["stages"][0], "model": drawing}
    sets = [drawing_set(write_run(tmp_path / "classifier"))]
    block["evaluation"] = {"captions": None, "every_steps": 2, "sets": sets}

    def config(*stages: dict[str, Any], **evaluation: Any) -> RunConfig:
        path.write_text(json.dumps(block | {"stages": stages, "evaluation": block["evaluation"] | evaluation}))
        return load(path, [], RunConfig).value

    both = config(reads, draws)
    check_files(both)
    unscored = ["not scored: drawn; the model of stage reads draws no images"]
    for number, kept, lines in ((0, [], unscored), (1, ["drawn"], [])):
        printed: list[str] = []
        found = answerable(both, number, both.evaluation.during_training, printed.append)
        assert ([held.name for held in found.sets], printed) == (kept, lines)
    with pytest.raises(ConfigError, match="this model draws no images"):
        check_files(config(reads))
    with pytest.raises(ConfigError, match="the last stage draws no images for set drawn; choose another value"):
        check_files(config(draws, reads, best={"metric": "drawn.score"}))
    # The stage that draws is scored on another set, and the last one does not draw.
    two, chosen = [*sets, {**sets[0], "name": "second"}], {"sets": ["second"]}
    with pytest.raises(ConfigError, match="drawn: this model draws no images"):
        check_files(config(draws, reads, sets=two, during=chosen))
    check_files(config(draws, reads, sets=two))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawing")
    Run(folder / "run", ["train", str(drawing_run(folder, "vocabulary"))], forked=True).finish()
    return folder / "run"


def read(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "drawings/drawings.jsonl").read_text().splitlines()]


def test_drawings_of_a_run_are_those_of_its_checkpoints(run: Path) -> None:
    lines = records(run)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        trained = open_trained(run / f"checkpoints/step-{line['step']:08d}")
        fields = {"caption": line["drawings"][2]["text"]}
        assert fields["caption"] in ("fox", "moon", "cat", "tree", "star", "apple")
        expected = draw_images(
            trained.model,
            trained.config.data,
            trained.config.media_spec,
            ["fox", "the <moon>", fields],
            size=6,
            sampling=SAMPLING,
            guidance=2.0,
        )
        for record, drawing in zip(line["drawings"], expected, strict=True):
            np.testing.assert_array_equal(read(run / record["image"]), drawing.pixels)
    images = [(run / record["image"]).read_bytes() for line in lines for record in line["drawings"]]
    assert len(set(images)) > 3


def test_the_report_and_tensorboard_show_them(run: Path) -> None:
    page = (run / "report.html").read_text()
    section = page[page.index('<section id="drawings">') : page.index('<section id="curves">')]
    assert len(re.findall('src="data:image/webp;base64,', section)) == 6
    assert "the &lt;moon&gt;" in section
    assert re.findall(r"step (\d)<", section) == ["2", "4"] * 3
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("drawings/1")] == [2, 4]


def test_a_damaged_record_is_named_and_left_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "drawings").mkdir()
    lines = tmp_path / "drawings/drawings.jsonl"
    secret = {"text": "a", "image": "../secret.webp"}
    lines.write_text(json.dumps({"step": 3, "drawings": [secret]}) + "\n")
    assert "image not found" in render(tmp_path)
    lines.write_text('{"step": 3, "drawings": [{"text": 1}]}\n')
    assert "drawings.jsonl is damaged" in render(tmp_path)


def generate(run: Path, *words: str) -> int:
    return main(["generate", str(run), "--prompt", "fox", *words])


def test_generate_writes_the_drawings_and_a_contact_sheet(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "6x8", "--guidance", "2", "--top-k", "5", "--seed", "3", "--temperature", "0.9"]
    assert generate(run, "--images", "5", "--output", str(tmp_path / "five"), *words, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == [str(tmp_path / f"five/{number:04d}.png") for number in range(5)]
    assert printed["checkpoint"].endswith("step-00000004")
    trained = open_trained(run)
    expected = draw_images(
        trained.model,
        trained.config.data,
        trained.config.media_spec,
        ["fox"] * 5,
        size=(6, 8),
        sampling=SamplingConfig(temperature=0.9, top_k=5, seed=3),
        guidance=2.0,
    )
    for path, drawing in zip(printed["images"], expected, strict=True):
        np.testing.assert_array_equal(read(Path(path)), drawing.pixels)
    sheet = read(Path(printed["contact"]))  # Two rows of three, 4 pixels apart, then enlarged to at least 192 pixels.
    scale = -(-192 // (2 * 6 + 4))
    assert sheet.shape[1] == (3 * 8 + 2 * 4) * scale
    np.testing.assert_array_equal(
        sheet[: 6 * scale : scale, (8 + 4) * scale : (8 + 4 + 8) * scale : scale], expected[1].pixels
    )

    assert (
        generate(run, "--images", "1", "--output", str(tmp_path / "one"), *words[:-4], "--seed", "5", *words[-2:]) == 0
    )
    assert capsys.readouterr().out.split() == [str(tmp_path / "one" / name) for name in ("0000.png", "contact.png")]
    np.testing.assert_array_equal(read(tmp_path / "one/0000.png"), expected[2].pixels)


def test_generate_writes_the_drawings_of_an_answer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of four steps begins no image, so a stand-in gives the parts; test_mixed_answers.py tests them."""
    pixels = [np.full((2, 3, 3), value, np.uint8) for value in (9, 200)]
    drawn = [Drawing(each, np.zeros((1, 1), np.int64)) for each in pixels]
    words = ["--output", str(tmp_path / "out"), "--max-new-tokens", "4"]
    assert generate(run, *words, "--json") == 0
    texts = json.loads(capsys.readouterr().out)["parts"]
    assert all(part.keys() == {"text"} for part in texts)
    monkeypatch.setattr(mixed_answers, "respond_with_drawings", lambda *_, **__: ["a", drawn[0], drawn[1], "b"])
    assert generate(run, *words) == 0
    paths = [tmp_path / "out/0000.png", tmp_path / "out/0001.png"]
    assert capsys.readouterr().out.splitlines() == ["a", *map(str, paths), "b"]
    for path, each in zip(paths, pixels, strict=True):
        np.testing.assert_array_equal(read(path), each)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "2"], "give the folder of the drawings as --output"),
        (["--images", "2", "--output", "{out}"], "give a size"),
        (["--images", "2", "--output", "{out}", "--size", "big"], "--size big: expected pixels as H or HxW"),
        (["--images", "2", "--output", "{out}", "--size", "7"], "multiples of the 2 pixels"),
        (["--images", "2", "--output", "{out}", "--temperature", "0"], "all drawings would be the same"),
        (["--images", "2", "--output", "{out}", "--num", "2"], "--num belongs to answers in words"),
        (["--images", "2", "--output", "{out}", "--guidance", "0.5"], "--guidance"),
        (["--images", "1", "--output", "{run}/drawings/step-00000002"], None),
        (["--guidance", "2"], "--guidance belongs to drawings"),
        (["--output", "{out}", "--num", "2"], "--num belongs to answers without drawings"),
        (["--images", "1", "--output", "{out}", "--size", "6", "--tokenizer", "{run}"], "is no image tokenizer"),
        (["--images", "1", "--output", "{run}/config.yaml"], "config.yaml: a file, expected a folder"),
    ],
)
def test_mistakes_end_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str | None
) -> None:
    if message is None:
        (tmp_path / "0000.png").write_bytes(b"mine")
        words, message = ["--images", "1", "--output", str(tmp_path), "--size", "6"], "0000.png: exists already"
    places = {"{out}": str(tmp_path / "out"), "{run}": str(run)}
    assert generate(run, *(re.sub(r"{\w+}", lambda found: places[found[0]], word) for word in words)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.drawings={prompts: [fox]}", "stage draw: give a size"),
        ("evaluation.drawings={prompts: [fox], size: 5}", "multiples of the 2 pixels"),
        ("evaluation.drawings.tokenizer=elsewhere", "elsewhere"),
        ("model.image_tokenizer=null", "has no image tokenizer .*; set tokenizer to the run"),
        ("data.datasets.0.template={kind: drawing, caption_last: 1.0}", "no data set of this run has a text before"),
        ("data.datasets.0.template.prompts=['{nothing.here} {caption}']", "field 'nothing.here' is missing"),
    ],
)
def test_drawings_that_cannot_be_made_are_found_before_the_run(tmp_path: Path, override: str, message: str) -> None:
    config = load(drawing_run(tmp_path, "vocabulary"), [override], RunConfig).value
    with pytest.raises(ConfigError, match=message):
        check_drawings(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.drawings={}", "0 drawings: give 1 to 64"),
        ("evaluation.drawings={sets: [held], num_images: 64, prompts: [a]}", "65 drawings"),
        ("evaluation.drawings={sets: [other]}", r"drawings.sets names \['other'\]; the sets are \['held'\]"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(drawing_run(tmp_path, "vocabulary"), [override], RunConfig)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_and_a_resumed_run_draw_the_same(tmp_path: Path, run: Path) -> None:
    """ZeRO-3 on two ranks for two steps, then on one rank: the drawings of the run on one rank."""
    path, folder = drawing_run(tmp_path, "vocabulary"), tmp_path / "run"
    two = ["launch", "local", str(path), "--ranks", "2", "max_steps=2", "evaluation.sets.0.limit=4"]
    Run(folder, two, forked=True).finish()
    assert [line["step"] for line in records(folder)] == [2], "the end of the run repeats no drawing"
    stale = {**records(folder)[0], "step": 3}
    with (folder / "drawings/drawings.jsonl").open("a") as file:
        file.write(json.dumps(stale) + "\n")
    Run(folder, ["train", str(path)], forked=True).finish()
    lines = records(folder)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines == records(run)
    for record in (record for line in lines for record in line["drawings"]):
        assert (folder / record["image"]).read_bytes() == (run / record["image"]).read_bytes()

    without = tmp_path / "without"
    words = ["train", str(path), f"run_dir={without}", "evaluation.drawings=null"]
    Run(without, words, forked=True).finish()
    losses = [[line["loss"] for line in Run(each, []).metrics()] for each in (run, without)]
    assert losses[0] == losses[1]
    assert not (without / "drawings").exists()
