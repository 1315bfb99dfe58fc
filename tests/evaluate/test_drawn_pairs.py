"""``mmscale data pairs``: the best and the worst of a model's drawings, by an exhaustive search with the same seeds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import SampleError
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.computed import ComputedSource
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.prepare.rows import Members
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.token_grid import decode_grid
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.dist import World
from mmscale.errors import ConfigError
from mmscale.evaluate.classifier import Classifier
from mmscale.evaluate.drawings import draw_images
from mmscale.evaluate.drawn_pairs import DrawnPairs, names_of
from mmscale.evaluate.similarity import Vectors
from mmscale.models.build import media_spec
from mmscale.models.sampling import SamplingConfig
from tests.evaluate.drawing_models import dataset_block, drawing_data, drawing_model
from tests.evaluate.drawing_sets import SIDE, write_run

NAMES = ("fox", "moon", "cat")
NUM = 3
SAMPLING = SamplingConfig(temperature=1.0, seed=11)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> DrawnPairs:
    model = drawing_model("vocabulary")
    classifier = Classifier.open(write_run(tmp_path_factory.mktemp("classifier")), World(0, 1, 0, torch.device("cpu")))
    data, spec = drawing_data("vocabulary"), media_spec(model.config)
    return DrawnPairs(model, model.image_tokenizer, data, spec, classifier, NAMES, "name", NUM, SIDE, 1.0, SAMPLING)  # type: ignore[arg-type]


def named(name: str) -> Members:
    return {"json": json.dumps({"name": name, "caption": name, "style": "plain"}).encode(), "png": b"not read"}


def write_names(folder: Path) -> Path:
    with ShardWriter(folder, "names") as writer:
        for name in NAMES:
            writer.write(name, named(name))
    write_manifest(folder / "names.manifest", writer.shards)
    return folder / "names.manifest"


def test_stored_pairs_are_the_best_and_the_worst_of_the_drawings(program: DrawnPairs, tmp_path: Path) -> None:
    manifest = write_names(tmp_path)
    assert names_of([manifest], "name", OnError.FAIL) == NAMES
    source = ComputedSource(
        ReshardSource([NamedManifest("names", manifest)], Selection()), program, program.settings, "drawn"
    )
    report = ingest(source, tmp_path / "out", "pairs", image_tokenizer=program.image_tokenizer)
    assert Manifest.open(report.manifest).image_tokenizer == program.image_tokenizer
    template = {"kind": "preference", "each": {"kind": "drawing", "prompts": ["{name}"]}}
    block = {**dataset_block("vocabulary", str(report.manifest)), "template": template}
    build = DocumentBuilder(DatasetConfig.model_validate(block), load_tokenizer(program.data.tokenizer), program.spec)
    for number, sample in enumerate(read_samples(report.manifest)):
        name = NAMES[number]
        drawings = draw_images(
            program.model,
            program.data,
            program.spec,
            [name] * NUM,
            size=SIDE,
            sampling=SAMPLING.for_sequence(number * NUM),
        )
        scores = [
            float(program.classifier.name_log_probabilities([drawing.pixels], [name], NAMES)[0]) for drawing in drawings
        ]
        assert len(set(scores)) > 1
        order = np.argsort(scores)
        images = {part.name: part for part in sample.parts if isinstance(part, ImagePart)}
        assert sample.fields["style"] == "plain"
        for field, best in (("chosen", order[-1]), ("rejected", order[0])):
            image = images[sample.fields[field]]
            assert image.grid is not None
            assert decode_grid(image.grid, image.name).codes.tolist() == drawings[best].codes.tolist()
            with Image.open(io.BytesIO(image.data)) as opened:
                assert np.array_equal(np.array(opened), drawings[best].pixels)
            assert sample.fields[f"{field}_score"] == pytest.approx(scores[best], abs=1e-4)
        assert len(build(sample).branches) == 2


def test_the_names_are_encoded_once_for_all_chunks(program: DrawnPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = list[tuple[int, int]]()

    def counted(self: Classifier, images: Sequence[Sample], names: Sequence[str]) -> tuple[Vectors, Vectors]:
        encoded.append((len(images), len(names)))
        return vectors(self, images, names)

    vectors = Classifier.vectors
    monkeypatch.setattr(Classifier, "vectors", counted)
    fresh = replace(program)
    for number, name in enumerate(NAMES, start=1):
        fresh([named(name)], number)
    assert encoded == [(1, len(NAMES)), *[(NUM, 1)] * len(NAMES)]


def test_a_text_without_a_pair_does_not_change_the_samples_beside_it(program: DrawnPairs) -> None:
    broken = SampleError("damaged")
    found = program([broken, named("fox"), {"json": b'{"caption": "x"}'}, named(" ")], 1)
    (alone,) = program([named("fox")], 1)
    assert found[0] is broken
    assert found[1] == alone
    assert "field 'name' is missing" in str(found[2])
    assert "expected a text" in str(found[3])
    certain = replace(program, sampling=SamplingConfig(temperature=1.0, top_k=1))
    assert "its 3 drawings are equal" in str(certain([named("fox")], 1)[0])


def test_a_classifier_needs_two_names(tmp_path: Path) -> None:
    manifest = write_names(tmp_path)
    with pytest.raises(ConfigError, match="the only style of a sample is plain; a classifier needs at least two"):
        names_of([manifest], "style", OnError.FAIL)
    with pytest.raises(SampleError, match="field 'colour' is missing"):
        names_of([manifest], "colour", OnError.FAIL)
    with pytest.raises(ConfigError, match="the only colour of a sample is missing, and 3 samples have none; a"):
        names_of([manifest], "colour", OnError.SKIP)


def test_a_sample_without_a_name_is_skipped(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "names") as writer:
        for key, members in (("0", named("fox")), ("1", {"json": b'{"caption": "x"}'}), ("2", named("moon"))):
            writer.write(key, members)
    write_manifest(tmp_path / "names.manifest", writer.shards)
    assert names_of([tmp_path / "names.manifest"], "name", OnError.SKIP) == ("fox", "moon")
