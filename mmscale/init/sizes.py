"""Choose batch, packs, ZeRO stage and steps so that a run fits this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.tokenizer import Tokenizer
from mmscale.errors import ConfigError
from mmscale.init.machine import GIB, Machine
from mmscale.init.memory import MemoryModel

_NUM_MEASURED = 256
_USABLE = 0.8
"""Share of the free memory that a run may use: the estimate has errors, and other programs grow."""
_PACK_TOKENS = {"cpu": 4096, "cuda": 8192}
"""Packs of more tokens are no faster."""
_LEAST_LANES = 4
"""Packs of a step, so that the same file also trains on up to this many ranks."""
_GPU_BYTES = 80 * GIB
_MOST_GPUS = 4096


@dataclass(frozen=True)
class DocumentSizes:
    """Sizes of the documents of a data set, measured on at most 256 samples.

    Attributes:
        mean_tokens, longest_tokens: Tokens in the decoder.
        mean_patches, most_patches: Patches in the tower.
        dummy_tokens: Tokens of the dummy document, for which a pack reserves room.
        measured: Number of measured samples.
    """

    mean_tokens: float
    longest_tokens: int
    mean_patches: float
    most_patches: int
    dummy_tokens: int
    measured: int


def measure_documents(dataset: DatasetConfig, tokenizer: Tokenizer, spec: MediaSpec) -> DocumentSizes:
    """Build documents from samples that are spread evenly over a data set, without decoding images.

    Raises:
        DataConfigError: template and transforms do not fit the model.
        ConfigError: no measured sample gives a document.
    """
    builder = DocumentBuilder(dataset, tokenizer, spec)
    reader = SampleReader(Manifest.open(dataset.indexed), dataset.name)
    numbers = np.unique(np.linspace(0, reader.manifest.num_samples - 1, _NUM_MEASURED).astype(np.int64)).tolist()
    tokens, patches, reason = [], [], ""
    try:
        for number in numbers:
            try:
                document = builder.dry_run(reader.read_without_images(number))
            except SampleError as error:
                reason = reason or str(error)
                continue
            tokens.append(document.num_tokens)
            patches.append(document.computed_patches(spec))
    finally:
        reader.close()
    if not tokens:
        raise ConfigError(
            f"{dataset.manifest}: none of {len(numbers)} inspected samples can be used; the first: {reason}"
        )
    return DocumentSizes(
        mean_tokens=sum(tokens) / len(tokens),
        longest_tokens=max(tokens),
        mean_patches=sum(patches) / len(patches),
        most_patches=max(patches),
        dummy_tokens=dummy_document(spec, tokenizer.pad_id).num_tokens,
        measured=len(tokens),
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    Attributes:
        zero_stage: Lowest ZeRO stage that fits.
        recompute: Whether activations must be recomputed to fit.
        background: Whether checkpoints are written in the background; this needs a copy in memory.
        lanes: Packs of a step.
        micro_lanes: Packs that a rank computes at once.
        documents: Largest number of documents of a pack.
        max_tokens: Largest number of tokens of a pack.
        steps: Optimizer steps.
        workers: Worker processes of a rank.
        rank_bytes: Estimated memory of a rank.
    """

    zero_stage: int
    recompute: bool
    background: bool
    lanes: int
    micro_lanes: int
    documents: int
    max_tokens: int
    steps: int
    workers: int
    rank_bytes: int

    @property
    def step_samples(self) -> int:
        """Largest number of samples of a step."""
        return self.lanes * self.documents


