"""The predicted memory of a rank: against allocators, against a real pass, and against sums made by hand."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch

from benchmarks.plan_memory import count_all_threads, measure_rank, peaks, run_config
from mmscale.dist import World
from mmscale.engine.graph import LossGraph
from mmscale.models.build import build_model, build_weights
from mmscale.objectives.next_token import NextToken
from mmscale.plan.batch import largest_batch
from mmscale.plan.live_bytes import LiveBytes
from mmscale.plan.load import ExampleDocument
from mmscale.plan.memory import RankMemory, memory_of_rank
from mmscale.plan.trace import trace
from mmscale.run.config import RunConfig
from mmscale.run.session import open_loader
from tests.engine.ranks import run_ranks

MIB = 2**20


def config(model: str = "dense", zero_stage: int = 0, **changes: Any) -> RunConfig:
    small = {"precision": "fp32", "max_tokens": 128, "width": 64, "layers": 2}
    return run_config(model, zero_stage, **(small | changes))


def changed(run: RunConfig, **blocks: Any) -> RunConfig:
    return RunConfig.model_validate(run.model_dump() | blocks)


def peak_in(run: RunConfig, ranks: int = 1) -> RankMemory:
    return memory_of_rank(run, 0, ranks, device="cpu")


def count(run: RunConfig, *components: str) -> int:
    parts = build_weights(run.model).components()
    return sum(p.numel() for name in components or parts for p in parts[name])


def test_live_bytes_of_known_tensors() -> None:
    with LiveBytes() as counter:
        first = torch.zeros(MIB, dtype=torch.float32)
        view = first[10:].view(-1)
        second = torch.ones(MIB, dtype=torch.uint8) + 1  # Two tensors of 1 MiB at once.
        assert (counter.live, counter.peak) == (5 * MIB, 6 * MIB)
        del first
        assert counter.live == 5 * MIB  # The view keeps the storage.
        del view, second
        assert counter.live == 0


def test_the_profilers_counter_of_known_tensors() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = torch.empty(MIB, dtype=torch.uint8)
        marks = [(time.time_ns(), "forward")]
        passing = torch.empty(3 * MIB, dtype=torch.uint8)
        del passing
        marks.append((time.time_ns(), "backward"))
        other = torch.empty(2 * MIB, dtype=torch.uint8)
        marks.append((time.time_ns(), "end"))
    measured = peaks(profile, marks)
    assert (measured.before, measured.phases) == (MIB, {"forward": 4 * MIB, "backward": 3 * MIB})
    del kept, other


def test_the_counter_sees_a_release_in_another_thread() -> None:
    count_all_threads()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        message = [torch.empty(MIB, dtype=torch.uint8)]
        thread = threading.Thread(target=message.clear)
        thread.start()
        thread.join()
        marks = [(time.time_ns(), "forward")]
        other = torch.empty(2 * MIB, dtype=torch.uint8)
    assert peaks(profile, marks).phases == {"forward": 2 * MIB}
    del other


@pytest.mark.parametrize(
    ("model", "checkpointing"),
    [
        ("moe", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("dense", False), ("dense", True), ("moe", False), ("vlm", False), ("vlm", True)]
        ),
    ],
)
def test_a_pass_on_meta_allocates_what_a_real_pass_does(model: str, checkpointing: bool) -> None:
    run = config(model, max_tokens=256, layers=6)
    with open_loader(run) as loader:
        batch = next(iter(loader)).microbatches[0]
    real = LossGraph(build_model(run.model), NextToken())
    undo = [] if not checkpointing else [recompute(real)]
    real(batch)  # Fills the caches of kernel plans and dropout tables.
    with LiveBytes() as counter:
        counter.ignore(list(real.parameters()))
        loss = real(batch)[0]
        forward = counter.peak
        counter.restart()
        loss.backward()
    for each in undo:
        each()
    with_meta = LossGraph(build_weights(run.model), NextToken(world=Meta()))
    events = trace(with_meta, batch.to("meta"), device="cpu", checkpointing=checkpointing)
    assert max(each.live for each in events if not each.backward) == pytest.approx(forward, rel=0.1)
    # The real pass keeps the gradients, which the trace leaves to the formulas of ZeRO.
    learned = 4 * count(run)
    assert max(each.live for each in events if each.backward) <= counter.peak
    assert counter.peak <= max(each.live for each in events if each.backward) + learned
    assert sum(each.kind == "gradient" for each in events) == len(list(real.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("model", "device"), [("dense", "cpu"), ("moe", "cuda"), ("vlm", "cpu")])
def test_repeated_blocks_allocate_what_each_of_them_does(model: str, device: str, checkpointing: bool) -> None:
    run = config(model, layers=4)
    batch = largest_batch(run.data, run.stage_media(0), 1, 0, ExampleDocument(16, 32, 32))
    every, repeated = (
        trace(
            LossGraph(build_weights(run.model), NextToken(world=Meta())),
            batch,
            device=device,
            checkpointing=checkpointing,
            repeated=least,
        )
        for least in (100, 1)
    )
    assert [(e.kind, e.name, e.backward) for e in repeated] == [(e.kind, e.name, e.backward) for e in every]
    for backward in (False, True):
        peaks = [max(e.live for e in events if e.backward is backward) for events in (every, repeated)]
        assert peaks[1] == pytest.approx(peaks[0], rel=0.005)


def recompute(graph: LossGraph) -> Any:
    from mmscale.engine.graph import recompute as recompute_units

    return recompute_units(list(graph.model.checkpoint_units()))  # type: ignore[operator]


class Meta:
    """One rank on the meta device."""

    rank, device = 0, torch.device("meta")

    def gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [rows]


def test_states_equal_the_papers_sums() -> None:
    """Section 3 of arXiv:1910.02054: 2 N, 2 N and 12 N bytes in 16 bits, of which the stages divide parts by W."""
    ranks = 4
    for zero_stage, weights, optimizer in (
        (0, 2, 12),
        (1, 2, 12 / ranks),
        (2, 2, 12 / ranks),
        (3, 2 / ranks, 12 / ranks),
    ):
        run = config("moe", zero_stage, precision="bf16")
        values = count(run)
        found = peak_in(run, ranks).parts
        assert found["parameters"] == pytest.approx(weights * values, rel=1e-3)
        assert found["optimizer"] == pytest.approx(optimizer * values, rel=1e-3)


def test_frozen_components_have_weights_alone() -> None:
    run = config("vlm", 2)
    frozen = changed(run, stages=[{"name": "align", "steps": 10, "train": ["connector"]}])
    found = peak_in(frozen, 2).parts
    learned = count(run, "connector")
    assert found["parameters"] == 4 * count(run)
    assert found["optimizer"] == pytest.approx(12 * learned / 2, rel=1e-3)
    assert found["activations"] < peak_in(run, 2).parts["activations"]


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_value"),
    [({"kind": "adamw", "state_bits": 8}, 4 + 2 * (1 + 4 / 256)), ({"kind": "adamw"}, 12)],
)
def test_state_of_adamw(optimizer: dict[str, Any], bytes_a_value: float) -> None:
    run = changed(config("dense", 3), stages=[{"name": "all", "steps": 10, "optimizer": optimizer}])
    assert peak_in(run, 2).parts["optimizer"] == pytest.approx(bytes_a_value * count(run) / 2, rel=1e-3)


def test_state_of_adafactor_and_muon() -> None:
    model = build_weights(config().model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    values = sum(shape.numel() for shape in shapes.values())
    linear = sum(s.numel() for n, s in shapes.items() if len(s) == 2 and "embed" not in n and not n.startswith("head"))
    factored = sum(s[0] + s[1] if len(s) == 2 else s[0] for s in shapes.values())
    for kind, expected in (
        ("adafactor", 4 * values + 4 * factored),
        ("muon", 4 * values + 4 * linear + 8 * (values - linear)),
    ):
        run = changed(config("dense", 1), stages=[{"name": "all", "steps": 10, "optimizer": {"kind": kind}}])
        assert peak_in(run).parts["optimizer"] == pytest.approx(expected, rel=1e-3)


def test_checkpointing_keeps_one_input_a_block() -> None:
    found = peak_in(config("dense", 0, layers=6))
    assert found.activations_with_checkpointing < found.activations_without_checkpointing / 2
    assert peak_in(config("dense", 0, layers=6, checkpointing=True)).peak_bytes < found.peak_bytes


def test_expert_parallel_divides_the_experts_state_no_further() -> None:
    """A slice of experts has W / size shards, so a rank's share of the experts is the same for every size."""
    one, two = (peak_in(config("moe", 3, expert_parallel=size), 4).parts for size in (1, 2))
    assert two["parameters"] == pytest.approx(one["parameters"], rel=1e-3)
    assert two["optimizer"] == pytest.approx(one["optimizer"], rel=1e-3)
    assert two["gathered"] <= one["gathered"]


