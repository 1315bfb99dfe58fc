"""Peak memory and time of the chunked loss compared with torch's and Hugging Face's, at V = 131072.

    python -m benchmarks.loss_memory --json

Memory is the growth of a process's peak resident size from the inputs to the gradients. Each value comes from a fresh
process, so that memory cached by the allocator does not hide growth.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.report import Case, main
from mmscale.nn.cross_entropy import linear_cross_entropy

ROWS, DIM, VOCAB = 2048, 64, 131072
PEERS = ("torch", "hugging face", "checkpointed chunks")


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")


def hugging_face(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Loss of transformers' causal models: logits of all rows in float32."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = hidden @ weight.t()
    return ForCausalLMLoss(logits, None, weight.shape[0], torch.tensor(1.0), shift_labels=labels)


def checkpointed_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Chunks of 128 rows whose logits are recomputed in the backward pass."""
    parts = zip(hidden.split(128), labels.split(128), strict=True)
    return torch.stack([checkpoint(torch_loss, h, weight, y, use_reentrant=False) for h, y in parts]).sum()


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, torch.ones(len(labels)))


LOSSES = {"ours": ours, "torch": torch_loss, "hugging face": hugging_face, "checkpointed chunks": checkpointed_chunks}
"""Losses by name; each returns the sum over the rows."""


def _peak_mib() -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure_here(name: str) -> tuple[float, float]:
    """Return (MiB, seconds) of one loss and its gradients, measured in this process."""
    loss = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, DIM, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    small = [t.detach()[:8].clone().requires_grad_() for t in (hidden, weight)]
    loss(small[0], small[1], labels[:8] % 8).backward()  # Load kernels outside the measurement.
    before, start = _peak_mib(), time.perf_counter()
    loss(hidden, weight, labels).backward()
    seconds = time.perf_counter() - start
    return _peak_mib() - before, seconds


def measure() -> list[Case]:
    """Return the cases; each value comes from a separate process."""
    figures = {}
    for name in ("ours", *PEERS):
        command = [sys.executable, "-m", "benchmarks.loss_memory", "--one", name]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        figures[name] = (float(words[0]), float(words[1]))
    sizes = f"{ROWS} rows x {DIM} channels x {VOCAB} tokens, float32, forward and backward"
    return [
        Case(f"{what}, {sizes}", figures["ours"][i], {name: figures[name][i] for name in PEERS}, unit)
        for i, (what, unit) in enumerate((("peak memory", "MiB"), ("time", "s")))
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(*_measure_here(sys.argv[2]))
    else:
        main("loss_memory", measure)
