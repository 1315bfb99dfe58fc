"""Join a run with the variables of each launcher, and choose a precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmscale.dist import (
    World,
    _is_one_machine,
    _map_launcher_variables,
    _own_gpu,
    all_reduce_sum,
    all_reduce_sum_list,
    lowest_rank_error,
)
from mmscale.engine.config import EngineConfig
from mmscale.engine.ds_config import deepspeed_config
from mmscale.engine.partition import shard_range
from mmscale.engine.precision import Precision, choose_precision, cpu_flags
from mmscale.errors import LaunchError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
CPU = torch.device("cpu")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace ``os.environ`` by a dictionary without variables of a launcher."""
    stand_in: dict[str, str] = {}
    monkeypatch.setattr("mmscale.dist.os.environ", stand_in)
    return stand_in


def test_without_a_launcher_the_run_is_this_process(environment: dict[str, str]) -> None:
    assert not _map_launcher_variables()
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")


def test_slurm_variables_are_mapped_inside_a_step_only(environment: dict[str, str]) -> None:
    environment.update(SLURM, MASTER_ADDR="10.0.0.1")
    assert _map_launcher_variables()
    assert [environment[name] for name in VARIABLES] == ["3", "4", "1", "10.0.0.1", "20077"]


def test_ranks_of_one_slurm_node_meet_on_loopback(environment: dict[str, str]) -> None:
    environment.update(SLURM, SLURM_STEP_NUM_NODES="1", MASTER_ADDR="10.0.0.1")
    assert _map_launcher_variables()
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert _is_one_machine()


@pytest.mark.parametrize(
    ("variables", "one"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, False),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, True),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}, False),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1"}, True),
    ],
)
def test_which_variables_mean_one_machine(environment: dict[str, str], variables: dict[str, str], one: bool) -> None:
    environment.update(variables)
    assert _is_one_machine() is one


def test_a_batch_script_is_no_step(environment: dict[str, str]) -> None:
    environment.update(SLURM_NTASKS="4", SLURM_PROCID="0")
    assert not _map_launcher_variables()
    assert environment["WORLD_SIZE"] == "1"


def test_several_nodes_need_an_address(environment: dict[str, str]) -> None:
    environment.update(SLURM, SLURM_STEP_NUM_NODES="2")
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        _map_launcher_variables()


def test_mpi_on_one_machine_needs_no_address(environment: dict[str, str]) -> None:
    ranks = {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    environment.update({f"OMPI_COMM_WORLD_{name}": value for name, value in ranks.items()})
    assert _map_launcher_variables()
    assert [environment[name] for name in VARIABLES] == ["1", "2", "1", "127.0.0.1", "29500"]
    assert _is_one_machine()


def test_mpi_on_several_machines_needs_an_address(environment: dict[str, str]) -> None:
    environment.update(PMI_RANK="1", PMI_SIZE="4", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
    with pytest.raises(LaunchError, match="rank 1 of 4 by MPI, but MASTER_ADDR is not set"):
        _map_launcher_variables()
    environment["MASTER_ADDR"] = "10.0.0.1"
    assert _map_launcher_variables()
    assert [environment[name] for name in VARIABLES] == ["1", "4", "1", "10.0.0.1", "29500"]
    assert not _is_one_machine()


def test_the_deepspeed_launcher_on_one_machine(environment: dict[str, str]) -> None:
    environment.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_SIZE="2", CROSS_SIZE="1")
    environment.update(MASTER_ADDR="node1", MASTER_PORT="29501")
    assert _map_launcher_variables()
    assert environment["MASTER_PORT"] == "29501"
    assert _is_one_machine()


def test_a_second_call_in_the_same_process_finds_the_same_rank(environment: dict[str, str]) -> None:
    environment.update(SLURM, MASTER_ADDR="10.0.0.1")
    first = _map_launcher_variables(), dict(environment)
    assert (_map_launcher_variables(), environment) == first


@pytest.mark.parametrize(("visible", "number"), [(8, 3), (4, 3), (1, 0)])
def test_the_gpu_of_a_rank(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, visible: int, number: int
) -> None:
    """``srun --gpus-per-task=1`` shows each rank its own GPU as number 0. DeepSpeed reads the number in LOCAL_RANK."""
    environment.update(SLURM, LOCAL_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert _own_gpu(3, 3) == torch.device("cuda", number)
    assert environment["LOCAL_RANK"] == environment["OMPI_COMM_WORLD_LOCAL_RANK"] == str(number)


def test_more_ranks_than_gpus_are_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="rank 5 is number 2 on its machine, where it sees 2 GPUs"):
        _own_gpu(5, 2)


def test_half_a_launcher_is_refused(environment: dict[str, str]) -> None:
    environment.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    with pytest.raises(LaunchError, match="MASTER_PORT"):
        _map_launcher_variables()


def test_words_of_a_lonely_rank() -> None:
    alone = World(0, 1, 0, CPU)
    assert all_reduce_sum_list(alone, [1, 2.5]) == [1.0, 2.5]
    assert all_reduce_sum(alone, {"b": 1, "a": 2.5}) == {"b": 1.0, "a": 2.5}
    assert lowest_rank_error(alone, None) is None
    assert lowest_rank_error(alone, "full") == "full"


@pytest.mark.parametrize(
    ("asked", "flags", "chosen", "word"),
    [
        ("auto", {"avx2"}, "fp32", "neither"),
        ("auto", {"avx512_bf16"}, "bf16", "avx512_bf16"),
        ("auto", {"amx_bf16"}, "bf16", "amx_bf16"),
        ("fp32", {"amx_bf16"}, "fp32", "as configured"),
        ("bf16", {"avx2"}, "bf16", "emulated"),
    ],
)
def test_precision_asks_the_processor(asked: str, flags: set[str], chosen: str, word: str) -> None:
    precision = choose_precision(EngineConfig(precision=asked), CPU, frozenset(flags))  # type: ignore[arg-type]
    assert precision.name == chosen
    assert word in precision.reason


def test_flags_come_from_cpuinfo(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: X\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert cpu_flags(file) == {"fpu", "avx2", "avx512_bf16"}
    assert cpu_flags(tmp_path / "none") == frozenset()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_somebody_clips_exactly_once(stage: int, name: str) -> None:
    from mmscale.engine.ds_config import optimizer_clips

    config = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
    precision = Precision(name, "")
    dictionary = deepspeed_config(config, precision, clip=0.7, device_type="cpu")
    assert (dictionary["gradient_clipping"] == 0.7) is not optimizer_clips(config, precision)
    assert dictionary["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("stage", [1, 2])
def test_only_stage_3_gathers_weights_one_by_one(stage: int) -> None:
    with pytest.raises(ValueError, match="gather_bucket_elements=0 needs zero_stage=3"):
        EngineConfig(zero_stage=stage, gather_bucket_elements=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("numel", [1, 2, 3, 10, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_shares_tile_a_parameter(numel: int, world_size: int) -> None:
    values = [i for rank in range(world_size) for i in range(*shard_range(numel, rank, world_size))]
    assert values == list(range(numel))
