"""Scores of drawings against brute force: one image at a time, loops over candidates, and the textbook's formulas."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data_pipeline.errors import DataPipelineError
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import read_samples
from mmscale.errors import ConfigError
from mmscale.evaluate import EvaluationConfig, check_sets, evaluate
from mmscale.evaluate.classifier import Classifier, as_sample
from mmscale.evaluate.drawing_scores import first_image, frechet_distance
from mmscale.evaluate.heldout import ImageQuestions
from mmscale.evaluate.questions import make_blocks
from mmscale.models.build import media_spec
from mmscale.models.config import ModelConfig
from tests.engine.ranks import run_ranks
from tests.evaluate.drawing_models import drawing_data, drawing_model, model_block
from tests.evaluate.drawing_sets import SIDE, TRAIN, drawing_set, evaluation, write_run
from tests.evaluate.emoji_models import ALONE, EMOJI, tiny_model
from tests.evaluate.test_similarity import one_by_one

DATA = drawing_data("vocabulary")
MODEL = ModelConfig.model_validate(model_block("vocabulary"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("classifier"))


def by_formula(first: Any, second: Any) -> float:
    """The distance as Heusel et al. write it; eigenvalues of the product give the trace of its root."""
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).sum().real
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one + two) - 2 * root)


def test_frechet_distance_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(40, 6)), rng.normal(size=(30, 6)) @ rng.normal(size=(6, 6)) + 1
    assert frechet_distance(first, second) == pytest.approx(by_formula(first, second), rel=1e-9)
    few = rng.normal(size=(4, 6))  # Fewer vectors than channels: the covariance is singular.
    assert frechet_distance(few, second) == pytest.approx(by_formula(few, second), rel=1e-6)
    # Of x and s x + t the distance is |difference of the means|^2 + (1 - s)^2 tr(C).
    moved = 3 * first + np.arange(6)
    closed = ((moved.mean(0) - first.mean(0)) ** 2).sum() + 4 * np.trace(np.cov(first, rowvar=False))
    assert frechet_distance(first, moved) == pytest.approx(closed, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def vectors(model: Any, sample: Sample, name: str = "x") -> tuple[Any, Any]:
    """Return the vectors of an image and of a name that are alone in their batch."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda module, inputs, output: found.extend((output.images, output.texts)))
    one_by_one(model, sample, name, "")
    handle.remove()
    return found[0][0].double().numpy(), found[1][0].double().numpy()


def thumbnail(sample: Sample) -> Any:
    small = Image.fromarray(first_image(sample)).resize((32, 32), Image.Resampling.BILINEAR)
    return np.array(small).astype(float) / 255


