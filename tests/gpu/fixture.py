"""The device of tests with the marker ``gpu``: a CUDA device, or with ``--rehearse-gpu`` the CPU with stand-ins.

Without a CUDA device such a test fails. The rehearsal proves the code of the tests, not a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse-gpu",
        action="store_true",
        help="run tests with the marker gpu on the CPU, with stand-ins of kernels",
    )


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device. In the rehearsal it is the CPU, and CUDA kernels are stand-ins that check their preconditions."""
    if not request.config.getoption("--rehearse-gpu"):
        if not torch.cuda.is_available():
            pytest.fail("tests with the marker gpu need a CUDA device, and torch sees none; --rehearse-gpu: on the CPU")
        yield torch.device("cuda", 0)
        return
    from tests.fake_cuda import contracts

    with contracts.installed():
        yield torch.device("cpu")