def choose_sizes(
    machine: Machine,
    memory: MemoryModel,
    documents: DocumentSizes,
    num_samples: int,
    step_samples: int,
    epochs: float,
    steps: int | None = None,
) -> Sizes:
    """Choose the sizes of a run.

    Args:
        machine: The machine.
        memory: Memory of the model.
        documents: Sizes of the documents.
        num_samples: Number of training samples.
        step_samples: Wanted number of samples of a step; a multiple of the ranks at the end.
        epochs: Passes over the data.
        steps: Number of steps; None computes it from ``epochs``.

    Raises:
        ConfigError: not even one document fits. The message says what would.
    """
    budget = int(machine.memory_bytes * _USABLE)
    for zero_stage, recompute, background in _settings(machine):
        fixed = memory.fixed_bytes(zero_stage, machine.ranks, copies=background)
        each = memory.activation_bytes(documents.longest_tokens, documents.most_patches, recompute=recompute)
        fitting = (budget - fixed) // max(1, each)
        if fitting >= 1:
            break
    else:
        raise ConfigError(_too_large(machine, memory, documents, budget))
    most = max(1, int(_PACK_TOKENS[machine.device] // documents.mean_tokens))
    lanes = _multiple(min(_LEAST_LANES, step_samples), machine.ranks)
    per_pack = max(1, min(fitting, most, math.ceil(step_samples / lanes)))
    lanes = _multiple(math.ceil(step_samples / per_pack), machine.ranks)
    micro_lanes = max(1, min(lanes // machine.ranks, fitting // per_pack, most // per_pack))
    room = max(documents.longest_tokens, math.ceil(per_pack * documents.mean_tokens * 1.2)) + documents.dummy_tokens
    total = steps or max(1, math.ceil(epochs * num_samples / (lanes * per_pack)))
    spare = machine.cores // machine.ranks - 1
    return Sizes(
        zero_stage=zero_stage,
        recompute=recompute,
        background=background,
        lanes=lanes,
        documents=per_pack,
        max_tokens=_multiple(room, 64),
        steps=total,
        workers=max(0, min(spare, 8 if machine.device == "cuda" else 1)),
        micro_lanes=micro_lanes,
        rank_bytes=fixed + micro_lanes * per_pack * each,
    )


def _multiple(least: int, of: int) -> int:
    """Return the smallest multiple of ``of`` that is at least ``least``."""
    return -(-least // of) * of


def _settings(machine: Machine) -> Iterator[tuple[int, bool, bool]]:
    """Yield (ZeRO stage, recompute activations, checkpoints in the background), the fastest first."""
    stages = (1, 2, 3) if machine.ranks > 1 else (1,)  # Sharding over one rank saves nothing.
    for background in (True, False) if machine.device == "cpu" else (True,):
        for recompute in (False, True):
            for stage in stages:
                yield stage, recompute, background


def _too_large(machine: Machine, memory: MemoryModel, documents: DocumentSizes, budget: int) -> str:
    """Return what the run needs, what there is, and what would fit."""

    def needed(ranks: int, model: MemoryModel = memory) -> int:
        one = model.activation_bytes(documents.longest_tokens, documents.most_patches, recompute=True)
        return model.fixed_bytes(3 if ranks > 1 else 1, ranks, copies=False) + one

    least = min(needed(machine.ranks), needed(1) if machine.ranks == 1 else needed(machine.ranks))
    gpu = replace_device(memory, "cuda")
    gpus = next((n for n in _counts() if needed(n, gpu) <= _USABLE * _GPU_BYTES), None)
    remedies = [f"{machine.device.upper()} memory of {math.ceil(least / _USABLE / GIB)} GiB for each rank"]
    if gpus is not None:
        remedies.append(f"{gpus} GPU{'s' if gpus > 1 else ''} with 80 GiB (ZeRO stage {3 if gpus > 1 else 1})")
    if memory.trained > memory.total // 4:
        remedies.append("adapters instead of all weights (--adapters lora)")
    remedies.append("a smaller model")
    return (
        f"the model does not fit: {memory.total:,} parameters, of which {memory.trained:,} are trained, and one sample "
        f"of {documents.longest_tokens} tokens and {documents.most_patches} patches need {least / GIB:.1f} GiB of "
        f"{machine.name}, of whose {machine.memory_bytes / GIB:.1f} free GiB {budget / GIB:.1f} may be used. "
        f"What would fit: {'; '.join(remedies)}"
    )


def replace_device(memory: MemoryModel, device: str) -> MemoryModel:
    """Return the memory of the same model on another device, with 16-bit values."""
    from dataclasses import replace

    return replace(memory, device=device, value_bytes=2)


def _counts() -> Iterator[int]:
    count = 1
    while count <= _MOST_GPUS:
        yield count
        count *= 2
