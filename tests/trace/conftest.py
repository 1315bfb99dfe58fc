"""Fixtures of the lookup tests: a run of two stages with a sample log, and the batches that its loaders yielded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.loader.loader import Loader, StepBatch
from mmscale.config import dump, load
from mmscale.metrics.sample_log import StepRecorder
from mmscale.metrics.step_counts import document_stats
from mmscale.optim.stages import StageConfig
from mmscale.run.config import RunConfig
from tests.data_pipeline.conftest import (  # noqa: F401 - fixtures
    captioned,
    mixture,
    picture,
    set_writer,
    tokenizer_path,
    write_set,
)

TINY = Path(__file__).parents[1] / "system/tiny.yaml"
FIRST, SECOND = 14, 60
"""Number of steps of each stage; the second stage has its own loader."""
WRITTEN = 50
"""Number of logged steps."""
EVERY = 4


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> DataConfig:  # noqa: F811
    """Four data sets, one damaged and one with two epochs; long texts are split; packing looks ahead.

    All tests read the same files. A test that changes them takes ``copied``.
    """
    write = set_writer(tmp_path_factory.mktemp("data"))
    mixed = mixture(write, tokenizer_path)
    damaged = [{**captioned(i), "png": b"junk" if i % 6 == 0 else picture(i)} for i in range(37)]
    long = [{"txt": ("word " * (9 + 7 * (i % 5))).encode()} for i in range(15)]
    captions, text, _ = mixed.datasets
    extra = [
        captions.model_copy(update={"name": "damaged", "manifest": write("damaged", damaged), "weight": 1.5}),
        text.model_copy(update={"name": "long", "manifest": write("long", long), "max_epochs": 2}),
    ]
    packing = mixed.packing.model_copy(update={"too_long": "split", "max_tokens": 110, "max_cost": None})
    return mixed.model_copy(update={"datasets": (captions, text, *extra), "lanes": 3, "packing": packing})


def copied(data: DataConfig, folder: Path) -> DataConfig:
    """Copy each data set to ``folder/NAME``."""
    datasets = []
    for one in data.datasets:
        manifest = Path(one.indexed)
        shutil.copytree(manifest.parent, folder / one.name)
        datasets.append(one.model_copy(update={"manifest": folder / one.name / manifest.name}))
    return data.model_copy(update={"datasets": tuple(datasets)})


def sound(data: DataConfig) -> DataConfig:
    """The mixture without damaged images, which a replay of future steps cannot find."""
    return data.model_copy(update={"datasets": tuple(d for d in data.datasets if d.name != "damaged")})


@pytest.fixture(scope="session")
def shared_config(data: DataConfig) -> RunConfig:
    """A run of two stages, the second with larger packs."""
    stages = (
        StageConfig(name="first", steps=FIRST),
        StageConfig(name="second", steps=SECOND, data={"packing": {"max_tokens": 150}}),
    )
    return load(TINY, [], RunConfig).value.model_copy(update={"data": data, "stages": stages})


@pytest.fixture
def config(shared_config: RunConfig, tmp_path: Path) -> RunConfig:
    """The same with a run folder of its own."""
    return shared_config.model_copy(update={"run_dir": tmp_path / "run"})


def play(config: RunConfig, steps: int | None = None) -> list[tuple[int, StepBatch]]:
    """Return (stage, batch) of each step, or of the first ``steps``, as ``train`` makes them on one rank."""
    found: list[tuple[int, StepBatch]] = []
    for number, stage in enumerate(config.stages):
        wanted = stage.steps if steps is None else min(stage.steps, steps - len(found))
        with Loader(config.stage_data(number), config.media_spec, seed=config.seed) as loader:
            found += [(number, next(loader)) for _ in range(wanted)]
    return found


def write(config: RunConfig, steps: list[tuple[int, StepBatch]], every: int = EVERY) -> Path:
    """Write a run folder with a sample log of the given steps."""
    run = config.run_dir
    (run / "sample_log").mkdir(parents=True)
    (run / "config.yaml").write_text(dump(config))
    recorder = StepRecorder(0, 0)
    for number, (stage, batch) in enumerate(steps, 1):
        if stage != recorder.stage:
            recorder = StepRecorder(number - 1, stage)
        losses = [[1.0] * micro.segments.num for micro in batch.microbatches]
        recorder.add(batch, document_stats(batch, losses))
        last_of_stage = number < len(steps) and steps[number][0] != stage
        if recorder.num_steps == every or last_of_stage:
            segment = recorder.pop_segment()
            (run / "sample_log" / segment.name()).write_bytes(segment.to_bytes())
    return run


@pytest.fixture(scope="session")
def steps(shared_config: RunConfig) -> list[tuple[int, StepBatch]]:
    return play(shared_config)


@pytest.fixture(scope="session")
def sound_steps(shared_config: RunConfig) -> list[tuple[int, StepBatch]]:
    return play(shared_config.model_copy(update={"data": sound(shared_config.data)}))


@pytest.fixture
def run(config: RunConfig, steps: list[tuple[int, StepBatch]]) -> Path:
    return write(config, steps[:WRITTEN])


def truth(batch: StepBatch) -> list[tuple[str, int, int, str, str]]:
    """Return the provenance of a batch's documents, in the order of lanes."""
    return [
        (origin.dataset, origin.epoch, origin.index, origin.shard, origin.key)
        for micro in batch.microbatches
        for origin in micro.provenance
        if origin is not None
    ]
