"""The stand-ins of CUDA kernels refuse what the kernels refuse, and a model computes the same through them."""

from __future__ import annotations

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
