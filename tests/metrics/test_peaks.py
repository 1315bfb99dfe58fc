from __future__ import annotations

import pytest
import torch

from mmscale.metrics.peaks import peak_of, published

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_devices_are_known_by_the_names_torch_gives_them(name: str, teraflops: float) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert published(name, dtype).flops == pytest.approx(1e12 * teraflops)


@pytest.mark.parametrize(
    "name", ["NVIDIA A10G", "NVIDIA H100X", "NVIDIA L40", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X"]
)
def test_an_unknown_device_has_no_peak_and_the_reason_says_what_to_do(name: str) -> None:
    peak = published(name, torch.bfloat16)
    assert peak.flops is None
    assert name in peak.source
    assert "metrics.peak_flops" in peak.source


def test_float32_is_measured_against_what_computes_it() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, teraflops in (("highest", 19.5), ("high", 156)):
            torch.set_float32_matmul_precision(precision)
            assert published("NVIDIA A100-SXM4-80GB", torch.float32).flops == pytest.approx(1e12 * teraflops)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_is_measured_once_and_the_configuration_wins() -> None:
    peak = peak_of(CPU, torch.float32)
    assert peak.flops is not None
    assert 1e8 < peak.flops < 1e14
    assert peak_of(CPU, torch.float32) is peak
    assert "measured here" in peak.source
    assert peak_of(CPU, torch.float32, 5e12).flops == 5e12
