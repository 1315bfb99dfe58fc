"""A user's pipelines and stages: one order for any ranks and workers, resumes, errors, kinds of content."""

from __future__ import annotations

import importlib
import io
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, FaultKind, PipelineError, SampleError, ShardError, TooManyFaultsError
from data_pipeline.history.digest import digest
from data_pipeline.history.sample_log import LogRow
from data_pipeline.history.sample_lookup import SampleCatalog
from data_pipeline.loader import user_pipeline
from data_pipeline.loader.loader import Loader
from data_pipeline.loader.user_code import members_of
from data_pipeline.loader.user_pipeline import PipelineSet
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.state import Cursor

STEPS = range(8)
_NUMBERS = itertools.count()

SHUFFLED = """
import random
import webdataset as wds

def train(epoch):
    dataset = wds.WebDataset({shards!r}, shardshuffle=False)
    return dataset.decode("pil").shuffle(8, rng=random.Random(epoch))
"""
FIXED = """
import webdataset as wds

train = wds.WebDataset({shards!r}, shardshuffle=2, detshuffle=True, seed=5).decode("rgb8").shuffle(5, seed=3)
"""
OF_A_LANE = """
import webdataset as wds

def train(lane, num_lanes, epoch):
    for number, sample in enumerate(wds.WebDataset({shards!r}, shardshuffle=False)):
        if (number + epoch) % num_lanes == lane:
            yield sample
"""
SPLIT = """
import webdataset as wds

train = [
    wds.SimpleShardList({shards!r}),
    wds.split_by_node,
    wds.split_by_worker,
    wds.tarfile_to_samples(),
    wds.decode("torchrgb8"),
]
"""
RECORDS = """
import numpy as np

class Records:
    def __iter__(self):
        for number in range(23):
            pixels = np.full((9, 7), number, np.uint8)
            yield {{"__key__": f"r{{number}}", "png": pixels, "json": {{"captions": [f"record {{number}}"]}}}}

train = Records()
"""

