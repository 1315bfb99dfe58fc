"""The data sets of a smoke-test run, compared with those of the original run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DatasetConfig
from data_pipeline.images.tilings import Idefics3Tiling
from data_pipeline.images.transforms import ImageTransform, TilesTransform
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import ImagePart
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.templates import AnnotationsTemplate, DialogueTemplate, EndPiece, TextPiece
from mmscale.config import load
from mmscale.run.config import RunConfig
from mmscale.shrink.run import _shrink_dataset, _shrink_transforms, dropped_settings, shrink_run
from tests.configs.files import REPO, RUNS, name_of

RECIPES = REPO / "configs" / "recipes"
KEPT = ("roles", "format", "end", "strip", "learn", "system", "loss_weight")
"""Fields that determine the format of a dialogue and the tokens that have a loss."""


def pairs(path: Path) -> list[tuple[DatasetConfig, DatasetConfig]]:
    """Return pairs of each data set of each stage and its counterpart in the smoke-test run."""
    config = load(path, [], RunConfig).value
    small = shrink_run(config)
    return [
        pair
        for number in range(len(config.stages))
        for pair in zip(config.stage_data(number).datasets, small.stage_data(number).datasets, strict=True)
    ]


def dialogue_of(dataset: DatasetConfig) -> DialogueTemplate | None:
    template = dataset.template
    template = template.each if isinstance(template, AnnotationsTemplate) else template
    return template if isinstance(template, DialogueTemplate) else None


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_dialogues_stay_dialogues(path: Path) -> None:
    for old, new in pairs(path):
        mine, theirs = dialogue_of(new), dialogue_of(old)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert new.template.kind == old.template.kind
            assert [getattr(mine, name) for name in KEPT] == [getattr(theirs, name) for name in KEPT]
            assert mine.special_tokens == ()


def test_a_smoke_test_run_learns_the_answers_in_the_format_of_its_recipe() -> None:
    (_, new) = pairs(RECIPES / "llama3.2-11b-vision.yaml")[-2]  # The last stage has preference pairs.
    template = dialogue_of(new)
    assert template is not None
    for sample in read_samples(REPO / str(new.manifest)):
        pieces = template.pieces(sample, None)
        turns = sample.fields["messages"]
        expected = "".join(
            f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content']}<|eot_id|>" for turn in turns
        )
        assert "".join("<image>" if isinstance(one, ImagePart) else one.text for one in pieces) == expected
        learned = "".join(one.text for one in pieces if isinstance(one, TextPiece) and one.weight)
        assert learned == "".join(turn["content"] + "<|eot_id|>" for turn in turns[1::2])


def own_roles(**values: Any) -> DialogueTemplate:
    config = load(RECIPES / "emoji-text.yaml", [], RunConfig).value
    dataset = config.data.datasets[0].model_copy(update={"template": DialogueTemplate(**values)})
    data = config.data.model_copy(update={"datasets": (dataset,)})
    (small,) = shrink_run(config.model_copy(update={"data": data})).data.datasets
    assert isinstance(small.template, DialogueTemplate)
    assert small.manifest == Path("examples/text/shards/talks.manifest")
    return small.template


@pytest.mark.parametrize(
    ("roles", "asks", "answers"),
    [
        ({"system": {}, "person": {"prefix": "P: "}, "model": {"prefix": "M: ", "weight": 0.5}}, "P: ", "M: "),
        ({"assistant": {"prefix": "A: "}, "user": {"prefix": "U: ", "weight": 1}}, "A: ", "U: "),
        ({"all": {"prefix": "X: ", "weight": 1}}, "X: ", "X: "),
    ],
)
def test_roles_of_other_names_get_the_bundled_turns(roles: dict[str, Any], asks: str, answers: str) -> None:
    template = own_roles(roles=roles, field="chat", aliases={})
    sample = next(read_samples(REPO / "examples/text/shards/talks.manifest"))
    first = [one for one in template.pieces(sample, None) if not isinstance(one, EndPiece)][:4]
    contents = [turn["content"] for turn in sample.fields["messages"][:2]]
    assert [one.text for one in first] == [asks, contents[0], answers, contents[1]]
    assert first[3].weight == next(role["weight"] for role in roles.values() if "weight" in role)


@pytest.mark.parametrize(
    ("block", "chosen", "rejected"), [("video", "motion", "name"), ("audio", "transcript", "voice")]
)
def test_pairs_over_clips_and_sounds_stay_pairs(block: str, chosen: str, rejected: str) -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=16)
    old = {"name": "x", "manifest": "x", "template": {"kind": "preference"}, block: {}}
    new = _shrink_dataset(DatasetConfig.model_validate(old), spec, spec)
    sample = next(read_samples(REPO / str(new.manifest)))
    texts = [one.text for one in new.template.pieces(sample, None) if isinstance(one, TextPiece)]
    assert texts == ["Say: ", sample.fields[chosen], sample.fields[rejected]]


def test_a_text_model_reads_text_unless_the_template_is_a_dialogue() -> None:
    kinds = [(new.template.kind, str(new.manifest)) for _, new in pairs(RECIPES / "llama3.2-1b.yaml")]
    assert kinds == [
        ("text", "examples/emoji/shards/train-text.manifest"),
        ("dialogue", "examples/text/shards/talks.manifest"),
    ]


def test_images_of_idefics3_keep_two_tiles_along_a_side() -> None:
    """Published models have four tiles of 512 pixels there, 17 crops an image."""
    published = MediaSpec(Placement.EMBEDDING, patch_size=16, merge=4, fixed_grid=(32, 32))
    small = MediaSpec(Placement.EMBEDDING, patch_size=4, merge=4, fixed_grid=(8, 8))
    for size in (None, 512):
        transforms = TilesTransform(size=size, tiling=Idefics3Tiling())
        assert ImageTransform(transforms, published).grids[-1] == (4, 4)
        found = ImageTransform(_shrink_transforms(transforms, published, small), small)
        assert found.grids == ((1, 1), (1, 2), (2, 1), (2, 2))


def test_a_tokenizer_keeps_its_discriminator_and_loses_its_tower() -> None:
    words = [
        "model.discriminator={}",
        "stages.0.train=[encoder, decoder, discriminator]",
        "stages.0.reconstruction.discriminator={start_step: 500}",
        "stages.0.reconstruction.perceptual={tower: runs/tower, layers: [3]}",
    ]
    config = load(REPO / "tests/system/tokenizer.yaml", words, RunConfig).value
    small = shrink_run(config).stages[0].reconstruction
    assert small is not None
    assert small.perceptual is None
    assert small.discriminator is not None
    assert small.discriminator.start_step == 1
    assert "stages.0.reconstruction.perceptual: runs/tower" in dropped_settings(config)
