"""``train`` and ``config validate`` find errors of a run and its evaluation before the first step."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.cli.main import main
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.evaluate import check
from mmscale.run.config import RunConfig
from mmscale.run.file_checks import check_files
from tests.evaluate.texts import write_set

TINY = Path(__file__).parents[1] / "system/tiny.yaml"
STYLE = {"name": "style", "manifest": "examples/emoji/shards/heldout-style-quick.manifest", "field": "name"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # Paths of shards are relative to the repository.


def override(key: str, value: Any) -> str:
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}"


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the error of ``config validate``: one sentence with exit code 2 or 1."""
    assert main(["config", "validate", str(TINY), *words]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"field": "nam"},
            "evaluation set style: field 'nam' of .* is None, expected a text; the sample has",
        ),
        ({"field": "tags"}, "evaluation set style: field 'tags' of .* expected a text"),
        (
            {"choices": 5000},
            "evaluation set style: choices=5000: the set offers 256 different answers; ask for",
        ),
        ({"prompt": "{nam}"}, "evaluation set style: .*field 'nam' is missing"),
        ({"candidates_from": "absent"}, "evaluation set style: absent: no such file"),
        ({"candidates_from": "README.md"}, "evaluation set style: manifest=README.md"),
        ({"manifest": "README.md"}, "evaluation set style: manifest=README.md"),
        ({"transforms": {"kind": "fixed", "size": 31}}, "evaluation set style: .*31"),
        ({"kind": "choice"}, "evaluation set style: .*field 'choices' is missing"),
        (
            {"kind": "choice", "choices": ["a", "b"], "answer": "name", "answer_as": "text"},
            "expected the text of exactly one choice",
        ),
        ({"kind": "perplexity", "template": {"kind": "dialogue"}}, "evaluation set style: "),
    ],
    ids=str,
)
def test_a_mistake_in_an_evaluation_set(capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str) -> None:
    held = STYLE | changes
    if held.get("kind", "images") != "images":
        del held["field"]
    err = complaint(capsys, override("evaluation.sets", [held]))
    assert re.search(said, err), err


SHORT = ("model.decoder.rope=null", "model.decoder.learned_positions=32")
CONTRASTIVE = ("model.connector={kind: contrastive, dim: 16, pool: mean, loss: sigmoid}",)
TEXT_MODEL = (
    *("model.vision=null", "model.connector=null", "stages.0.train=[decoder]"),
    "data.datasets=[{name: pages, manifest: examples/text/shards/pages-heldout.manifest, template: {kind: text}}]",
)
LONG = {"n": 0, "question": "why", "choices": ["yes", "no " * 60]}


@pytest.mark.parametrize(
    ("changes", "evaluation", "words", "said"),
    [
        ({}, {"captions": {"prompt": "{nam}"}}, (), "set style: evaluation.captions: .*'nam' is missing"),
        ({}, {"captions": {"prompt": "{"}}, (), "evaluation.captions.prompt=.*'{'"),
        ({"prompt": "{name"}, {}, (), "evaluation.sets.0.prompt=.*'}'"),
        ({}, {"captions": {"max_new_tokens": 40}}, SHORT, "captions: .* 40 more .* exceed the 32 positions"),
        ({"template": "{value}" + " and more" * 20}, {}, SHORT, "style: .* tokens and .* exceed the 32 positions"),
        ({"template": "{value}" + " and more" * 20}, {}, (*SHORT, *CONTRASTIVE), "style: .*exceed the 32 positions"),
        ({"kind": "choice", "prompt": "{question}", "answer": "n"}, {}, SHORT, "style: .*exceed the 32 positions"),
        ({"choices": 2}, {"every_steps": 2, "during": {"limit": 3}}, (), "of 3 samples have the answer"),
        (
            {},
            {"every_steps": 2, "best": {"metric": "style.loss"}},
            CONTRASTIVE,
            "style.loss: a contrastive model gives no",
        ),
        (
            {},
            {"every_steps": 2, "best": {"metric": "style.score"}},
            TEXT_MODEL,
            "best.metric=style.score: the model of the last stage cannot answer set style",
        ),
    ],
    ids=str,
)
def test_a_mistake_that_would_end_a_long_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    evaluation: dict[str, Any],
    words: tuple[str, ...],
    said: str,
) -> None:
    held = STYLE | {"choices": 4, "limit": 8} | changes
    if held.get("kind", "images") != "images":
        del held["field"], held["choices"]
    if held.get("kind") == "choice":
        held["manifest"] = str(write_set(tmp_path, [LONG, LONG]))
    err = complaint(capsys, override("evaluation", {"sets": [held], **evaluation}), *words)
    assert re.search(said, err), err


def test_an_image_that_cannot_be_decoded_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "png")
    cut = picture.getvalue()[:60]  # The header with the size is whole.
    with ShardWriter(tmp_path, "part", max_samples=9) as writer:
        for number in range(4):
            writer.write(f"{number}", {"png": cut, "json": json.dumps({"name": f"n{number}"}).encode()})
    write_manifest(tmp_path / "set.manifest", writer.shards)
    held = STYLE | {"manifest": str(tmp_path / "set.manifest"), "choices": 2}
    err = complaint(capsys, override("evaluation.sets", [held]))
    assert re.search(r"evaluation set style: .*part-00000.tar/[0-3]: a damaged png", err), err


def test_a_set_with_candidates_of_another_manifest_names_that_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_MOST_READ", 5)
    pool = write_set(tmp_path, [{"name": f"n{number}"} for number in range(8)])
    held = STYLE | {"choices": 265, "candidates_from": str(pool)}
    err = complaint(capsys, override("evaluation.sets", [held]))
    assert re.search(f"evaluation set style: choices=265: {pool} has 8 samples", err), err