@pytest.fixture(scope="module")
def scored(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The result of one process, and the folder of its drawings."""
    folder, model = tmp_path_factory.mktemp("scored"), drawing_model("vocabulary")
    found = evaluate(model, evaluation(classifier), DATA, media_spec(model.config), ALONE, answers_folder=folder)
    return asdict(found["drawn"]), folder


def test_scores_are_those_of_brute_force(classifier: Path, scored: tuple[dict[str, Any], Path]) -> None:
    result, folder = scored
    (held,), model = evaluation(classifier).sets, tiny_model("contrastive")
    lines = [json.loads(line) for line in (folder / "drawn.jsonl").read_text().splitlines()]
    drawings = [np.array(Image.open(folder / line["drawing"])) for line in lines]
    assert [image.shape for image in drawings] == [(SIDE, SIDE, 3)] * 9
    assert len({image.tobytes() for image in drawings}) == 9
    questions = ImageQuestions.read(held)  # type: ignore[arg-type]
    assert [line["reference"] for line in lines] == [line["prompt"] for line in lines] == questions.answers
    of_drawings = np.stack([vectors(model, as_sample(image))[0] for image in drawings])
    blocks = make_blocks(questions.answers, questions.pool, 4, 0)
    asked = {name for block in blocks for name in block.candidates}
    of_names = {name: vectors(model, as_sample(drawings[0]), name)[1] for name in asked}
    right, control = [0.0] * 9, [0.0] * 9
    for block in blocks:
        for sample, other in zip(block.samples, block.control_sample, strict=True):
            for into, shown in ((right, sample), (control, block.samples[other])):
                values = {name: float(of_drawings[shown] @ of_names[name]) for name in block.candidates}
                best = max(values, key=lambda name: values[name])
                into[sample] = float(best == questions.answers[sample])
                assert shown != sample or lines[sample]["answer"] == best
    assert (result["score"], result["control"]) == pytest.approx((sum(right) / 9, sum(control) / 9))
    assert (result["n"], result["chance"], result["metric"]) == (9, 0.25, "name of drawings among 4")

    own = list(read_samples(held.manifest))
    order = np.random.default_rng([0, len(own), 1]).permutation(len(own))[:18]
    real = [own[number] for number in order]
    of_real = np.stack([vectors(model, sample)[0] for sample in real])
    assert result["frechet_n"] == 9
    assert result["frechet"] == pytest.approx(by_formula(of_drawings, of_real[:9]), abs=1e-5)
    assert result["frechet_real"] == pytest.approx(by_formula(of_real[9:], of_real[:9]), abs=1e-5)

    train = list(read_samples(TRAIN))
    chosen = sorted(np.random.default_rng([0, len(train), 2]).permutation(len(train))[:12])
    small = [thumbnail(train[number]) for number in chosen]

    def nearest(sample: Sample) -> tuple[float, str]:
        distances = [float(np.sqrt(((thumbnail(sample) - other) ** 2).mean())) for other in small]
        return min(distances), train[chosen[int(np.argmin(distances))]].provenance.key

    expected = [nearest(as_sample(image)) for image in drawings]
    assert [line["distance"] for line in lines] == pytest.approx([distance for distance, _ in expected])
    assert [line["nearest_key"] for line in lines] == [key for _, key in expected]
    of_others = [nearest(sample)[0] for sample in real[:9]]
    assert result["nearest"] == pytest.approx(np.median([distance for distance, _ in expected]))
    assert result["nearest_real"] == pytest.approx(np.median(of_others))
    near = [distance <= np.quantile(of_others, 0.05) for distance, _ in expected]
    assert result["near_copies"] == pytest.approx(np.mean(near))
    assert Image.open(folder / lines[0]["nearest"]).size > (SIDE, SIDE)


def test_a_copy_has_distance_zero(classifier: Path) -> None:
    """Real images of the set are compared with the set itself, and drawings with those of a copying model."""
    manifest = EMOJI / "shards" / "heldout-both.manifest"
    model = drawing_model("vocabulary")
    config = evaluation(classifier, train=manifest, train_limit=None)
    result = evaluate(model, config, DATA, media_spec(model.config), ALONE)["drawn"]
    assert asdict(result)["nearest_real"] == 0
    assert asdict(result)["nearest"] > 0


@pytest.mark.slow
@pytest.mark.dist
def test_shards_on_two_ranks_give_the_result_of_one_process(
    classifier: Path, scored: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Three groups of 4, 4 and 1 drawings on two ranks, so that one rank repeats a group."""
    found, arguments = {}, {"classifier": str(classifier)}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        results = run_ranks(
            "tests.evaluate.drawing_sets:score_sharded", ranks, {**arguments, "answers_folder": str(folder)}
        )
        assert results == results[:1] * ranks
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
        assert len(files) == 19
        found[ranks] = results[0], files
    assert found[1] == found[2]


def test_log_probabilities_are_those_of_a_softmax(classifier: Path) -> None:
    model = tiny_model("contrastive")
    images = [first_image(sample) for sample in list(read_samples(TRAIN))[:3]]
    candidates, names = ["dog", "red apple", "moon", "sun"], ["moon", "dog", "moon"]
    found = Classifier.open(classifier, ALONE, template=" {value}").name_log_probabilities(images, names, candidates)
    for image, name, value in zip(images, names, found, strict=True):
        cosines = [one_by_one(model, as_sample(image), candidate, "") for candidate in candidates]
        logits = torch.tensor(cosines, dtype=torch.float64) * model.connector.logit_scale.detach().exp().item()
        assert value == pytest.approx(float(logits.log_softmax(0)[candidates.index(name)]), abs=1e-4)
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize(
    ("names", "candidates", "words"),
    [
        (["moon"], ["dog", "sun"], "no candidates"),
        (["dog", "dog"], ["dog", "sun"], "1 images and 2 names"),
        (["dog"], ["dog", "dog"], "two different names"),
        (["dog"], ["dog", " "], "none of them empty"),
    ],
)
def test_names_that_cannot_be_ranked(classifier: Path, names: list[str], candidates: list[str], words: str) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match=words):
        Classifier.open(classifier, ALONE).name_log_probabilities([image], names, candidates)


