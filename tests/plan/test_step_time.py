"""Step times: bytes against the counted formula of a benchmark, operations against those of real batches."""

from __future__ import annotations

import functools
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.expert_traffic import SHAPES, traffic
from data_pipeline.loader.loader import Loader
from mmscale.config import load
from mmscale.models.config import ModelConfig
from mmscale.models.flops import training_flops
from mmscale.optim.schedule import trained_components
from mmscale.plan.cluster import PRESETS, Cluster
from mmscale.plan.load import ExampleDocument, stage_load
from mmscale.plan.step_time import StepTime, _block_values, step_time
from mmscale.run.config import RunConfig
from tests.configs.files import model_of

REPO = Path(__file__).resolve().parents[2]
OLMOE, TOKENS = SHAPES[0], 4096


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@functools.cache
def olmoe(*overrides: str) -> RunConfig:
    words = [f"data.packing.max_tokens={TOKENS + 1}", "engine.live_parameter_elements=0", *overrides]
    return load(REPO / "configs/recipes/olmoe-1b-7b.yaml", words, RunConfig).value


def planned(config: RunConfig, nodes: int, **device: Any) -> StepTime:
    cluster = Cluster(nodes, 8, PRESETS["h100"]().model_copy(update=device))
    return step_time(config, 0, stage_load(config, 0, ExampleDocument(TOKENS)), cluster, "bf16")


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("recompute", [False, True])
def test_sent_bytes_are_those_that_real_steps_send(size: int, recompute: bool) -> None:
    """The formula of ``benchmarks.expert_traffic`` equals the collectives of real steps; that benchmark counts them."""
    lanes = 64
    config = olmoe(
        f"data.lanes={lanes}", f"engine.expert_parallel={size}", f"engine.activation_checkpointing={recompute}".lower()
    )
    expected = traffic(OLMOE, lanes, size, TOKENS, recompute=recompute).total
    assert planned(config, 8).sent_bytes == pytest.approx(expected, rel=1e-3)


def test_lower_stages_send_what_their_collectives_carry() -> None:
    """All-reduce sends each value twice in float32; stage 2 does so for every microbatch; one gather in bf16."""
    ranks, values = 64, OLMOE.values
    share = (ranks - 1) / ranks
    for stage, microbatches, expected in ((0, 4, 8), (1, 4, 8 + 2), (2, 4, 8 * 4 + 2), (2, 1, 8 + 2)):
        lanes = ranks * microbatches
        config = olmoe(f"data.lanes={lanes}", f"engine.zero_stage={stage}")
        found = planned(config, 8)
        assert found.microbatches == microbatches
        assert found.sent_bytes == pytest.approx(expected * values * share, rel=1e-3)


def test_operations_are_those_of_the_batches_of_the_loader() -> None:
    config = load(REPO / "configs/quickstart.yaml", ["data.workers=0"], RunConfig).value
    model, data = config.stage_model(0), config.stage_data(0)
    trained = trained_components(model.components, config.stages[0])
    with closing(Loader(data, config.stage_media(0), seed=config.seed)) as loader:
        steps = [next(iter(loader)) for _ in range(3)]
    counted = sum(training_flops(model, batch, trained).model for step in steps for batch in step.microbatches) / 3
    cluster = Cluster(1, 1, PRESETS["h100"]())
    found = step_time(config, 0, stage_load(config, 0), cluster, "bf16")
    assert found.model_flops == pytest.approx(counted, rel=1e-6)
    assert found.microbatches == math.ceil(data.lanes / config.engine.micro_lanes)


def test_a_step_hides_traffic_only_where_streams_exist_and_the_key_allows_it() -> None:
    slow = {"node_bandwidth": 1e9, "network_bandwidth": 1e9}
    config = olmoe("data.lanes=16")
    hidden, shown = (
        planned(config, 2, **slow),
        planned(olmoe("data.lanes=16", "engine.overlap_communication=false"), 2, **slow),
    )
    compute = hidden.products + hidden.attention + hidden.memory_bound
    assert hidden.traffic == shown.traffic == shown.exposed > compute
    assert hidden.exposed == pytest.approx(hidden.traffic - min(0.9 * hidden.traffic, compute))
    assert planned(config, 2, **slow, device="cpu").exposed == hidden.traffic


def test_host_time_adds_up_on_a_cpu_and_runs_ahead_on_cuda() -> None:
    config = olmoe("data.lanes=8")
    ahead, slow, cpu = (
        planned(config, 1),
        planned(config, 1, unit_seconds=10.0),
        planned(config, 1, unit_seconds=10.0, device="cpu", overlap=0.0),
    )
    assert ahead.seconds > ahead.host
    assert slow.seconds == slow.host == pytest.approx(18 * 10 + 5e-3)  # 16 blocks, embedding and head.
    assert cpu.seconds == pytest.approx(
        cpu.host + cpu.products + cpu.attention + cpu.memory_bound + cpu.traffic + cpu.optimizer
    )


def test_recomputation_repeats_the_forward_products_of_blocks() -> None:
    plain, again = (
        planned(olmoe("data.lanes=8"), 1),
        planned(olmoe("data.lanes=8", "engine.activation_checkpointing=false"), 1),
    )
    assert plain.model_flops == again.model_flops
    assert 1.2 < plain.products / again.products < 4 / 3
    assert plain.attention / again.attention == pytest.approx(4 / 3)


def test_blocks_of_an_audio_tower_move_their_rows() -> None:
    model = model_of(REPO / "configs/models/qwen2-audio-7b.yaml")
    assert isinstance(model, ModelConfig)
    found = [each for each in _block_values(model, frozenset({"audio"})) if each[0].startswith("audio.")]
    assert found == [("audio.tower_rows", 30 * 1280, True)] * 32
    # A clip of 10 s: 500 rows after the convolutions, 250 after the mean of pairs.
    counts = model.modalities["audio"].counts("audio", [(1002, 1, 1)])
    assert (counts["audio.tower_rows"], counts["audio.feature_patches"]) == (500, 250)
