"""The stand-ins of CUDA kernels refuse what the kernels refuse, and a model computes the same through them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from data_pipeline.batch import Segments
from mmscale.nn.attention_backends import varlen_attention
from tests.fake_cuda import contracts
from tests.fake_cuda.contracts import ContractError, flash_attn_varlen_func, varlen_attn

LENGTHS = [3, 0, 5]


def call(**changes: Any) -> torch.Tensor:
    """Call the stand-in with right arguments but for ``changes``."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 4, 16, generator=generator).bfloat16()
    k, v = (torch.randn(8, 2, 16, generator=generator).bfloat16() for _ in range(2))
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    arguments |= {"max_seqlen_q": 5, "max_seqlen_k": 5, "causal": True} | changes
    return flash_attn_varlen_func(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(8, 4, 16)}, "q is torch.float32"),
        ({"k": torch.zeros(8, 2, 16, dtype=torch.float16)}, "k differs from q"),
        ({"q": torch.zeros(8, 4, 12, dtype=torch.bfloat16)}, "head size|aligned|another head size"),
        ({"q": torch.zeros(8, 16, 4, dtype=torch.bfloat16).transpose(1, 2)}, "stride 4"),
        ({"q": torch.zeros(8, 3, 16, dtype=torch.bfloat16)}, "2 key heads do not divide 3"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 3, 8])}, "int64, not int32"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 3, 8], dtype=torch.int32)}, "goes from 1 to 8"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 3, 7], dtype=torch.int32)}, "goes from 0 to 7"),
        ({"cu_seqlens_q": torch.tensor([0, 9, 3, 8], dtype=torch.int32)}, "decreases"),
        ({"max_seqlen_q": 4}, "max_seqlen_q=4, but the longest is 5"),
        ({"max_seqlen_k": torch.tensor(5)}, "not an int on the host"),
        ({"cu_seqlens_q": torch.tensor([0, 8], dtype=torch.int32), "max_seqlen_q": 8}, "different numbers of segments"),
    ],
)
def test_a_broken_precondition_is_refused(changes: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ContractError, match=message):
        call(**changes)


def test_fewer_key_heads_need_enable_gqa() -> None:
    q, k = torch.zeros(8, 4, 16).bfloat16(), torch.zeros(8, 2, 16).bfloat16()
    cu = torch.tensor([0, 8], dtype=torch.int32)
    varlen_attn(q, k, k, cu, cu, 8, 8, enable_gqa=True)
    with pytest.raises(ContractError, match="enable_gqa"):
        varlen_attn(q, k, k, cu, cu, 8, 8)


@pytest.mark.parametrize("backend", ["flash", "torch_varlen"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_call_of_each_kernel_equals_sdpa(backend: Any, causal: bool) -> None:
    """Through the stand-ins, with gradients: keys of another length than queries, segments without keys, GQA."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = Segments.from_lengths(LENGTHS), Segments.from_lengths([3, 0, 9] if causal else [4, 2, 0])
    shapes = ((queries.total, 4, 16), (keys.total, 2, 16), (keys.total, 2, 16))
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator).bfloat16()
    results = []
    with contracts.installed():
        for kernel in (backend, "sdpa"):
            out = varlen_attention(*inputs, queries, keys, causal, kernel)
            results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for through, expected in zip(*results, strict=True):
        torch.testing.assert_close(through, expected, atol=2e-2, rtol=2e-2)  # bfloat16 has 8 bits.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mat_a": torch.zeros(8, 16)}, "mat_a is torch.float32, not bfloat16"),
        ({"mat_a": torch.zeros(8, 12).bfloat16()}, "mat_a has stride 12: no multiple of 16 bytes"),
        ({"mat_a": torch.zeros(8, 1).bfloat16().expand(8, 16)}, "no matrix"),
        ({"offs": torch.tensor([3, 8])}, "offs is torch.int64"),
        ({"offs": torch.tensor([3, 9], dtype=torch.int32)}, "groups end at"),
        ({"offs": torch.tensor([9, 8], dtype=torch.int32)}, "groups end at"),
        ({"offs": torch.tensor([8], dtype=torch.int32)}, "1 ends for 2 groups"),
        ({"mat_b": torch.zeros(2, 24, 8).bfloat16()}, "16 columns times 24 rows"),
    ],
)
def test_grouped_mm_refuses(changes: dict[str, Any], message: str) -> None:
    ends = torch.tensor([3, 8], dtype=torch.int32)
    right = {"mat_a": torch.zeros(8, 16).bfloat16(), "mat_b": torch.zeros(2, 16, 8).bfloat16(), "offs": ends}
    contracts.grouped_mm(**right)
    with pytest.raises(ContractError, match=message):
        contracts.grouped_mm(**{**right, **changes})


def test_the_stand_in_of_fused_adamw_equals_torch_and_refuses_other_strides_and_dtypes() -> None:
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(3, 6, 4, generator=generator)
    found = []
    for stands_in in (True, False):
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.AdamW([weight], 0.1, (0.9, 0.95), 1e-8, 0.1, fused=True)
        with contracts.installed() if stands_in else nullcontext():
            for grad in grads:
                weight.grad = grad.clone()
                optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[1])
    state = optimizer.state[weight]
    mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0, "eps": 1e-8}
    strided = grads[0].T.contiguous().T
    for grad, count, message in (
        (strided, step, "gradient has strides"),
        (grads[0].bfloat16(), step, "gradient is torch.bfloat16"),
        (grads[0], step.long(), "a step count is torch.int64"),
    ):
        lists = ([start], [grad], [mean], [square], [], [count])
        with pytest.raises(ContractError, match=message):
            contracts.fused_adamw(*lists, **numbers, amsgrad=False, maximize=False)