def test_training_does_not_begin_with_a_mistake_in_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run_dir={tmp_path / 'run'}", override("evaluation.sets", [STYLE | {"field": "nam"}])]
    assert main(["train", str(TINY), *words]) == 2
    assert "field 'nam'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_questions_about_images_need_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_set(tmp_path, [{"name": "a"}, {"name": "b"}])
    held = {"name": "text", "manifest": str(manifest), "field": "name", "choices": 2}
    err = complaint(capsys, override("evaluation.sets", [held]))
    assert "evaluation set text: " in err
    assert "no image, video or sound: a set of kind images asks about one" in err


def text_only(tmp_path: Path, rows: list[dict[str, Any]], kind: str = "caption") -> str:
    dataset = {"name": "words", "manifest": str(write_set(tmp_path, rows)), "template": {"kind": kind}}
    return override("data.datasets", [dataset])


def test_a_tower_without_images_is_refused_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = text_only(tmp_path, [{"caption": "a"}, {"caption": "b"}], "text")
    err = complaint(capsys, words)
    assert "the model has a vision tower, and no image was found in its data (words), so vision and connector" in err
    stages = [{"name": "text", "steps": 1, "train": ["decoder"]}]
    notes = check_files(load(TINY, [words, override("stages", stages)], RunConfig).value)
    assert len(notes) == 1
    assert "stages.0 (text): the model has a vision tower, and no image was found" in notes[0]
    assert check_files(load(TINY, [], RunConfig).value) == []
    blind = ["model.vision=null", "model.connector=null", override("stages", stages)]
    assert check_files(load(TINY, [words, *blind], RunConfig).value) == []


def test_a_projector_of_videos_without_videos_is_refused_or_named() -> None:
    connector = {"kind": "embedding", "projector": {"kind": "mlp"}, "video_projector": {"kind": "mean_pool"}}
    words = [override("model.connector", connector), "data.packing.max_tokens=4096"]
    stages = [{"name": "pictures", "steps": 1, "train": ["connector"]}]
    (note,) = check_files(load(TINY, [*words, override("stages", stages)], RunConfig).value)
    assert note.startswith(
        "stages.0 (pictures): the model has a projector for videos, and no video was found in its data"
    )
    stages[0]["train"] = ["connector", "video_connector"]
    with pytest.raises(ConfigError, match="so video_connector would learn nothing"):
        check_files(load(TINY, [*words, override("stages", stages)], RunConfig).value)


def test_a_warning_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = text_only(tmp_path, [{"caption": "a"}, {"caption": "b"}], "text")
    stages = override("stages", [{"name": "text", "steps": 1, "train": ["decoder"]}])
    # The file's own run_dir is that of the quickstart, which this checkout may have finished.
    assert main(["config", "validate", str(TINY), words, stages, f"run_dir={tmp_path / 'run'}"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{TINY}: valid, for at most 4 ranks\n"
    assert err.count("mmscale: warning: stages.0 (text): the model has a vision tower") == 1


def test_data_of_which_nothing_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = complaint(capsys, text_only(tmp_path, [{"url": "x"}] * 40))
    assert "data set words: none of the 32 inspected samples can be used; the first: " in err
    assert "part-00000.tar/0000: no image among its members" in err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.datasets.0.manifest", "absent", "absent: no such file"),
        ("data.datasets.0.manifest", "README.md", "README.md: this is YAML or another text"),
        ("data.tokenizer.path", "absent", "tokenizer absent: no such file"),
        ("model.decoder.vocab_size", 100, "has 2048 ids"),
        ("model.vision.patch_size", 5, "data set emoji: "),
        ("stages.0.weights", [{"checkpoint": "absent"}], "stages.0.weights.0.checkpoint=absent"),
        ("stages.0.distill", [{"checkpoint": "absent"}], "stages.0.distill.0.checkpoint=absent"),
    ],
)
def test_what_validation_finds_on_the_disk(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, value: Any, said: str
) -> None:
    # A started run no longer needs its weights. So use a folder that no quickstart in this checkout has used.
    assert said in complaint(capsys, override("run_dir", str(tmp_path / "run")), override(key, value))


def test_a_large_set_is_checked_as_far_as_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mmscale.evaluate.check._MOST_READ", 5)
    assert check_files(load(TINY, [override("evaluation.sets", [STYLE])], RunConfig).value) == []


def test_a_pack_that_holds_no_document(capsys: pytest.CaptureFixture[str]) -> None:
    err = complaint(capsys, "data.packing.max_tokens=2")
    assert "data set emoji: none of the 32 inspected samples can be used; the first: examples/emoji/shards/" in err
    assert "a pack holds 2 tokens" in err
    cut = load(TINY, ["data.packing.max_tokens=20", "data.packing.too_long=split"], RunConfig).value
    assert check_files(cut) == []


def test_a_run_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for run_dir, parent in (("file", "file"), ("file/run", "file"), ("dangling/run", "dangling")):
        err = complaint(capsys, f"run_dir={tmp_path / run_dir}")
        assert f"run_dir={tmp_path / run_dir}: {tmp_path / parent} is not a folder" in err
    assert "run_dir=/proc/x/y: cannot create a folder in /proc (" in complaint(capsys, "run_dir=/proc/x/y")
    assert check_files(load(TINY, [f"run_dir={tmp_path / 'a/b'}"], RunConfig).value) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]
