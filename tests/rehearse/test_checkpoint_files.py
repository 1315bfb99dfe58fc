"""The rehearsed checkpoint: complete at every ZeRO stage, and read by few files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mmscale.checkpoint.manifest import rank_files
from mmscale.checkpoint.reshard import CheckpointReader
from mmscale.cli.run_file import load_run
from mmscale.rehearse.checkpoint_files import PART, ShardedModel, _world, rehearse_checkpoint
from mmscale.rehearse.report import Report
from mmscale.run.config import RunConfig

SMALL = ["model.decoder.num_layers=2", "model.vision.num_layers=1", "model.connector.every=2"]
EXPERTS = [*SMALL, "model.decoder.mlp={kind: moe, num_experts: 4, experts_per_token: 2, expert_dim: 64}"]


def load(*overrides: str) -> RunConfig:
    return load_run(Path("configs/quickstart.yaml"), [*SMALL, *overrides]).value


def brute_force(folder: Path, world_size: int, key: str, start: int, stop: int) -> set[tuple[int, int, int]]:
    found = set()
    for rank in range(world_size):
        entry = json.loads((folder / rank_files(rank)[1]).read_text())["tensors"].get(key)
        if entry and max(entry["start"], start) < min(entry["stop"], stop):
            found.add((entry["start"], entry["stop"], rank))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_ranks_save_every_value_once(stage: int) -> None:
    sharded = ShardedModel.build(load(f"engine.zero_stage={stage}"), 0, 10**6)
    covered: dict[str, list[tuple[int, int]]] = {}
    for rank in range(7):
        for name, start, stop in sharded.ranges(_world(rank, 7)):
            covered.setdefault(name, []).append((start, stop))
    for name, parameter in sharded.model.named_parameters():
        ranges = sorted(covered[name])
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == parameter.numel()


@pytest.mark.parametrize("experts", [False, True])
def test_a_resume_reads_the_metadata_of_few_ranks(tmp_path: Path, experts: bool) -> None:
    ranks = 24
    run = load(*(["engine.expert_parallel=2", *EXPERTS] if experts else []))
    report = Report()
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    rehearse_checkpoint(
        report, run, [ranks, 22, 1], folder, None, most_seconds=60, most_opens=1e6, advance=lambda: None
    )
    assert report.findings == []
    assert report.value(PART, "files of a checkpoint") == 2 * ranks + 1
    stored = sum((folder / rank_files(rank)[0]).stat().st_size for rank in range(ranks))
    headers = sum(
        8 + int.from_bytes((folder / rank_files(rank)[0]).open("rb").read(8), "little") for rank in range(ranks)
    )
    assert report.value(PART, "bytes of a checkpoint") == stored - headers
    sharded = ShardedModel.build(run, 0, 10**6)
    read = []
    for rank in (0, 9, 21):
        reader = CheckpointReader(folder, check_sizes=False, near=rank)
        for name, start, stop in sharded.ranges(_world(rank, 22)):
            found = reader.ranges(name, "master", start, stop)
            if name.endswith(("embed_tokens.weight", "experts.gate_up_proj")):
                assert set(found) == brute_force(folder, ranks, f"{name}|master", start, stop)
            assert sum(min(high, stop) - max(low, start) for low, high, _ in found) == stop - start
        read.append(reader.num_read)
    assert max(read) <= 8  # Ranks 0 and 1, and neighbours of this rank's share; otherwise all 24.


def test_a_range_that_no_rank_holds_is_missed_after_reading_all(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    rehearse_checkpoint(Report(), load(), [4, 1], folder, None, most_seconds=60, most_opens=1e6, advance=lambda: None)
    reader = CheckpointReader(folder)
    name = next(iter(reader.manifest.parameters))
    size = math.prod(reader.manifest.parameters[name].shape)
    assert reader.ranges(name, "exp_avg", size - 1, size + 1)[-1][1] == size
    assert reader.num_read == 4
    assert not reader.holds(name, "ema")
