"""``eval``, ``generate`` and ``report`` on a run of two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli.main import main
from tests.system.conftest import REPO, Run

CONFIG = "tests/system/tiny.yaml"
SETS = (
    "evaluation.sets=[{name: both, manifest: examples/emoji/shards/heldout-both.manifest, field: group, "
    "choices: null, limit: 30}, {name: written, manifest: examples/emoji/shards/heldout-both.manifest, "
    "kind: generation, prompt: '', answers: name, metric: anls, max_new_tokens: 6, limit: 6}]"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "first"
    words = ["train", CONFIG, f"run_dir={folder}", "max_steps=2", SETS, "evaluation.captions={num_images: 2}"]
    words += [
        "evaluation.every_steps=1",
        "evaluation.best={metric: both.loss, min_delta: 99}",
    ]  # Step 1 stays the best.
    Run(folder, words, forked=True).finish()
    return folder


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)  # Paths of the bundled data are relative to it.


def test_eval_gives_the_score_that_the_run_ended_with(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", CONFIG, f"run_dir={run}", "max_steps=2", SETS, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["heldout"] == json.loads((run / "result.json").read_text())["heldout"]
    assert printed["checkpoint"].endswith("step-00000002")
    assert printed["heldout"]["written"]["kind"] == "generation"


def test_eval_leaves_out_drawings_of_a_model_that_draws_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = "examples/emoji/shards/heldout-both.manifest"
    drawn = f"{{name: drawn, kind: drawings, manifest: {manifest}, classifier: x, field: name}}"
    assert main(["eval", CONFIG, f"run_dir={run}", "max_steps=2", SETS[:-1] + f", {drawn}]", "--json"]) == 0
    printed = capsys.readouterr()
    assert "not scored: drawn; the model of stage pretrain draws no images" in printed.err
    assert [*json.loads(printed.out)["heldout"]] == ["both", "written"]


def test_eval_writes_the_answers_that_the_run_ended_with(run: Path) -> None:
    path = run / "answers" / "written.jsonl"
    written = path.read_text()
    assert len(written.splitlines()) == 6
    path.unlink()
    assert main(["eval", CONFIG, f"run_dir={run}", "max_steps=2", SETS]) == 0
    assert path.read_text() == written


def test_the_best_checkpoint_is_scored_listed_and_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "checkpoints/best"
    assert main(["eval", str(best), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["checkpoint"].endswith("step-00000001")
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert printed["heldout"]["both"]["loss"] == first["heldout/both/loss"]
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["best"], row["newest_whole"]) for row in rows] == [(1, True, False), (2, False, True)]
    assert main(["checkpoint", "export", str(best), str(tmp_path / "weights"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1
    assert main(["generate", str(best), "--prompt", "a", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"].endswith("step-00000001")


def test_generate_gives_the_captions_of_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "captions.json").read_text())["captions"][0]
    words = ["--image", str(run / record["image"]), "--prompt", "", "--max-new-tokens", "24"]
    assert main(["generate", str(run), *words]) == 0
    assert capsys.readouterr().out.strip() == record["generated"]
    (checkpoint,) = (run / "checkpoints").glob("step-*2")
    assert main(["generate", str(checkpoint), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == record["generated"]


def test_generate_draws_several_answers_and_shows_one_growing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(run / json.loads((run / "captions.json").read_text())["captions"][0]["image"])
    asked = ["generate", str(run), "--prompt", "a <image>", "--image", image, "--max-new-tokens", "6"]
    drawn = ["--temperature", "2", "--top-k", "50", "--top-p", "1", "--min-p", "0.01", "--repetition-penalty", "1.2"]
    assert main([*asked, *drawn, "--num", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["texts"][0] == printed["text"]
    assert len(set(printed["texts"])) == 3
    assert printed["images"] == [image]
    assert main(asked) == 0
    whole = capsys.readouterr().out
    assert main([*asked, "--stream"]) == 0
    assert capsys.readouterr().out.strip() == whole.strip() != ""


def test_report_is_made_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text()
    assert "group among" in text
    assert "override 2 (max_steps=2)" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["eval", CONFIG, "run_dir={empty}", SETS], 1, "no checkpoint there; train first"),
        (["eval", CONFIG, "run_dir={run}"], 2, "evaluation.sets is empty"),
        (["eval", CONFIG, "run_dir={run}", SETS, "model.decoder.num_layers=12"], 1, "checkpoint of another model"),
        (["eval", CONFIG, "run_dir={run}", "evaluation.sets=[{name: a, manifest: none, field: x}]"], 1, "none"),
        (["generate", "{empty}", "--image", "x.png"], 2, "neither a run folder"),
        (["generate", "{run}", "--image", "{empty}/x.png"], 1, "no such file"),
        (["generate", "{run}", "--image", "pyproject.toml"], 1, "no JPEG, PNG or WebP"),
        (["generate", "{run}"], 2, "give an image or a prompt"),
        (["generate", "{run}", "--prompt", "a", "--num", "2"], 2, "give a --temperature above 0"),
        (["generate", "{run}", "--prompt", "a", "--top-p", "0"], 2, "must be above 0"),
        (["generate", "{run}", "--prompt", "a", "--stream", "--json"], 2, "one answer as it grows"),
        (["generate", "{run}", "--prompt", "<image>"], 2, "add --image FILE"),
        (["report", "{empty}"], 2, "not a run folder"),
    ],
)
def test_mistakes_end_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = [word.replace("{run}", str(run)).replace("{empty}", str(tmp_path)) for word in words]
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before
