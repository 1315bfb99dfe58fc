"""Describe a model as text: every parameter with its shape and initialisation, parameter counts, FLOPs and memory.

    configs/models/tiny.yaml --on the meta device--> parameters, equal blocks merged --> golden/models/tiny.txt

A change of a shape, a name, a default or an initialisation of any shipped model appears as a changed line.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, Segments
from data_pipeline.media_spec import MediaSpec, Placement
from mmscale.models.build import ParameterCount, build_weights, count_built, media_spec
from mmscale.models.config import AnyModelConfig, ModelConfig
from mmscale.models.flops import forward_flops
from mmscale.nn.init import value_rule
from tests.configs.files import MODELS, RUNS, model_of, name_of
from tests.models.packs import Doc, image_document, pack, text_document

FOLDER = Path(__file__).parent
COMMAND = "make golden"
TOKENS = 4096
SIDE = 32
"""Side of the crop whose FLOPs are counted, in patches, for towers without a fixed grid."""
BYTES = {"weights (bf16)": 2, "gradients (fp32)": 4, "masters (fp32)": 4, "two moments (fp32)": 8}
RANKS = (1, 8, 64, 512)


def files() -> dict[Path, Path]:
    """Return the golden file of each configuration that defines its own model."""
    shared = [model_of(path) for path in MODELS]
    own = [path for path in RUNS if model_of(path) not in shared]
    return {path: FOLDER / f"{name_of(path)}.txt" for path in (*MODELS, *own)}


@functools.cache  # The table of configs/README.md has the counts too.
def describe(config: AnyModelConfig) -> tuple[str, ParameterCount]:
    """Return the text of a golden file, and the model's parameter counts."""
    model = build_weights(config)
    count = count_built(model)
    parts = [_counts(count), _flops(config), _memory(count.total), _parameters(model)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n", count


def _counts(count: ParameterCount) -> list[str]:
    rows = {**count.components, "total": count.total, "in use for a token": count.active}
    return ["parameters", *(f"  {name:20} {number:18,}" for name, number in rows.items())]


def _flops(config: AnyModelConfig) -> list[str]:
    """Return the FLOPs of one forward pass with logits for every token."""
    if not isinstance(config, ModelConfig):
        return []
    spec, vocab = media_spec(config), config.decoder.vocab_size
    tokens = spec.max_document_tokens or TOKENS
    if spec.placement is Placement.NONE:
        cases = {"text": pack([text_document(1, tokens, vocab)], spec)}
    else:
        grid = spec.fixed_grid or (SIDE // spec.merge * spec.merge,) * 2
        views = (1,) if spec.placement is Placement.PAIR else (1, 2)
        documents = {n: _document(spec, grid, n, vocab, tokens) for n in views}
        view = f"view of {grid[0]} x {grid[1]} patches"
        cases = {f"{n} x {view}": pack([document], spec) for n, document in documents.items()}
    clips, heard = dict[str, MediaBlock](), ""
    for name, inputs in spec.modalities.items():
        grid = inputs.typical_grid
        clips[name] = _one_item(grid)
        heard += f", 1 x {inputs.noun} of {grid[0]:,} frames"
    cases = {f"{name}{heard}": replace(one, media={**one.media, **clips}) for name, one in cases.items()}
    return [
        f"forward FLOPs, {tokens:,} tokens with those of views",
        *(f"  {name:40} {forward_flops(config, batch):28,}" for name, batch in cases.items()),
    ]


def _one_item(grid: tuple[int, int, int]) -> MediaBlock:
    """Return a block with one item of another modality than images. FLOPs depend on its size alone."""
    none, empty = torch.empty(0, dtype=torch.int64), Segments.from_lengths([])
    rows = Segments.from_lengths([math.prod(grid)])
    return MediaBlock(none, none, (grid,), rows, none, none, none, empty, empty)


def _document(spec: MediaSpec, grid: tuple[int, int], crops: int, vocab: int, tokens: int) -> Doc:
    """Return a document with ``crops`` crops and ``tokens`` tokens, image tokens included."""
    image_tokens = len(image_document(spec, 1, 0, [grid] * crops, vocab).tokens)
    return image_document(spec, 1, tokens - image_tokens, [grid] * crops, vocab)


def _memory(total: int) -> list[str]:
    """Return the memory of weights, gradients and AdamW state per rank: bf16, ZeRO stage 3, without activations."""
    header = f"GiB a rank, all trained, ZeRO-3{'':9}" + "".join(
        f"{ranks:>10} rank{'s' * (ranks > 1)}" for ranks in RANKS
    )
    sizes = {**BYTES, "together": sum(BYTES.values())}
    rows = [
        f"  {name:38}" + "".join(f"{total * size / ranks / 2**30:>{15 + (ranks > 1)}.3f}" for ranks in RANKS)
        for name, size in sizes.items()
    ]
    return [header, *rows]


def _parameters(model: nn.Module) -> list[str]:
    """Return a line for each parameter and persistent buffer. Equal ones of several blocks share a line."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name, rest in _described(model):
        template = re.sub(r"\.(\d+)\.", ".{}.", name, count=1)
        number = re.search(r"\.(\d+)\.", name)
        groups.setdefault((template, *rest), []).append(int(number[1]) if number else -1)
    rows = [(template.replace("{}", _ranges(numbers), 1), *rest) for (template, *rest), numbers in groups.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
    ]


def _described(model: nn.Module) -> Iterator[tuple[str, tuple[str, str, str]]]:
    owners: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if owners.setdefault(parameter, full) != full:
                yield full, (*_shape(parameter), f"is {owners[parameter]}")
                continue
            if (rule := getattr(module, "fixed_init", {}).get(name)) is not None:
                yield full, (*_shape(parameter), f"{rule.__name__}, never trained")
                continue
            mean, std = value_rule(module, full, tuple(parameter.shape))
            yield full, (*_shape(parameter), f"normal {std:.4g}" if std else f"all {mean:g}")
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", (*_shape(buffer), "buffer")


def _shape(tensor: Tensor) -> tuple[str, str]:
    return str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch.")


def _ranges(numbers: Iterable[int]) -> str:
    """``{0..31}``, ``{3..39 by 4}``, ``{0, 1, 5}``."""
    found = list(numbers)
    gaps = {b - a for a, b in itertools.pairwise(found)}
    if len(found) < 3 or len(gaps) > 1:
        return str(found[0]) if len(found) == 1 else "{" + ", ".join(map(str, found)) + "}"
    (gap,) = gaps
    return f"{{{found[0]}..{found[-1]}{'' if gap == 1 else f' by {gap}'}}}"