def test_more_live_weights_are_gathered() -> None:
    none, all_of_them = (
        peak_in(config("dense", 3, layers=6, live_parameter_elements=live), 2).parts["gathered"] for live in (0, 10**9)
    )
    run = config(layers=6)
    assert all_of_them == pytest.approx(4 * count(run), rel=0.01)
    assert none < all_of_them / 2


def test_offload_moves_the_state_to_the_host() -> None:
    here, there = (peak_in(config("dense", 3, offload=kind), 2) for kind in ("none", "optimizer"))
    assert "optimizer" not in there.parts
    assert there.host_bytes - here.host_bytes == pytest.approx(16 * count(config()) / 2, rel=1e-3)


def measured_peaks(world: World, runs: list[tuple[str, int]], tokens: int) -> list[list[float]]:
    """Return measured and predicted peak of each (model, ZeRO stage); a program of ``run_ranks``."""
    found = []
    for model, zero_stage in runs:
        run = run_config(model, zero_stage, "fp32", max_tokens=tokens)
        predicted = memory_of_rank(run, 0, world.world_size).peak_bytes
        found.append([float(measure_rank(run, world).peak), float(predicted)])
    return found


def check(results: list[list[list[float]]]) -> None:
    for per_run in zip(*results, strict=True):
        measured = max(pair[0] for pair in per_run)
        assert measured > 50 * MIB  # Large enough that fixed costs do not decide.
        assert math.isclose(per_run[0][1], measured, rel_tol=0.1), (per_run[0][1] / MIB, measured / MIB)


def test_a_real_step_needs_what_is_predicted() -> None:
    runs = [["dense", 3]]
    check(run_ranks("tests.plan.test_memory:measured_peaks", 1, {"runs": runs, "tokens": 256}, timeout=300))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "runs"), [(1, [["dense", 0]]), (2, [["dense", 3], ["moe", 2], ["vlm", 3]])])
def test_more_real_steps_need_what_is_predicted(ranks: int, runs: list[list[Any]]) -> None:
    check(run_ranks("tests.plan.test_memory:measured_peaks", ranks, {"runs": runs, "tokens": 512}, timeout=600))
