"""The loader as a torch iterable with a state: it yields the batches of a run's loader."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data_pipeline import PackedBatches, open_loader
from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, StateError
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.sample import ImagePart


def _ids(batches: PackedBatches, count: int) -> list[list[int]]:
    return [batch.token_ids.tolist() for batch in itertools.islice(batches, count)]


def _origins(batches: list[MultimodalBatch]) -> list[tuple[str, int, int]]:
    """Return data set, epoch and sample of each document, sorted."""
    origins = [origin for batch in batches for origin in batch.provenance if origin is not None]
    return sorted((origin.dataset, origin.epoch, origin.index) for origin in origins)


def test_batches_equal_those_of_a_run(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    with Loader(mixture_config, hybrid_spec, seed=1, micro_lanes=5) as loader:
        expected = [next(loader).microbatches[0].token_ids.tolist() for _ in range(4)]
    assert _ids(open_loader(mixture_config.model_dump(), hybrid_spec, seed=1), 4) == expected


def test_states_of_two_ranks_go_on_as_one_or_as_three(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    def opened(world_size: int) -> list[PackedBatches]:
        ranks = range(world_size)
        return [open_loader(mixture_config, hybrid_spec, seed=1, rank=r, world_size=world_size) for r in ranks]

    whole = open_loader(mixture_config, hybrid_spec, seed=1)
    _ids(whole, 3)
    rest = [_origins([batch]) for batch in itertools.islice(whole, 2)]
    pair = opened(2)
    for rank in pair:
        _ids(rank, 3)
    states = [json.loads(json.dumps(rank.state_dict())) for rank in pair]
    for world_size in (1, 3):
        ranks = opened(world_size)
        for rank in ranks:
            rank.load_state_dict(states)
        iterators = [iter(rank) for rank in ranks]
        assert [_origins([next(iterator) for iterator in iterators]) for _ in range(2)] == rest


def test_a_state_is_of_its_rank_and_its_data(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    batches = open_loader(mixture_config, hybrid_spec, seed=1)
    assert batches.state_dict() == {}
    before = _ids(batches, 2)
    state = batches.state_dict()
    after = _ids(batches, 2)
    batches.load_state_dict(state)
    assert _ids(batches, 2) == after
    batches.load_state_dict({})
    assert _ids(batches, 2) == before
    with pytest.raises(StateError, match="changed since: seed"):
        open_loader(mixture_config, hybrid_spec, seed=2).load_state_dict(state)
    with pytest.raises(StateError, match="no loader state"):
        batches.load_state_dict({"lanes": 3})


def test_a_finite_mixture_ends(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    datasets = [dataset.model_dump() | {"max_epochs": 1} for dataset in mixture_config.datasets]
    finite = open_loader(mixture_config.model_dump() | {"datasets": datasets}, hybrid_spec, seed=1)
    assert sum(batch.num_samples for batch in finite) == 41 + 17 + 11
    assert list(finite) == [], "what is used up stays used up"


def test_what_cannot_work_is_said(mixture_config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"lanes: required, and missing.*packing"):
        open_loader({"tokenizer": {"kind": "sentencepiece", "path": "x"}, "datasets": []}, hybrid_spec, seed=1)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(DataConfigError, match=r"list\.yaml: expected a data block"):
        open_loader(tmp_path / "list.yaml", hybrid_spec, seed=1)
    wrapped = DataLoader(open_loader(mixture_config, hybrid_spec, seed=1), batch_size=None, num_workers=1)
    with pytest.raises(DataConfigError, match=r"set data\.workers"):
        next(iter(wrapped))


def test_a_yaml_file_of_a_run_is_enough(mixture_config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"data": mixture_config.model_dump(mode="json"), "seed": 5}))
    batch = next(iter(open_loader(path, hybrid_spec, seed=1)))
    assert batch.token_ids.dtype is torch.int64


_LEFT_OPEN = """
import sys
from pathlib import Path
from data_pipeline import open_loader
from data_pipeline.config import DataConfig
from data_pipeline.media_spec import MediaSpec, Placement

config = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())
batches = iter(open_loader(config, MediaSpec(Placement.HYBRID, patch_size=8, fixed_grid=(2, 2)), seed=1))
print(len(next(batches).token_ids) > 0)
"""


@pytest.mark.long
def test_a_script_may_end_in_the_middle_of_the_batches(mixture_config: DataConfig, tmp_path: Path) -> None:
    config = mixture_config.model_copy(update={"workers": 0})  # With workers this process runs no generator.
    (tmp_path / "data.json").write_text(config.model_dump_json())
    (tmp_path / "script.py").write_text(_LEFT_OPEN)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "data.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_batch_is_shown_by_its_shapes(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    batch = next(iter(open_loader(mixture_config, hybrid_spec, seed=1)))
    patches = len(batch.media["image"].values)
    assert repr(batch).startswith(f"MultimodalBatch({len(batch.token_ids)} tokens, {batch.num_samples} documents, ")
    assert f" crops of {patches:,} patches, loss weight " in repr(batch)
    shown = repr(batch.media["image"])
    assert shown.startswith(f"MediaBlock(values=<uint8 {tuple(batch.media['image'].values.shape)}>, ")
    assert "tensor(" not in shown
    assert len(shown) < 1500
    picture = ImagePart(bytes(1 << 20), "jpg", (3, 4))
    assert repr(picture) == "ImagePart(data=<1048576 bytes>, name='jpg', size=(3, 4))"
