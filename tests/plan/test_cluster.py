"""Machines of a plan: presets, files, and the time of messages by their path."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.errors import ConfigError
from mmscale.plan.cluster import PRESETS, Cluster, calibrated_file, read_cluster, write_accelerator

FREE = {"link_share": 1.0, "node_latency_seconds": 0.0, "network_latency_seconds": 0.0}


def cluster(nodes: int, per_node: int, **changes: float) -> Cluster:
    return Cluster(nodes, per_node, PRESETS["h100"]().model_copy(update={**FREE, **changes}))


@pytest.mark.parametrize(
    ("nodes", "per_node", "members", "stride", "bandwidth"),
    [
        (1, 8, 8, 1, 450e9),  # NVLink.
        (4, 8, 32, 1, 400e9),  # Eight cards of 50 GB/s carry a ring over nodes.
        (4, 2, 8, 1, 100e9),
        (4, 8, 4, 8, 50e9),  # One member on each node has one card.
        (4, 8, 16, 2, 200e9),
        (1, 8, 4, 2, 450e9),
        (32, 1, 32, 1, 50e9),
    ],
)
def test_a_ring_is_as_fast_as_its_slowest_part(
    nodes: int, per_node: int, members: int, stride: int, bandwidth: float
) -> None:
    """Walk the ring by hand: the cards of a node's members carry what leaves the node."""
    found = cluster(nodes, per_node)
    assert found.collective_seconds(1e9, 0, members, stride) == pytest.approx(1e9 / bandwidth)
    node = [index * stride // per_node for index in range(members)]
    on_first = node.count(0)
    # All rings run at once: together, the members of the ``stride`` groups on a node use each card once.
    assert bandwidth == (450e9 if on_first == members else min(450e9, 50e9 * on_first))


def test_an_exchange_beyond_a_node_uses_one_card_of_each_device() -> None:
    inside, across = cluster(2, 8).exchange_seconds(1e9, 0, 8), cluster(2, 8).exchange_seconds(1e9, 0, 16)
    assert inside == pytest.approx(1e9 / 450e9)
    # 8 of the 15 others are on the other node.
    assert across == pytest.approx(1e9 * (7 / 15 / 450e9 + 8 / 15 / 50e9))


def test_one_rank_sends_nothing() -> None:
    assert cluster(1, 1).collective_seconds(1e9, 100, 1) == 0.0


def test_a_written_device_is_read_again(tmp_path: Path) -> None:
    device = PRESETS["a100"]().model_copy(update={"name": "mine", "price_per_hour": 2.5})
    write_accelerator(tmp_path / "machine.yaml", device)
    assert read_cluster(str(tmp_path / "machine.yaml"), 2, 4).accelerator == device
    assert read_cluster(str(tmp_path / "machine.yaml"), 2, 4, price=3).accelerator.price_per_hour == 3


def test_this_machine_is_its_calibration_for_the_same_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cuda-2\.yaml does not exist; write it with `mmscale plan CONFIG --calib"):
        read_cluster("cuda", 1, 2)
    device = PRESETS["a100"]().model_copy(update={"name": "measured"})
    for kind in ("cpu", "cuda"):
        write_accelerator(calibrated_file(kind, 2), device)
        assert read_cluster(kind, 1, 2).accelerator.name == "measured"
    assert read_cluster("cuda", 1, 2).accelerator == device
    assert read_cluster("cpu", 1, 1).accelerator.name == "cpu"
    # The memory of a host depends on what else runs there now.
    assert read_cluster("cpu", 1, 2).accelerator.memory_bytes != device.memory_bytes


def test_presets_have_the_vendors_values() -> None:
    """Datasheets: dense bf16 operations, bytes per second of memory and NVLink, GB of memory."""
    for name, flops, memory, nvlink, size in (
        ("a100", 312e12, 2.039e12, 300e9, 80e9),
        ("h100", 989.5e12, 3.35e12, 450e9, 80e9),
        ("h200", 989.5e12, 4.8e12, 450e9, 141e9),
        ("b200", 2250e12, 8e12, 900e9, 180e9),
    ):
        device = PRESETS[name]()
        assert device.peak_flops["bf16"] == flops
        assert (device.memory_bandwidth, device.node_bandwidth) == pytest.approx((memory, nvlink))
        assert 0.95 * size < device.memory_bytes < 1.1 * size


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ("h1000", "no such preset; write one of a100, b200, h100, h200, cpu, cuda, or the path of a YAML file"),
        ("absent.yaml", "absent.yaml"),
    ],
)
def test_an_unknown_device_is_an_error_with_a_remedy(gpu: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_cluster(gpu, 1, 8)


def test_a_wrong_key_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    write_accelerator(path, PRESETS["h100"]())
    path.write_text(path.read_text().replace("memory_share:", "memory_shares:"))
    with pytest.raises(ConfigError, match=r"machine\.yaml:\d+ memory_shares"):
        read_cluster(str(path), 1, 8)
