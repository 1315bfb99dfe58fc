"""The loader: state, ranks, workers that die or receive signals, and bad samples that do not affect other lanes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.errors import (
    DataConfigError,
    DataPipelineError,
    ManifestError,
    SampleError,
    ShardError,
    StateError,
    TooManyFaultsError,
)
from data_pipeline.history.digest import step_digest
from data_pipeline.loader.loader import Loader, StepBatch, read_samples
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.state import LaneState, LoaderState
from tests.data_pipeline.conftest import Members, WriteSet, captioned


def _changed(config: DataConfig, **updates: object) -> DataConfig:
    return DataConfig.model_validate(config.model_dump() | updates)


def _steps(loader: Loader, count: int) -> list[StepBatch]:
    with loader:
        return list(itertools.islice(loader, count))


def _keys(steps: list[StepBatch]) -> list[tuple[str, int]]:
    """Return (lane, sample) of every document, without dummy documents."""
    return [
        (origin.dataset, origin.index)
        for step in steps
        for micro in step.microbatches
        for origin in micro.provenance
        if origin is not None
    ]


def _workers(loader: Loader) -> list[Any]:
    """Return the worker processes of a loader."""
    assert loader._workers is not None
    return list(loader._workers.processes)


MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def captions(write_set: WriteSet, mixture_config: DataConfig) -> MakeConfig:
    """Return a configuration over the given samples, with one document per pack."""

    def make(samples: list[Members], **updates: object) -> DataConfig:
        dataset = {"name": "only", "manifest": write_set("only", samples), "template": {"kind": "caption"}}
        packing = {"max_tokens": 90, "max_documents": 1}
        order = {"block_size": 2, "window_blocks": 2}
        return _changed(mixture_config, datasets=[dataset], lanes=2, packing=packing, order=order, **updates)

    return make


def test_one_epoch_holds_every_sample_once(captions: MakeConfig, hybrid_spec: MediaSpec) -> None:
    config = captions([captioned(i) for i in range(30)])
    steps = _steps(Loader(config, hybrid_spec, seed=1), 40)
    first = [
        origin.index
        for step in steps
        for micro in step.microbatches
        for origin in micro.provenance
        if origin is not None and origin.epoch == 0
    ]
    assert sorted(first) == list(range(30))


def test_steps_count_from_the_state(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    steps = _steps(Loader(mixture_config, hybrid_spec, seed=1), 3)
    assert [step.step for step in steps] == [0, 1, 2]
    resumed = next(Loader(mixture_config, hybrid_spec, seed=1, state=steps[1].state))
    assert resumed.step == 2
    assert resumed.state == steps[2].state
    assert resumed.num_samples == steps[2].num_samples > 0
    assert resumed.num_tokens == steps[2].num_tokens > 0


def test_ranks_without_a_lane_of_their_own_run_dummy_packs(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    ranks = [next(Loader(mixture_config, hybrid_spec, seed=1, rank=r, world_size=3)) for r in range(3)]
    assert [[micro.lanes for micro in rank.microbatches] for rank in ranks] == [
        [(0,), (3,)],
        [(1,), (4,)],
        [(2,), (-1,)],
    ]
    dummy = ranks[2].microbatches[1]
    assert dummy.weight == 0
    assert not dummy.valid.any()
    assert dummy.media["image"].grids


def test_every_microbatch_has_both_roles(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    text = mixture_config.datasets[1].model_copy(update={"weight": 20.0})
    config = _changed(mixture_config, datasets=[mixture_config.datasets[0], text])
    dummies = 0
    for step in _steps(Loader(config, hybrid_spec, seed=1), 12):
        for micro in step.microbatches:
            block = micro.media["image"]
            assert len(block.gather_index) > 0
            assert len(block.attended_index) > 0
            dummies += None in micro.provenance
    assert 0 < dummies < 60, "the mixture should give packs of text alone, and others"


def test_states_survive_json_and_merge_over_ranks(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    whole = _steps(Loader(mixture_config, hybrid_spec, seed=1), 4)[-1].state
    parts = [_steps(Loader(mixture_config, hybrid_spec, seed=1, rank=r, world_size=2), 4)[-1].state for r in range(2)]
    merged = LoaderState.merge([LoaderState.from_json(part.to_json()) for part in parts])
    assert merged == whole
    assert all(lane.waiting for lane in whole.lanes.values()), "look-ahead holds documents"
    with pytest.raises(StateError, match="two ranks hold lane 0"):
        LoaderState.merge([whole, parts[0]])
    with pytest.raises(StateError, match="lacks lane 1"):
        Loader(mixture_config, hybrid_spec, seed=1, state=parts[0])


def test_a_data_set_that_starts_after_the_end_of_another_is_drawn(
    mixture_config: DataConfig, hybrid_spec: MediaSpec
) -> None:
    captions, text = (dataset.model_dump() for dataset in mixture_config.datasets[:2])
    captions |= {"weight": 1.0, "max_epochs": 1}
    text["weight"] = [{"from_step": 6, "weight": 1.0}]
    config = _changed(mixture_config, datasets=[captions, text])
    steps = _steps(Loader(config, hybrid_spec, seed=1), 12)
    counts = [step.num_samples for step in steps]
    assert 0 in counts[:6], "the captions should end before the texts begin"
    assert all(counts[6:])
    for done in range(1, 11):
        resumed = _steps(Loader(config, hybrid_spec, seed=1, state=steps[done - 1].state), 12 - done)
        assert [step_digest(step.microbatches) for step in resumed] == [
            step_digest(step.microbatches) for step in steps[done:]
        ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"fingerprint": "", "step": 1, "lanes": {"x": []}}', '{"lanes": 3, "step": "y"}']
)
def test_damaged_states_are_refused(text: str) -> None:
    with pytest.raises(StateError):
        LoaderState.from_json(text)


@pytest.mark.parametrize("integers", [[], [1, 2, 3], [-1], [1, 0, 0, 0, 1.5], [1, 0, 0, 0, 0, 0, 0, 1]])
def test_damaged_lane_states_are_refused(integers: list) -> None:
    with pytest.raises(StateError):
        LaneState.from_integers(integers)


def test_a_state_of_another_order_names_what_changed(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    state = next(Loader(mixture_config, hybrid_spec, seed=1)).state
    changes = {
        "seed": (mixture_config, 2),
        "lanes": (_changed(mixture_config, lanes=6), 1),
        "packing": (_changed(mixture_config, packing={"max_tokens": 91}), 1),
        "datasets": (_changed(mixture_config, datasets=mixture_config.datasets[:2]), 1),
    }
    for name, (config, seed) in changes.items():
        with pytest.raises(StateError, match=rf"changed since: .*\b{name}"):
            Loader(config, hybrid_spec, seed=seed, state=state)
    same = _changed(mixture_config, workers=2, prefetch=7)
    Loader(same, hybrid_spec, seed=1, rank=1, world_size=4, state=state).close()


def test_more_ranks_than_lanes_are_refused(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    with pytest.raises(DataConfigError, match=r"6 ranks for data.lanes=5"):
        Loader(mixture_config, hybrid_spec, seed=1, rank=0, world_size=6)


def test_data_set_names_must_differ(mixture_config: DataConfig) -> None:
    twice = [mixture_config.datasets[0], mixture_config.datasets[0]]
    with pytest.raises(ValidationError, match="used more than once: captions"):
        _changed(mixture_config, datasets=twice)


@pytest.mark.fault
def test_a_skipped_sample_moves_no_other_lane_and_is_reported_once(
    captions: MakeConfig, hybrid_spec: MediaSpec
) -> None:
    samples = [captioned(i) for i in range(24)]
    good = _steps(Loader(captions(samples), hybrid_spec, seed=1), 10)
    samples[7] = samples[7] | {"png": samples[7]["png"][:100]}
    bad = _steps(Loader(captions(samples), hybrid_spec, seed=1), 10)

    def lane(steps: list[StepBatch], number: int) -> list[tuple[str, int]]:
        return _keys([step.__class__(**{**vars(step), "microbatches": (step.microbatches[number],)}) for step in steps])

    hit = 0 if ("only", 7) in lane(good, 0) else 1
    assert lane(bad, 1 - hit) == lane(good, 1 - hit)
    without = [key for key in lane(good, hit) if key[1] != 7]
    assert lane(bad, hit)[: len(without)] == without
    (skipped,) = [skip for step in bad for skip in step.skipped]
    assert (skipped.index, skipped.lane, skipped.key) == (7, hit, "000007")
    assert "damaged png" in skipped.reason


@pytest.mark.fault
def test_skips_are_not_reported_again_after_a_resume(captions: MakeConfig, hybrid_spec: MediaSpec) -> None:
    samples = [captioned(i) | ({"png": b"junk"} if i % 5 == 0 else {}) for i in range(24)]
    config = _changed(captions(samples), packing={"max_tokens": 90, "look_ahead": 3})
    whole = _steps(Loader(config, hybrid_spec, seed=1), 8)
    resumed = _steps(Loader(config, hybrid_spec, seed=1, state=whole[3].state), 4)
    assert [step.skipped for step in resumed] == [step.skipped for step in whole[4:]]
    assert any(step.skipped for step in whole)


@pytest.mark.fault
@pytest.mark.parametrize("workers", [0, 2])
def test_under_fail_a_bad_sample_ends_the_run_with_its_place(
    captions: MakeConfig, hybrid_spec: MediaSpec, workers: int
) -> None:
    samples = [captioned(i) for i in range(8)]
    samples[3] = samples[3] | {"png": b"junk"}
    config = captions(samples, faults={"on_error": "fail"}, workers=workers)
    with pytest.raises(SampleError, match=r"part-00000.tar/000003: no JPEG, PNG or WebP"):
        _steps(Loader(config, hybrid_spec, seed=1), 8)


@pytest.mark.fault
def test_too_many_bad_samples_in_a_row_end_the_run(captions: MakeConfig, hybrid_spec: MediaSpec) -> None:
    config = captions([captioned(i) | {"png": b"junk"} for i in range(8)], faults={"max_consecutive": 5})
    with pytest.raises(TooManyFaultsError, match="5 bad samples in a row"):
        next(Loader(config, hybrid_spec, seed=1))


@pytest.mark.fault
def test_a_flipped_bit_is_found_by_the_checksum(captions: MakeConfig, hybrid_spec: MediaSpec) -> None:
    config = captions([captioned(i) for i in range(4)], faults={"on_error": "fail"})
    (tar,) = Path(config.datasets[0].manifest).parent.glob("*.tar")
    times = tar.stat()
    content = bytearray(tar.read_bytes())
    content[content.index(b"\x89PNG") + 60] ^= 1
    tar.write_bytes(content)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))  # Bit rot does not change the modification time.
    with pytest.raises(SampleError, match="crc32"):
        _steps(Loader(config, hybrid_spec, seed=1), 4)


@pytest.mark.fault
def test_damaged_shards_end_the_run_even_under_skip(captions: MakeConfig, hybrid_spec: MediaSpec) -> None:
    config = captions([captioned(i) for i in range(4)])
    (tar,) = Path(config.datasets[0].manifest).parent.glob("*.tar")
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with pytest.raises(ManifestError, match="truncated"):
        next(Loader(config, hybrid_spec, seed=1))
    tar.unlink()
    with pytest.raises(ManifestError, match=str(tar)):
        next(Loader(config, hybrid_spec, seed=1))


@pytest.mark.fault
def test_a_shard_that_shrinks_while_it_is_open_is_named(captions: MakeConfig, hybrid_spec: MediaSpec) -> None:
    config = captions([captioned(i) for i in range(8)])
    loader = Loader(config, hybrid_spec, seed=1)
    next(loader)
    (tar,) = Path(config.datasets[0].manifest).parent.glob("*.tar")
    os.truncate(tar, 600)
    with pytest.raises(ShardError, match=r"part-00000.tar: ends at byte .* truncated"):
        _steps(loader, 8)


@pytest.mark.fault
def test_a_worker_that_is_killed_is_reported(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    loader = Loader(_changed(mixture_config, workers=2, prefetch=1), hybrid_spec, seed=1)
    next(loader)
    victim = _workers(loader)[0]
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    with pytest.raises(DataPipelineError, match=r"worker 0 exited without an error message \(signal 9"):
        _steps(loader, 20)
    with pytest.raises(DataPipelineError, match="closed"):
        next(loader)


@pytest.mark.fault
def test_signals_to_the_group_do_not_reach_workers(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    with Loader(_changed(mixture_config, workers=2, prefetch=1), hybrid_spec, seed=1) as loader:
        plain = Loader(mixture_config, hybrid_spec, seed=1)
        assert next(loader).state == next(plain).state
        for worker, number in itertools.product(_workers(loader), (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)):
            os.kill(worker.pid, number)
        for _ in range(4):  # More steps than were already prefetched.
            assert torch.equal(next(loader).microbatches[0].token_ids, next(plain).microbatches[0].token_ids)


@pytest.mark.fault
def test_a_process_that_ends_without_closing_its_loader_does_not_hang(
    mixture_config: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(_changed(mixture_config, workers=2).model_dump_json())
    program = (
        "import sys; from data_pipeline.config import DataConfig; from data_pipeline.loader.loader import Loader;"
        "from data_pipeline.media_spec import MediaSpec, Placement;"
        "spec = MediaSpec(Placement.HYBRID, patch_size=8, fixed_grid=(2, 2));"
        "loader = Loader(DataConfig.model_validate_json(open(sys.argv[1]).read()), spec, seed=1);"
        "next(loader); kept = loader._workers; raise SystemExit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "data.json")], timeout=120)
    assert ended.returncode == 3


def test_closing_stops_the_workers(mixture_config: DataConfig, hybrid_spec: MediaSpec) -> None:
    loader = Loader(_changed(mixture_config, workers=2), hybrid_spec, seed=1)
    next(loader)
    workers = _workers(loader)
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_samples_are_read_in_stored_order(write_set: WriteSet) -> None:
    manifest = write_set("stored", [captioned(i) for i in range(30)])
    samples = list(read_samples(manifest))
    assert [sample.provenance.index for sample in samples] == list(range(30))
    assert [sample.fields["name"] for sample in samples] == [f"thing {i}" for i in range(30)]
