"""Plans: what limits a run, the smallest cluster, and the keys that would help, against planning again by hand."""

from __future__ import annotations

import functools
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.plan.checkpoints import Failures
from mmscale.plan.cluster import PRESETS, Cluster
from mmscale.plan.load import ExampleDocument, stage_load
from mmscale.plan.memory import memory_of_rank
from mmscale.plan.plan import Assumptions, Plan, make_plan
from mmscale.run.config import RunConfig

REPO = Path(__file__).resolve().parents[2]
TINY = "tests/system/tiny.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@functools.cache
def run(*words: str) -> RunConfig:
    return load(REPO / TINY, list(words), RunConfig).value


def gpus(nodes: int, per_node: int, memory: int = 80 << 30) -> Cluster:
    return Cluster(nodes, per_node, PRESETS["h100"]().model_copy(update={"memory_bytes": memory}))


def needed_bytes(config: RunConfig, ranks: int) -> int:
    """Return the memory of a rank, with what torch's allocator does not count."""
    found = memory_of_rank(config, 0, ranks, device="cuda")
    return found.peak_bytes + found.overhead_bytes


@functools.cache
def tiny_plan() -> Plan:
    return make_plan(run(), gpus(1, 2))


def test_the_program_adds_up_stages_failures_and_saves() -> None:
    plan = tiny_plan()
    (stage,) = plan.stages
    assert stage.steps == 360
    seconds = 360 * stage.time.seconds / plan.checkpoint.goodput
    assert plan.days == pytest.approx(seconds / 86_400)
    assert plan.gpu_hours == pytest.approx(2 * seconds / 3600)
    assert plan.tokens_per_second == pytest.approx(4 * stage.load.tokens / stage.time.seconds)
    assert plan.cost is None
    assert make_plan(run("max_steps=10"), gpus(1, 2)).stages[0].steps == 10


def test_json_has_the_promised_keys() -> None:
    found = tiny_plan().to_json()
    assert {"memory", "step_seconds", "tokens_per_second", "days", "gpu_hours", "checkpoint", "storage"} < set(found)
    assert found["memory"]["per_rank_bytes"] == sum(found["memory"]["parts"].values())
    assert {"bytes", "every_steps"} < set(found["checkpoint"])
    assert found["fits"] is True
    assert found["limits"] == []
    # Samples of a step times their mean size in the shards.
    shards = list(Path("examples/emoji/shards").glob("train-quick-*.tar"))
    samples = 0
    for shard in shards:
        with tarfile.open(shard) as opened:
            samples += sum(name.endswith(".json") for name in opened.getnames())
    size = sum(shard.stat().st_size for shard in shards) / samples
    expected = found["stages"][0]["step_samples"] * size / found["step_seconds"]
    assert found["storage"]["bytes_per_second"] == pytest.approx(expected)


def test_each_limit_names_its_number() -> None:
    needed = needed_bytes(run(), 2)
    for words, cluster, expected in (
        ((), gpus(1, 2, memory=needed // 2), "and h100 has"),
        ((), gpus(1, 8), "data.lanes=4 is below the number of ranks, 8"),
        (("engine.timeout_seconds=1e-6",), gpus(1, 1), "the watchdog ends the run after"),
    ):
        plan = make_plan(run(*words), cluster)
        assert not plan.fits
        assert any(expected in limit for limit in plan.limits), plan.limits


def test_the_smallest_cluster_is_the_first_that_holds_the_memory() -> None:
    config = run("data.lanes=64")
    needed = {ranks: needed_bytes(config, ranks) for ranks in (1, 2, 4, 8)}
    assert needed[1] > needed[2] > needed[4]
    plan = make_plan(config, gpus(1, 8, memory=(needed[2] + needed[4]) // 2))
    assert plan.smallest is not None
    assert plan.smallest.ranks == min(n for n, size in needed.items() if size <= (needed[2] + needed[4]) // 2)
    assert make_plan(config, gpus(1, 8, memory=1000)).smallest is None


def test_a_proposed_key_has_the_effect_that_is_promised() -> None:
    plan = tiny_plan()
    assert plan.knobs, "more lanes in a microbatch take fewer passes"
    assert len({knob.change.partition("=")[0] for knob in plan.knobs}) == len(plan.knobs) <= 2
    for knob in plan.knobs:
        changed = make_plan(run(knob.change), gpus(1, 2))
        assert changed.tokens_per_second / plan.tokens_per_second == pytest.approx(knob.speedup)
        assert changed.largest.rank_bytes == knob.per_rank_bytes


def test_a_run_that_does_not_fit_is_told_what_saves_memory() -> None:
    plan = make_plan(run(), gpus(1, 2, memory=needed_bytes(run(), 2) - 1))
    assert not plan.fits
    assert all(knob.fits or knob.per_rank_bytes < plan.largest.rank_bytes for knob in plan.knobs)


def test_failures_and_storage_are_assumptions() -> None:
    seldom = tiny_plan().checkpoint
    often = make_plan(run(), gpus(1, 2), Assumptions(failures=Failures(gpu_hours=0.5))).checkpoint
    assert often.every_steps < seldom.every_steps
    assert often.goodput < seldom.goodput
    slow = make_plan(run(), gpus(1, 2), Assumptions(write_bandwidth=1e3)).checkpoint
    assert slow.every_steps * tiny_plan().stages[0].time.seconds == pytest.approx(slow.bytes / 1e3, rel=0.1)


def test_a_device_without_a_peak_for_the_format_is_an_error() -> None:
    device = PRESETS["h100"]().model_copy(update={"peak_flops": {"fp32": 1e12}})
    with pytest.raises(ConfigError, match=r"engine\.precision=bf16: h100 has no peak_flops for bf16, only for fp32"):
        make_plan(run("engine.precision=bf16"), replace(gpus(1, 1), accelerator=device))


def test_an_assumed_pack_has_the_sizes_of_a_packed_one() -> None:
    """Assume the mean document of the replayed packs: counts that grow linearly are equal."""
    config = run("data.packing.max_documents=null")
    measured = stage_load(config, 0)
    text = round(measured.counts[0]["token_rows"] / measured.samples) - 1
    assumed = stage_load(config, 0, ExampleDocument(text, 32, 32))
    for name in ("token_rows", "patches", "tower_rows", "tower_pairs", "attended_rows"):
        assert assumed.counts[0][name] == pytest.approx(measured.counts[0][name], rel=0.15), name
    assert (measured.measured, assumed.measured) == (True, False)
    assert assumed.sample_bytes == measured.sample_bytes


def test_an_image_that_the_transforms_reject_is_named() -> None:
    with pytest.raises(ConfigError, match="data set emoji, image of 1x0: "):
        stage_load(run(), 0, ExampleDocument(4, 0, 1))