@pytest.mark.fault
def test_a_classifier_that_cannot_classify_is_refused(classifier: Path, tmp_path: Path) -> None:
    model = drawing_model("vocabulary")
    spec = media_spec(model.config)

    def complaint(path: Path) -> str:
        """Both the check before a run and the evaluation raise the sentence."""
        with pytest.raises((ConfigError, DataPipelineError)) as before:
            check_sets(evaluation(path), DATA, spec, model=MODEL)
        with pytest.raises((ConfigError, DataPipelineError)) as at_end:
            evaluate(model, evaluation(path), DATA, spec, ALONE)
        assert str(before.value) == str(at_end.value)
        return str(before.value)

    check_sets(evaluation(classifier), DATA, spec, model=MODEL)
    assert "set drawn: classifier=" in complaint(tmp_path / "none")
    assert "emoji-contrast.yaml" in complaint(tmp_path / "none")
    assert "connector.kind=embedding" in complaint(write_run(tmp_path / "other", "embedding"))
    moved = tmp_path / "moved"
    (write_run(tmp_path / "run") / "checkpoints").rename(moved)
    (checkpoint,) = moved.iterdir()
    assert "no config.yaml beside the checkpoint" in complaint(checkpoint)
    (file,) = checkpoint.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (tmp_path / "config.yaml").write_text((classifier / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"set drawn: classifier=.*damaged"):
        evaluate(model, evaluation(checkpoint), DATA, spec, ALONE)
    for config, words in (
        (MODEL.model_copy(update={"image_tokenizer": None}), "the model has no image tokenizer"),
        (tiny_model().config, "this model draws no images"),
    ):
        with pytest.raises(ConfigError, match=f"set drawn: {words}"):
            check_sets(evaluation(classifier), DATA, spec, model=config)


@pytest.mark.fault
def test_a_set_that_cannot_be_scored_is_refused_before_a_run(classifier: Path, tmp_path: Path) -> None:
    spec = media_spec(drawing_model("vocabulary").config)
    for changes, words in (
        ({"field": "nothing"}, "field 'nothing'"),
        ({"choices": 100_000}, "choices=100000"),
        ({"size": 5}, "multiples of the 2 pixels"),
        ({"train": str(tmp_path / "none")}, "no such file"),
        ({"prompt": "{nothing}"}, "nothing"),
        ({"sampling": {"repetition_penalty": 1.2}}, "images repeat codes"),
    ):
        with pytest.raises((ConfigError, DataPipelineError), match=words):
            check_sets(evaluation(classifier, **changes), DATA, spec, model=MODEL)
    with pytest.raises((ConfigError, DataPipelineError), match=r"set drawn: .*positions"):
        check_sets(evaluation(classifier), DATA, replace(spec, max_document_tokens=10), model=MODEL)
    for changes, words in (
        ({"train": None}, "train_limit=12"),
        ({"template": "no value"}, "{value}"),
    ):
        with pytest.raises(ValidationError, match=words):
            evaluation(classifier, **changes)


def test_the_best_checkpoint_may_have_the_lowest_distance(classifier: Path) -> None:
    block = {"sets": [drawing_set(classifier)], "every_steps": 1, "best": {"metric": "drawn.frechet"}}
    best = EvaluationConfig.model_validate(block).best
    assert best is not None
    assert best.improves(1.0, 2.0)
    assert not best.improves(2.0, 1.0)