WriteModule = Callable[[str], str]
Configured = Callable[..., DataConfig]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    """Write an importable module, and return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> str:
        name = f"user_module_{next(_NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        return name

    return write


@pytest.fixture
def configured(mixture_config: DataConfig, write_module: WriteModule) -> Configured:
    """Return a configuration whose captions come from ``train`` in ``code``; ``{shards!r}`` is replaced by their
    shards."""

    def configure(code: str, data: dict[str, Any] | None = None, **dataset: Any) -> DataConfig:
        raw = mixture_config.model_dump(mode="json")
        shards = sorted(map(str, Path(raw["datasets"][0]["manifest"]).parent.glob("*.tar")))
        module = write_module(code.format(shards=shards))
        dataset = dataset or {"pipeline": f"{module}:train"}
        dataset = {key: value(module, shards) if callable(value) else value for key, value in dataset.items()}
        raw["datasets"] = [raw["datasets"][0] | {"manifest": None} | dataset, raw["datasets"][1]]
        return DataConfig.model_validate(raw | {"lanes": 3} | (data or {}))

    return configure


def _opened(config: DataConfig) -> PipelineSet:
    return PipelineSet.open(config.datasets[0], 1, RunFaults(config.faults), None)


@pytest.mark.parametrize("code", [SHUFFLED, FIXED, OF_A_LANE, SPLIT, RECORDS])
def test_digests_are_equal_over_ranks_workers_and_resumes(
    code: str, configured: Configured, hybrid_spec: MediaSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(code)
    plain = list(digest(config, hybrid_spec, 1, STEPS))
    assert len({checksum for _, checksum in plain}) == len(STEPS)
    for world_size, workers, resume_at, other in ((2, 0, 3, 1), (1, 2, 5, 2), (2, 2, 1, 3)):
        monkeypatch.setenv("RANK", "1")  # As in a rank of a run; webdataset's own splits use it.
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        assert list(digest(config, hybrid_spec, 1, STEPS, world_size, workers, resume_at, other)) == plain


def test_a_resume_at_each_step_gives_the_same_steps(configured: Configured, hybrid_spec: MediaSpec) -> None:
    config = configured(SHUFFLED)
    plain = list(digest(config, hybrid_spec, 1, STEPS))
    for resume_at in STEPS[1:]:
        assert list(digest(config, hybrid_spec, 1, STEPS, 1, 0, resume_at, 1)) == plain


@pytest.mark.parametrize("code", [SHUFFLED, FIXED, OF_A_LANE, SPLIT])
def test_over_all_lanes_each_sample_comes_once_an_epoch(code: str, configured: Configured) -> None:
    shared = _opened(configured(code))
    seen: Counter[tuple[int, str]] = Counter()
    for lane in range(3):
        source, cursor = shared.lane(lane, 3), Cursor()
        while True:
            place, cursor = source.resolve(cursor)
            if place.epoch == 3:
                break
            seen[place.epoch, source.read(place.sample, place.epoch).provenance.key] += 1
    assert seen == Counter({(epoch, f"{number:06d}"): 1 for epoch in range(3) for number in range(41)})


def _lanes_in_turn(shared: PipelineSet) -> list[list[str]]:
    """Return the keys of lanes that advance at different speeds, each in the order of its cursor."""
    lanes = [(shared.lane(lane, 3), [Cursor()], list[str]()) for lane in range(3)]
    for turn in range(60):
        source, at, keys = lanes[min(2, turn % 6)]
        place, at[0] = source.resolve(at[0])
        keys.append(source.read(place.sample, place.epoch).provenance.key)
    return [keys for *_, keys in lanes]


def test_lanes_share_a_pass_and_a_slow_lane_reads_for_itself(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(SHUFFLED)
    plain = _lanes_in_turn(_opened(config))
    passes = list[int]()
    entries = PipelineSet.entries
    monkeypatch.setattr(PipelineSet, "entries", lambda self, at: passes.append(at.epoch) or entries(self, at))
    assert _lanes_in_turn(_opened(config)) == plain
    assert sorted(passes) == sorted(set(passes))
    passes.clear()
    monkeypatch.setattr(user_pipeline, "_MAX_KEPT", 4)
    assert _lanes_in_turn(_opened(config)) == plain
    assert len(passes) > len(set(passes))


def test_a_resume_with_waiting_documents_reads_the_pipeline_once(
    configured: Configured, hybrid_spec: MediaSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(RECORDS)
    with Loader(config, hybrid_spec, seed=1) as loader:
        state = [next(loader) for _ in range(4)][-1].state
    passes = list[int]()
    entries = PipelineSet.entries
    monkeypatch.setattr(PipelineSet, "entries", lambda self, at: passes.append(at.epoch) or entries(self, at))
    with Loader(config, hybrid_spec, seed=1, state=state) as loader:
        next(loader)
    assert passes
    assert len(passes) == len(set(passes))


def test_stages_follow_our_own_reading_of_shards(configured: Configured, hybrid_spec: MediaSpec) -> None:
    code = """
import webdataset as wds

def shout(sample):
    sample["json"] = {{"captions": [sample["json"]["name"].upper()]}}
    return sample

both = [wds.decode(only=["json"]), wds.map(shout)]
odd = wds.select(lambda sample: int(sample["__key__"]) % 2)
"""
    names = lambda module, shards: [f"{module}:both", f"{module}:odd"]  # noqa: E731
    config = configured(code, shards=lambda module, shards: shards, stages=names, template={"kind": "caption"})
    plain = list(digest(config, hybrid_spec, 1, STEPS))
    for world_size, workers, resume_at, other in ((2, 0, 3, 1), (2, 2, 5, 3)):
        assert list(digest(config, hybrid_spec, 1, STEPS, world_size, workers, resume_at, other)) == plain
    with Loader(config, hybrid_spec, seed=1) as loader:
        origins = [
            origin
            for step in itertools.islice(loader, 8)
            for micro in step.microbatches
            for origin in micro.provenance
            if origin is not None and origin.dataset == "captions"
        ]
    keys = {origin.key for origin in origins if origin.epoch == 0}
    assert keys <= {f"{number:06d}" for number in range(1, 41, 2)}
    assert len(keys) > 10
    assert all(Path(origin.shard).exists() for origin in origins)


FRAGILE = """
import webdataset as wds

