"""Scores of lmms-eval on local tasks with images equal our own scores of the same questions.

lmms-eval pins older versions of some packages, so ``make test-apart`` runs this file in an environment of its own.
The other targets skip it.
"""

from __future__ import annotations

import io
import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from data_pipeline.images.decode import decode_image
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.templates.base import images_of
from mmscale.cli.main import main
from mmscale.errors import ConfigError
from tests.harness.runs import own_scores, train, write_task
from tests.system.conftest import REPO

pytest.importorskip("lmms_eval")
tomllib = pytest.importorskip("tomllib")
from mmscale.harness.lmms_eval_model import MANIFEST, MMScaleLMM  # noqa: E402

pytestmark = pytest.mark.slow

HELDOUT = REPO / "examples/emoji/shards/heldout-both.manifest"
COUNT = 12
FUNCTIONS = """
from PIL import Image

def images(doc):
    return [Image.open(doc["picture"])]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not forked: packages that come with lmms-eval may install a package ``tests``, which a fork server would import.
    return train(tmp_path_factory.mktemp("run") / "captions", steps=1, forked=False)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def in_chat_format(run: Path, folder: Path) -> Path:
    """Return a copy of a run whose first data set has a chat format."""
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["datasets"][0]["template"] = {"kind": "dialogue", "format": "vicuna"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_questions(folder: Path, said: dict[str, str]) -> tuple[Path, list[dict[str, Any]]]:
    """Write questions about images as a set of ours and as pictures; return the manifest and the rows of a task."""
    samples = list(read_samples(HELDOUT))[:COUNT]
    groups = sorted({sample.fields["group"] for sample in samples})
    folder.mkdir(parents=True)
    rows = []
    with ShardWriter(folder / "set", "part", max_samples=100) as writer:
        for sample in samples:
            (image,) = images_of(sample)
            buffer = io.BytesIO()
            Image.fromarray(decode_image(image.data, max_pixels=1 << 26)).save(buffer, "PNG")
            key = sample.provenance.key
            (folder / f"{key}.png").write_bytes(buffer.getvalue())
            fields = {"question": f"of {sample.fields['name']}:", "choices": groups, "said": said.get(key, "wrong")}
            fields["answer"] = groups.index(sample.fields["group"])
            writer.write(key, {"png": buffer.getvalue(), "json": json.dumps(fields).encode()})
            rows.append({**fields, "picture": str(folder / f"{key}.png")})
    write_manifest(folder / "set.manifest", writer.shards)
    return folder / "set.manifest", rows


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_questions_about_images_score_the_same(
    chat: bool, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_chat_format(captions, tmp_path / "chat") if chat else captions
    asked: dict[str, Any] = {"dialogue": {"kind": "dialogue"}} if chat else {}
    written = {"name": "written", "kind": "generation", "answers": "said", "max_new_tokens": 6, "stop": ["z"], **asked}
    manifest, _ = write_questions(tmp_path / "first", {})
    own_scores(run, [{**written, "manifest": manifest}], tmp_path)
    lines = map(json.loads, (tmp_path / "written.jsonl").read_text().splitlines())
    said = {line["key"]: line["answer"] or "nothing" for line in sorted(lines, key=lambda line: line["key"])}
    manifest, rows = write_questions(tmp_path / "second", dict(list(said.items())[::2]))
    template = "{value}" if chat else " {value}"
    choice = {"name": "choice", "kind": "choice", "manifest": manifest, "template": template, **asked}
    close = {**written, "name": "close", "metric": "anls"}
    ours = own_scores(run, [choice, {**written, "manifest": manifest}, {**close, "manifest": manifest}])
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "functions.py").write_text(FUNCTIONS)
    common = {"doc_to_visual": "FUNCTION functions.images", "doc_to_text": "FUNCTION functions.question"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    chosen = {
        "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }  # fmt: skip
    generated = {
        "output_type": "generate_until", "doc_to_target": "said",
        "generation_kwargs": {"until": ["z"], "max_new_tokens": 6, "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True, **mean},
            {"metric": "anls", **mean},
        ],
    }  # fmt: skip
    write_task(tasks, "our_choice", rows, {**common, **chosen})
    write_task(tasks, "our_answers", rows, {**common, **generated})
    for path in tasks.glob("*.yaml"):  # A YAML tag, which the safe writer cannot write.
        path.write_text(path.read_text().replace("FUNCTION ", "!function "))
    capsys.readouterr()
    words = ["eval", str(run), "--lmms-eval", "our_choice,our_answers", "--include-path", str(tasks), "--json"]
    assert main(words) == 0
    out = capsys.readouterr().out
    theirs = json.loads(out[out.index("{\n") :])["lmms_eval"]
    assert theirs["our_choice"]["acc,none"] == pytest.approx(ours["choice"].scores["none"])
    assert theirs["our_choice"]["acc_norm,none"] == pytest.approx(ours["choice"].scores["characters"])
    assert theirs["our_answers"]["exact_match,none"] == pytest.approx(ours["written"].score)
    assert theirs["our_answers"]["anls,none"] == pytest.approx(ours["close"].score)
    assert 0.3 < ours["written"].score < 0.8


def test_lmms_eval_finds_the_model_by_its_entry_point(captions: Path) -> None:
    from lmms_eval.models import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    assert registry.get_model_class("mmscale") is MMScaleLMM
    group = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    assert EntryPoint("mmscale", group["mmscale"], "lmms_eval.models").load() is MANIFEST
    model = MMScaleLMM.create_from_arg_string(f"run={captions}", {"batch_size": 1, "device": None})
    assert model.trained.checkpoint.parent.parent == captions


def _request(kind: str, *arguments: Any) -> Any:
    from lmms_eval.api.instance import Instance

    return Instance(kind, arguments, 0, {"task": "t", "doc_id": 0, "repeats": 1})


def test_an_image_mark_places_an_image_and_a_likelihood_has_its_sign(captions: Path) -> None:
    model = MMScaleLMM(captions)
    (first, second) = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    model.task_dict = {"t": {"test": [{"target": " a cat"}]}}

    def ask(context: str, *images: Image.Image, target: Any = " a cat") -> float:
        arguments = (context, target, lambda doc: list(images), 0, "t", "test")
        return model.loglikelihood([_request("loglikelihood", *arguments)])[0].text[0]

    assert ask("<image> b <image>", first, second) != ask("<image> b <image>", second, first)
    assert ask("<image>is", first) == ask("is", first)  # Without a mark the image comes first.
    assert ask("is", first) != ask("is", second)
    assert ask("is", first, target=lambda doc: doc["target"]) == -ask("is", first) < 0
    with pytest.raises(ConfigError, match="acc_mutual_info is not supported"):
        model.loglikelihood([_request("loglikelihood", "", " a cat")])
    with pytest.raises(ConfigError, match="a str, but the model reads images only"):
        ask("is", "video.mp4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="generate_until_multi_round are not supported"):
        model.generate_until_multi_round([])
