from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mmscale.report.page as report_page
from mmscale.errors import ConfigError
from mmscale.evaluate.result import (
    ChoiceResult,
    DrawingsResult,
    GenerationResult,
    HeldOutResult,
    Memory,
    Params,
    PerplexityResult,
    RunResult,
    SetResult,
    binomial_error,
    write_result,
)
from mmscale.report.build import build_report
from mmscale.report.captions import encode_png, names, read_captions, save_captions
from mmscale.report.configuration import save_origins
from tests.report.pages import HOSTILE, Page


def _metrics(run: Path, stages: tuple[str, str] = ("align", "all")) -> None:
    lines = [
        {
            "step": step,
            "stage": stages[step > 3],
            "loss": 5.0 / step if step != 2 else None,
            "tokens": 100,
            "samples": 4,
            "seconds": 0.5,
            "data_wait_seconds": 0.1,
            "lr": 1e-3,
            "lr/decoder": 1e-3,
            "grad_norm": 1.0,
            "applied": True,
            "peak_rss_bytes": 3 << 30,
        }
        for step in range(1, 7)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _result(run: Path, sets: dict[str, HeldOutResult]) -> None:
    write_result(
        run,
        RunResult(
            world_size=2,
            zero_stage=3,
            precision="fp32",
            steps=6,
            train_seconds=75.0,
            params=Params(7_000_000, 5_000_000, {"vision": 3_000_000, "decoder": 4_000_000}),
            heldout=sets,
            precision_reason="fp32: this CPU has no native bf16",
            memory=Memory((1 << 30, 2 << 30)),
        ),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    _metrics(tmp_path)
    return tmp_path


def test_a_finished_run_shows_scores_controls_images_and_configuration(run: Path) -> None:
    _result(run, {"style": SetResult(0.5, 0.02, 0.02, 200, "name among 50", 0.035, 0.01)})
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    save_captions(run, [("style", pixels, "red apple", "a Red Apple."), ("style", pixels, "fox", "firefox")])
    (run / "config.yaml").write_text("run_dir: runs/x\ndata:\n  lanes: 8\nstages:\n- {name: align, steps: 5}\n")
    save_origins(run, {"data.lanes": "x.yaml:3", "run_dir": "default"})
    page = Page(build_report(run).read_text())
    for words in ("50.0", "25.0× its control", "name among 50", "2.0%", "1 of 2 captions name the image"):
        assert words in page.text
    for words in ("fp32: this CPU has no native bf16", "rank 1, host", "2.00 GiB", "57.1%", "1m15s", "ZeRO-3"):
        assert words in page.text
    for words in ("data.lanes", "x.yaml:3", "stages.0.steps", "1 step without a finite loss"):
        assert words in page.text
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert base64.b64decode(images[0].removeprefix("data:image/png;base64,")) == encode_png(pixels)


def test_questions_and_perplexity_have_cards_of_their_own(run: Path) -> None:
    shares = {"none": 0.5, "tokens": 0.4, "characters": 0.3, "bytes": 0.3}
    _result(
        run,
        {
            "facts": ChoiceResult(0.5, 0.25, 40, "right choice among 4", 0.08, shares),
            "pages": PerplexityResult(2.0, 0.03, 7.389, 1.25, 12_345, 50_000, 17),
            "tokens": PerplexityResult(2.0, 0.03, 1234567.0, None, 5, 0, 1),
            "captions": GenerationResult(1.234, 30, "CIDEr", 0.056),
        },
    )
    text = Page(build_report(run).read_text()).text
    for words in ("right choice among 4", "40 samples", "2.0× chance", "perplexity per token", "7.389"):
        assert words in text
    for words in ("loss 2.0000 ± 0.0300 · 1.250 bits per byte", "17 documents, 12,345 tokens", "1.235e+06"):
        assert words in text
    for words in ("CIDEr", "30 samples", "123.4", "± 5.6 · answers in answers/captions.jsonl"):
        assert words in text
    assert "permuted 0" not in text
    held = json.loads((run / "result.json").read_text())["heldout"]
    assert [held[name]["kind"] for name in ("facts", "pages")] == ["choice", "perplexity"]
    assert held["facts"]["scores"] == shares
    assert {"score", "control", "chance", "n", "metric"} <= set(held["captions"])


def test_generated_answers_are_shown_and_cannot_leave_their_place(run: Path) -> None:
    names = ("captions", "damaged", "absent", "../../captions")
    _result(run, {name: GenerationResult(0.25, 30, "ANLS", 0.05) for name in names})
    (run / "answers").mkdir()
    row = {"prompt": "who?", "answer": HOSTILE, "references": ["Ada", "Ada", "Eve"], "score": 0.5}
    rows = [row, {**row, "prompt": None, "answer": "x" * 5000}, *({**row, "answer": f"number {n}"} for n in range(20))]
    (run / "answers" / "captions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (run / "answers" / "damaged.jsonl").write_text('{"prompt": 3}\n')
    (run.parent / "captions.jsonl").write_text(json.dumps({**row, "answer": "outside"}) + "\n")
    html = build_report(run).read_text()
    page = Page(html)
    assert page.text.count("Answers of captions") == 1
    assert "Answers of damaged" not in page.text
    assert "outside" not in page.text
    assert HOSTILE not in html
    for words in ("who?", "Ada | Eve", "50", "number 5"):
        assert words in page.text
    assert "number 6" not in page.text  # Eight rows.
    assert "x" * 300 not in html


def test_scored_drawings_are_shown_beside_their_nearest_training_images(run: Path) -> None:
    values = (
        0.4,
        0.04,
        0.02,
        50,
        "name of drawings among 50",
        0.069,
        0.028,
        0.328,
        0.345,
        50,
        0.147,
        0.165,
        0.14,
        "ab",
    )
    _result(run, {name: DrawingsResult(*values) for name in ("drawn", "damaged", "../../drawn")})
    (run / "answers" / "drawn").mkdir(parents=True)
    for name, colour in (("0000.png", 10), ("0000-nearest.png", 20), ("0001.png", 30)):
        (run / "answers" / "drawn" / name).write_bytes(encode_png(np.full((2, 2, 3), colour, np.uint8)))
    shutil.copy(run / "answers" / "drawn" / "0000.png", run.parent / "outside.png")
    row = {"prompt": "moon", "answer": HOSTILE, "reference": "moon", "drawing": "drawn/0000.png"}
    near = {"nearest": "drawn/0000-nearest.png", "distance": 0.25, "nearest_key": "k"}
    rows = [row | near, row | {"drawing": "drawn/0001.png", "answer": "moon"}, row | {"drawing": "../../outside.png"}]
    (run / "answers" / "drawn.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (run / "answers" / "damaged.jsonl").write_text('{"drawing": 3}\n')
    html = build_report(run).read_text()
    page = Page(html)
    for words in ("10.0× its control", "Frechet distance 0.328 (real images 0.345)", "14 % nearer", "moon 0.250"):
        assert words in page.text
    assert page.text.count("Drawings of set drawn") == 1
    assert "Drawings of set damaged" not in page.text
    assert HOSTILE not in html
    shown = [base64.b64decode(str(attrs["src"]).partition(",")[2]) for tag, attrs in page.tags if tag == "img"]
    drawn = [(run / "answers" / "drawn" / name).read_bytes() for name in ("0000.png", "0000-nearest.png", "0001.png")]
    assert [image for image in shown if image in drawn] == drawn


def test_components_with_one_learning_rate_share_a_line(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"lr/vision": 1e-3, "lr/connector": 5e-4}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(build_report(run).read_text()).text
    assert "decoder, vision" in text
    assert " connector " in text


def test_a_report_in_mid_run_says_so_and_shows_what_there_is(run: Path) -> None:
    page = Page(build_report(run).read_text())
    assert "not finished · step 6" in page.text
    assert "Scored at the end of the run" in page.text
    assert "3.00 GiB" in page.text
    assert sum(attributes.get("class") == "chart" for _, attributes in page.tags) == 5
    loss, rate, norm, tokens, wait = page.charts
    assert loss["marks"] == [[1, "align"], [4, "all"]]
    each, smoothed = loss["lines"]
    assert (each["label"], each["faint"], smoothed["label"], smoothed["faint"]) == (
        "each step",
        True,
        "smoothed",
        False,
    )
    assert each["x"] == smoothed["x"] == [1, 3, 4, 5, 6]
    assert each["y"] == pytest.approx([5 / step for step in each["x"]])
    assert (rate["lines"][0]["label"], set(rate["lines"][0]["y"])) == ("decoder", {1e-3})
    assert (set(norm["lines"][0]["y"]), set(tokens["lines"][0]["y"])) == ({1.0}, {200.0})
    assert (set(wait["lines"][0]["y"]), wait["unit"]) == ({20.0}, "%")
    assert [chart["zero"] for chart in page.charts] == [False, True, False, True, True]


def test_held_out_values_of_the_training_are_curves_with_their_standard_error(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1::2]:  # Steps 2, 4 and 6.
        line |= {"heldout/style/score": line["step"] / 10, "heldout/style/loss": 1.5, "heldout/style/error": 0.05}
        line |= {"heldout/pages/loss": 3.0 / line["step"], "heldout/pages/error": 0.25}
    lines[3] |= {"heldout/pages/loss": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = build_report(run).read_text()
    assert text.index("Held-out score<") < text.index("Held-out loss<")
    found = {line["label"]: line for chart in Page(text).charts for line in chart["lines"] if chart["unit"] == "%"}
    score = found["style"]
    assert (score["x"], score["y"]) == ([2, 4, 6], [20, 40, 60])
    assert (score["low"], score["high"]) == ([15, 35, 55], [25, 45, 65])
    (losses,) = [c["lines"] for c in Page(text).charts if {line["label"] for line in c["lines"]} == {"pages", "style"}]
    assert losses[0]["label"] == "pages"
    assert (losses[0]["x"], losses[0]["y"], losses[0]["low"]) == ([2, 6], [1.5, 0.5], [1.25, 0.25])
    assert losses[1]["low"] == [], "the error is that of the score"


def test_a_model_that_draws_has_a_chart_of_the_loss_of_each_modality(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:  # The first step has no image.
        line["metric/cross_entropy_image"] = 7.0
    for line in lines:
        line["metric/cross_entropy_text"] = 3.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(build_report(run).read_text())
    assert "Loss of text and of images" in page.text
    (text, images) = page.charts[1]["lines"]
    assert (text["label"], text["x"], set(text["y"])) == ("text and marks", [1, 2, 3, 4, 5, 6], {3.0})
    assert (images["label"], images["x"], set(images["y"])) == ("codes of images", [2, 3, 4, 5, 6], {7.0})


def test_each_chart_has_a_table_for_readers_without_scripts(run: Path) -> None:
    page = Page(build_report(run).read_text())
    assert sum(tag == "noscript" for tag, _ in page.tags) == len(page.charts)
    assert "step first last lowest highest each step 5% 5%" not in page.text
    assert "each step 5 0.8333 0.8333 5 " in page.text
    assert "each step 20% 20% 20% 20%" in page.text


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "No step is done yet" in build_report(tmp_path).read_text()


def test_hostile_captions_stages_names_and_settings_stay_text(run: Path) -> None:
    _metrics(run, (HOSTILE, "all"))
    _result(run, {HOSTILE: SetResult(0.5, 0.0, 0.02, 4, HOSTILE, 0.1, 0.0)})
    save_captions(run, [(HOSTILE, np.zeros((2, 2, 3), np.uint8), HOSTILE, HOSTILE)])
    (run / "config.yaml").write_text(json.dumps({"seed": HOSTILE, HOSTILE: {"a": HOSTILE}}))
    page = Page(build_report(run).read_text())
    assert page.runs_its_own_script_alone()
    assert page.charts[0]["marks"][0] == [1, HOSTILE]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert "60481729" not in page.text
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_text_that_utf_8_cannot_hold_is_escaped(run: Path) -> None:
    (run / "config.yaml").write_text(r'run_dir: "a\ud800b"')
    assert r"a\ud800b" in Page(build_report(run).read_text()).text


def test_the_page_needs_no_network(run: Path) -> None:
    _result(run, {})
    text = build_report(run).read_text()
    links = [
        value or ""
        for _, attributes in Page(text).tags
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert [link for link in links if not link.startswith("data:")] == []
    assert "@import" not in text
    assert "url(" not in text


def test_the_library_of_the_charts_comes_with_its_licence(run: Path) -> None:
    folder = Path(report_page.__file__).with_name("uplot")
    assert "Permission is hereby granted, free of charge" in (folder / "LICENSE").read_text()
    (program,) = Page(build_report(run).read_text()).programs
    assert program.startswith((folder / "uPlot.iife.min.js").read_text())


def test_an_image_outside_the_run_is_not_shown(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("other") / "secret.png"
    secret.write_bytes(b"secret")
    record = {
        "set": "s",
        "image": f"../{secret.parent.name}/secret.png",
        "expected": "a",
        "generated": "b",
        "right": False,
    }
    (run / "captions.json").write_text(json.dumps({"captions": [record]}))
    assert (run / record["image"]).is_file()
    assert "image not found" in Page(build_report(run).read_text()).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        build_report(tmp_path)


def test_the_result_has_the_promised_shape_and_is_whole_or_absent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _result(run, {"style": SetResult(0.5, 0.02, 0.02, 200, "name among 50", 0.035, 0.01)})
    before = (run / "result.json").read_bytes()
    result = json.loads(before)
    assert {"world_size", "zero_stage", "precision", "steps", "train_seconds", "params", "heldout"} <= set(result)
    assert {"total", "active"} <= set(result["params"])
    assert {"score", "control", "chance", "n", "metric"} <= set(result["heldout"]["style"])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        _result(run, {})
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("generated", "expected", "right"),
    [
        ("a red apple.", "Red Apple", True),
        ("redapple", "red apple", False),
        ("firefox", "fox", False),
        ("fox", "firefox", False),
        ("flag: Österreich", "österreich", True),
        ("", "fox", False),
    ],
)
def test_a_caption_is_right_if_it_has_the_name_as_words(generated: str, expected: str, right: bool) -> None:
    assert names(generated, expected) is right


def test_captions_survive_the_disk(tmp_path: Path) -> None:
    save_captions(tmp_path, [("style", np.zeros((2, 3, 3), np.uint8), "fox", "a fox")])
    (record,) = read_captions(tmp_path)
    assert (record.expected, record.generated, record.right) == ("fox", "a fox", True)
    assert (tmp_path / record.image).read_bytes().startswith(b"\x89PNG")


def test_binomial_error() -> None:
    assert binomial_error(0.5, 100) == pytest.approx(0.05)
    assert binomial_error(1.0, 10) == 0
    assert binomial_error(0.0, 0) == 0


def test_samples_that_were_left_out_are_summed_by_kind(tmp_path: Path) -> None:
    _metrics(tmp_path)
    assert "Samples left out" not in Page(build_report(tmp_path).read_text()).text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"faults/checksum": 2, "faults/decode": 1}
    lines[4] |= {"faults/checksum": 1}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(build_report(tmp_path).read_text()).text
    assert "Samples left out checksum 3 decode 1 share of all samples 14% Each with its reason" in text