def fragile(sample):
    if sample["__key__"].endswith("7"):
        raise KeyError("no such thing")
    return sample

train = wds.WebDataset({shards!r}, shardshuffle=False).map(fragile)
"""


def test_an_error_of_one_sample_goes_through_the_fault_policy(configured: Configured, hybrid_spec: MediaSpec) -> None:
    config = configured(FRAGILE)
    with Loader(config, hybrid_spec, seed=1) as loader:
        skipped = [skip for step in itertools.islice(loader, 8) for skip in step.skipped]
    assert {skip.key for skip in skipped} == {"000007", "000017", "000027", "000037"}
    assert {(skip.dataset, skip.kind) for skip in skipped} == {("captions", FaultKind.UNEXPECTED)}
    assert skipped[0].reason == "KeyError: 'no such thing'"
    assert skipped[0].shard.endswith(".tar")
    plain = list(digest(config, hybrid_spec, 1, STEPS))
    assert list(digest(config, hybrid_spec, 1, STEPS, 2, 2, 3, 1)) == plain
    failing = configured(FRAGILE, {"faults": {"unexpected": "fail"}})
    with pytest.raises(SampleError, match="no such thing"), Loader(failing, hybrid_spec, seed=1) as loader:
        [next(loader) for _ in STEPS]


def test_a_handler_of_the_users_own_is_left_alone(configured: Configured, hybrid_spec: MediaSpec) -> None:
    config = configured(FRAGILE.replace("map(fragile)", "map(fragile, handler=wds.ignore_and_continue)"))
    with Loader(config, hybrid_spec, seed=1) as loader:
        assert not [skip for step in itertools.islice(loader, 8) for skip in step.skipped]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def train():\n for number in range(99):\n  yield {{'__key__': str(number), 'txt': 'hi', "
            "'json': {{'captions': ['a'], 'n': 5 // (12 - number)}}}}\n",
            r"set captions: the pipeline \w+:train failed after sample '11' \(number 11 of epoch 0\): ZeroDivision",
        ),
        ("def train():\n yield 1, 2\n", "a sample is a tuple, expected a dict"),
        ("def train():\n raise OSError('no bucket')\n", "failed before its first sample: OSError: no bucket"),
        ("def train():\n yield {{'__key__': 'a', 'txt': 'hi'}}\n", "gives lane [12] no sample in epoch 0"),
    ],
    ids=["raises", "tuple", "factory", "few"],
)
def test_an_error_of_the_pipeline_stops_the_run(
    code: str, said: str, workers: int, configured: Configured, hybrid_spec: MediaSpec
) -> None:
    config = configured(code, {"workers": workers})
    with pytest.raises((PipelineError, DataConfigError), match=said), Loader(config, hybrid_spec, seed=1) as loader:
        [next(loader) for _ in range(20)]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_like_it\n", "cannot import .*:train: ModuleNotFoundError"),
        ("other = 1\n", "cannot import .*:train: AttributeError"),
        ("train = iter([])\n", "which can be read only once; name a function"),
        ("train = 5\n", "is a int; expected a webdataset pipeline"),
        (
            "import webdataset as wds\ntrain = wds.DataPipeline([{{}}], wds.map(print, note=(i for i in [])))\n",
            "cannot be copied for each lane and epoch",
        ),
    ],
    ids=["module", "attribute", "iterator", "number", "uncopied"],
)
def test_code_that_cannot_be_used_is_refused(
    code: str, said: str, configured: Configured, hybrid_spec: MediaSpec
) -> None:
    with pytest.raises(DataConfigError, match=said), Loader(configured(code), hybrid_spec, seed=1) as loader:
        next(loader)


def test_a_damaged_shard_before_stages_is_a_fault_of_the_shard(configured: Configured, hybrid_spec: MediaSpec) -> None:
    code = "import webdataset as wds\nstage = wds.decode(only=['json'])\n"
    own = {"shards": lambda module, shards: shards, "stages": lambda module, shards: [f"{module}:stage"]}
    config = configured(code, **own)
    shard = Path(config.datasets[0].shards[1])
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(ShardError, match=r"truncated|damaged"), Loader(config, hybrid_spec, seed=1) as loader:
        [next(loader) for _ in STEPS]
    skipping = config.model_validate(config.model_dump() | {"faults": {"shard": "skip", "max_share": 0.9}})
    with Loader(skipping, hybrid_spec, seed=1) as loader:
        skipped = [skip for step in itertools.islice(loader, 8) for skip in step.skipped]
    assert {(skip.kind, skip.shard) for skip in skipped} == {(FaultKind.SHARD, str(shard))}


def test_content_of_a_wrong_kind_is_a_bad_sample_and_many_end_the_run(
    configured: Configured, hybrid_spec: MediaSpec
) -> None:
    code = "train = [{{'__key__': f'k{{i}}', 'png': 5, 'json': {{'captions': ['a']}}}} for i in range(50)]\n"
    said = "a int cannot be stored as PNG"
    with pytest.raises(TooManyFaultsError, match=said), Loader(configured(code), hybrid_spec, seed=1) as loader:
        [next(loader) for _ in range(99)]


def test_decoded_images_keep_their_pixels() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    values = (
        Image.fromarray(pixels),
        pixels,
        pixels.astype(np.float32) / 255,
        torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        torch.from_numpy(pixels.transpose(2, 0, 1) / 255),
    )
    for value in values:
        encoded = members_of({"__key__": "a", "0.JPG": value, "cls": 3})
        assert list(encoded) == ["0.jpg"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded["0.jpg"]))), pixels)
    assert members_of({"txt": "é", "json": {"a": [1]}, "png": b"x"}) == {
        "txt": "é".encode(),
        "json": b'{"a": [1]}',
        "png": b"x",
    }
    for wrong in ({"png": pixels.astype(np.int64)}, {"png": pixels * 2.0}, {"txt": 5}, {"json": {1, 2}}):
        with pytest.raises(SampleError):
            members_of(wrong)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"pipeline": "a:b", "shards": ["a.tar"]}, "either a manifest or shards or a pipeline"),
        ({"stages": ["a:b"]}, "either a manifest or shards or a pipeline"),
        ({"manifest": "a.manifest", "stages": ["a:b"]}, "stages need shards or a pipeline"),
        ({"pipeline": "a:b", "repeats": 1}, "repeats needs a manifest"),
        ({"pipeline": "a.b"}, "pattern"),
    ],
)
def test_sources_that_exclude_each_other(dataset: dict[str, Any], said: str, mixture_config: DataConfig) -> None:
    raw = mixture_config.model_dump(mode="json")
    with pytest.raises(ValueError, match=said):
        DataConfig.model_validate(raw | {"datasets": [{"name": "a", **dataset}]})


def test_a_trace_names_samples_and_imports_no_code(configured: Configured, hybrid_spec: MediaSpec) -> None:
    config = configured(RECORDS)
    path = config.datasets[0].pipeline
    assert path is not None
    samples = SampleCatalog(config, hybrid_spec, 1)
    assert samples.where("captions", 5) == (path, "#5")
    for dataset in ("captions", "text"):
        shown = samples.describe(LogRow(0, 0, 0, dataset, 0, 5, 0, 7, None))
        assert (
            "not shown: `data trace` runs no Python code, and the data set captions needs its own code" in shown.notes
        )
    assert path.partition(":")[0] not in sys.modules
    samples.close()


def test_an_exclusion_list_is_refused(configured: Configured, hybrid_spec: MediaSpec, tmp_path: Path) -> None:
    named = tmp_path / "list.jsonl"
    named.write_text('{"dataset": "captions", "index": 3, "key": "000003"}\n')
    config = configured(RECORDS, {"faults": {"exclude": [str(named)]}})
    with pytest.raises(DataConfigError, match="names samples by number"), Loader(config, hybrid_spec, seed=1) as loader:
        next(loader)
