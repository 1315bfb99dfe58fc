"""Compare every kernel of a model with a plain computation in float64: values and gradients.

A kernel that computes wrong values on a machine trains a wrong model without an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Segments
from mmscale.doctor.lines import Line
from mmscale.errors import UnsupportedError
from mmscale.nn.attention_backends import AttentionChoice, Backend, resolve_backend, varlen_attention
from mmscale.nn.block import Activation
from mmscale.nn.cross_entropy import linear_cross_entropy
from mmscale.nn.experts import Experts
from mmscale.nn.rms_norm import RmsNorm

Inputs = dict[str, Tensor]
_ROUNDINGS = 3
"""Largest difference, in roundings of the largest value: two products and a softmax stay below one."""
_DTYPES = (torch.bfloat16, torch.float16)
_LENGTHS = (1, 64, 33, 130)
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 64
_BACKENDS: tuple[AttentionChoice, ...] = ("sdpa", "torch_varlen", "flash")


def kernels(device: torch.device) -> Iterator[Line]:
    """Check all kernels that exist on a device, in bfloat16 and float16."""
    for dtype in _DTYPES:
        for choice in _BACKENDS:
            try:
                backend = resolve_backend(choice, dtype)
            except UnsupportedError:
                continue  # The line of the attention kernel says which exist.
            yield _compared(
                f"attention by {choice}",
                dtype,
                _attention_inputs(device),
                partial(_attention, backend=backend),
                _plain_attention,
            )
        yield _compared("experts", dtype, _expert_inputs(device), _experts, _plain_experts)
        yield _compared("head and loss", dtype, _head_inputs(device), _head, _plain_head)
        yield _compared("norm", dtype, _norm_inputs(device), _norm, _plain_norm)
    yield _fused_adamw(device)


def _compared(
    name: str,
    dtype: torch.dtype,
    inputs: Inputs,
    kernel: Callable[[Inputs], Tensor],
    plain: Callable[[Inputs], Tensor],
) -> Line:
    """Return the line of a kernel. ``inputs`` are float64; the kernel gets them rounded to ``dtype``."""
    title = f"{name} in {str(dtype).removeprefix('torch.')}"
    rounded = {key: value.to(dtype).requires_grad_() for key, value in inputs.items()}
    exact = {key: value.detach().double().requires_grad_() for key, value in rounded.items()}
    try:
        found = _with_gradients(kernel(rounded), rounded)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        return Line(title, "failure", f"it failed: {reason}", "reinstall the packages of this kernel for this device")
    worst = max(
        float((ours.double() - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(found, _with_gradients(plain(exact), exact), strict=True)
    )
    limit = _ROUNDINGS * torch.finfo(dtype).eps
    text = f"largest difference {worst:.1e} of the largest value, limit {limit:.1e}"
    if worst <= limit:  # False for NaN.
        return Line(title, "ok", text)
    return Line(title, "failure", text, "wrong values: choose another engine.attention or reinstall torch")


def _with_gradients(output: Tensor, inputs: Inputs) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(output, list(inputs.values()), grad.to(output.device, torch.bfloat16).to(output.dtype))
    return [output.detach(), *grads]


def _random(device: torch.device, **shapes: Sequence[int]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) for name, shape in shapes.items()
    }


def _attention_inputs(device: torch.device) -> Inputs:
    rows = sum(_LENGTHS)
    keys = (rows, _KV_HEADS, _HEAD_DIM)
    return _random(device, q=(rows, _HEADS, _HEAD_DIM), k=keys, v=keys)


def _attention(x: Inputs, backend: Backend) -> Tensor:
    segments = Segments.from_lengths(list(_LENGTHS))
    segments = Segments(segments.cu.to(x["q"].device), segments.bounds)
    return varlen_attention(x["q"], x["k"], x["v"], segments, segments, True, backend)


def _plain_attention(x: Inputs) -> Tensor:
    bounds = itertools.pairwise(itertools.accumulate(_LENGTHS, initial=0))
    outputs = []
    for start, stop in bounds:
        q, k, v = (x[name][start:stop].transpose(0, 1) for name in ("q", "k", "v"))
        k, v = (each.repeat_interleave(_HEADS // _KV_HEADS, 0) for each in (k, v))
        hidden = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(1, 2) / _HEAD_DIM**0.5).masked_fill(hidden, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


_COUNTS = (40, 0, 65, 23)
_DIM, _EXPERT_DIM = 64, 96


def _expert_inputs(device: torch.device) -> Inputs:
    num, rows = len(_COUNTS), sum(_COUNTS)
    inputs = _random(device, rows=(rows, _DIM), gate_up=(num, 2 * _EXPERT_DIM, _DIM), down=(num, _DIM, _EXPERT_DIM))
    return inputs | {"gate_up": inputs["gate_up"] / _DIM**0.5, "down": inputs["down"] / _EXPERT_DIM**0.5}


def _experts(x: Inputs) -> Tensor:
    with torch.device(x["rows"].device):
        module = Experts(_DIM, len(_COUNTS), 1, _EXPERT_DIM, Activation.SILU)
        counts = torch.tensor(_COUNTS)
    weights = {"gate_up_proj": x["gate_up"], "down_proj": x["down"]}
    arguments = (x["rows"], torch.ones_like(x["rows"][:, 0]), counts)
    output: Tensor = torch.func.functional_call(module, weights, arguments)
    return output


def _plain_experts(x: Inputs) -> Tensor:
    outputs = []
    for expert, rows in enumerate(x["rows"].split(_COUNTS)):
        gate, up = (rows @ x["gate_up"][expert].T).chunk(2, -1)
        outputs.append(F.silu(gate) * up @ x["down"][expert].T)
    return torch.cat(outputs)


_VOCABULARY = 301


def _head_inputs(device: torch.device) -> Inputs:
    inputs = _random(device, hidden=(70, _DIM), weight=(_VOCABULARY, _DIM))
    return inputs | {"weight": inputs["weight"] / _DIM**0.5}


def _labels(device: torch.device) -> Tensor:
    return (torch.arange(70, device=device) * 37) % _VOCABULARY


def _head(x: Inputs) -> Tensor:
    labels = _labels(x["hidden"].device)
    return linear_cross_entropy(x["hidden"], x["weight"], labels, torch.ones_like(labels, dtype=torch.float32))


def _plain_head(x: Inputs) -> Tensor:
    return F.cross_entropy(x["hidden"] @ x["weight"].T, _labels(x["hidden"].device), reduction="sum")


def _norm_inputs(device: torch.device) -> Inputs:
    return _random(device, x=(70, _DIM), weight=(_DIM,))


def _norm(x: Inputs) -> Tensor:
    with torch.device(x["x"].device):
        module = RmsNorm(_DIM, eps=1e-6)
    output: Tensor = torch.func.functional_call(module, {"weight": x["weight"]}, (x["x"],))
    return output


def _plain_norm(x: Inputs) -> Tensor:
    return x["weight"] * x["x"] * (x["x"].square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _fused_adamw(device: torch.device) -> Line:
    """Compare two steps of torch's fused AdamW with the formula."""
    values = _random(device, weight=(1000,), first=(1000,), second=(1000,))
    weight = values["weight"].float().requires_grad_()
    rate, betas, eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    optimizer = torch.optim.AdamW([weight], rate, betas, eps, decay, fused=True)
    expected = weight.detach().double()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for step, grad in enumerate((values["first"].float(), values["second"].float()), 1):
        weight.grad = grad
        optimizer.step()
        mean = betas[0] * mean + (1 - betas[0]) * grad.double()
        square = betas[1] * square + (1 - betas[1]) * grad.double().square()
        change = mean / (1 - betas[0] ** step) / ((square / (1 - betas[1] ** step)).sqrt() + eps)
        expected = expected * (1 - rate * decay) - rate * change
    worst = float((weight.detach().double() - expected).abs().max() / expected.abs().max())
    text = f"largest difference {worst:.1e} of the largest value, limit 1e-06"
    if worst <= 1e-6:
        return Line("fused AdamW in float32", "ok", text)
    return Line("fused AdamW in float32", "failure", text, "wrong values: reinstall torch for this device")
