"""Train models of published shapes on one GPU and read what their runs measured: ``python -m benchmarks.gpu [--json]``.

    dense 1B     Llama 3.2 1B
    OLMoE        OLMoE-1B-7B: 64 experts in each block
    vision 11B   Llama 3.2 11B Vision with its tiles; the decoder is frozen, as published

Each model is cut to the device: it has the most blocks, and the largest packs, whose predicted memory fits without
recomputation. The name of a case says what was cut, and its figures include the prediction. Runs are in bf16, or in
fp16 on a card without bf16, where flash-attn and torch's varlen kernel do not run either. A case is a run of
``mmscale train`` in a process of its own, with one attention kernel, with or without recomputation. Its figures come
from ``metrics.jsonl`` and ``result.json`` of the run, so they include the loader, the logs and a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.report import Case, show
from mmscale.config import load
from mmscale.engine.config import EngineConfig
from mmscale.engine.precision import Precision, choose_precision
from mmscale.errors import UnsupportedError
from mmscale.nn.attention_backends import AttentionChoice, resolve_backend
from mmscale.plan.memory import memory_of_rank
from mmscale.run.config import RunConfig
from mmscale.shrink.model import shrink

KERNELS: tuple[AttentionChoice, ...] = ("flash", "torch_varlen", "sdpa")
_ROOT = Path(__file__).resolve().parents[1]
_WARM_UP = 4
"""Steps that are not counted: allocation, and DeepSpeed's record of the order of modules."""
_USABLE = 0.85
"""Share of the device's memory that a prediction may fill; the rest is for fragments and the context of CUDA."""
_SECONDS = 1500


@dataclass(frozen=True)
class Cut:
    """What is left of a published model on a device.

    Attributes:
        blocks: Decoder blocks. Llama 3.2 Vision has a cross-attention block after each four of them.
        max_tokens: Tokens of a pack.
        max_documents: Documents of a pack; None for any number.
        tower_blocks: Blocks of the vision tower; None: all. Its blocks over all tiles, and the blocks whose outputs the
            decoder gets, are cut in proportion.
        frozen: Components that are not trained, although the shape trains them.
        experts: Experts of each block; None: all.
    """

    blocks: int
    max_tokens: int
    max_documents: int | None = None
    tower_blocks: int | None = None
    frozen: tuple[str, ...] = ()
    experts: int | None = None

    def model(self, base: Path) -> dict[str, Any]:
        """Return the ``model`` block of a run: the published model in the file ``base``, cut."""
        written: dict[str, Any] = {"base": str(base), "decoder": {"num_layers": self.blocks}}
        if self.experts is not None:
            written["decoder"]["mlp"] = {"num_experts": self.experts}
        if self.tower_blocks is not None:
            tower = yaml.safe_load(base.read_text(encoding="utf-8"))["vision"]
            share = self.tower_blocks / tower["num_layers"]
            written["vision"] = {
                "num_layers": self.tower_blocks,
                "feature_layers": sorted({int(layer * share) for layer in tower["feature_layers"]}),
                "tiles": {"global_layers": max(1, int(tower["tiles"]["global_layers"] * share))},
            }
        return written

    def __str__(self) -> str:
        experts = "" if self.experts is None else f" of {self.experts} experts"
        tower = "" if self.tower_blocks is None else f", {_counted(self.tower_blocks, 'tower block')}"
        frozen = "".join(f", {name} frozen" for name in self.frozen)
        documents = "" if self.max_documents is None else f" and {_counted(self.max_documents, 'document')}"
        return f"{_counted(self.blocks, 'block')}{experts}{tower}{frozen}, packs of {self.max_tokens} tokens{documents}"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Shape:
    """A published model, cut to one device.

    Attributes:
        model: File in ``configs/models``.
        cuts: Sizes to try, the largest first.
        train: Components that are trained.
        images: Whether the data are captioned images rather than text.
    """

    model: str
    cuts: tuple[Cut, ...]
    train: tuple[str, ...] = ("all",)
    images: bool = False


SHAPES = {
    "dense 1B": Shape("llama3.2-1b.yaml", tuple(Cut(blocks, 8192) for blocks in (16, 8, 4, 2))),
    "OLMoE": Shape("olmoe-1b-7b.yaml", (*(Cut(blocks, 8192) for blocks in (16, 8, 4, 2, 1)), Cut(1, 4096, experts=32))),
    "vision 11B": Shape(
        "llama3.2-11b-vision.yaml",
        (
            *(Cut(blocks, 2048, 2) for blocks in (32, 16, 8, 4)),
            *(Cut(4, 2048, 2, tower) for tower in (16, 8)),
            Cut(4, 2048, 1, 8),
            Cut(4, 2048, 1, 8, ("vision",)),
        ),
        ("vision", "connector", "extra_tokens"),
        images=True,
    ),
}


@dataclass(frozen=True)
class GpuRow:
    """The figures of one case.

    Attributes:
        name: The model with its depth, the kernel, and whether activations are recomputed.
        figures: Value and unit by name; empty if the run failed.
        error: Why the run has no figures; empty if it has.
    """

    name: str
    figures: dict[str, tuple[float, str]]
    error: str = ""

    def line(self) -> str:
        """Return the row for people."""
        if self.error:
            return f"{self.name}: FAILED: {self.error}"
        return f"{self.name}: " + ", ".join(
            f"{name} {value:.4g} {unit}" for name, (value, unit) in self.figures.items()
        )

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        return [Case(f"{self.name}: {name}", value, {}, unit) for name, (value, unit) in self.figures.items()]


def measured_precision(args: argparse.Namespace) -> Precision:
    """Return the format of the runs: bf16, or fp16 on a card without bf16. The rehearsal computes in fp32."""
    if args.rehearse:
        return Precision("fp32", "the rehearsal on the CPU")
    found = choose_precision(EngineConfig(), torch.device("cuda"))
    return found if found.name == "bf16" else Precision("fp16", found.reason)


def run_config(shape: Shape, cut: Cut, precision: str, args: argparse.Namespace, *, folder: Path) -> RunConfig:
    """Return the run of a shape, cut, in ``folder``, on bundled data.

    With ``args.rehearse`` the model is the smoke-test model of the same kind, on the CPU.
    """
    shards = _ROOT / "examples/emoji/shards"
    dataset: dict[str, Any] = {
        "name": "bundled",
        "manifest": str(shards / f"train-{'quick' if shape.images else 'text'}.manifest"),
        "template": {"kind": "caption" if shape.images else "text"},
    }
    if shape.images:
        dataset["transforms"] = {"kind": "tiles", "tiling": {"kind": "llama", "max_tiles": 4}}
    written = {
        "run_dir": str(folder / "run"),
        "model": cut.model(_ROOT / "configs/models" / shape.model),
        "data": {
            "tokenizer": {"kind": "sentencepiece", "path": str(_ROOT / "examples/emoji/tokenizer.model")},
            "datasets": [dataset],
            "lanes": 2,
            "packing": {
                "max_tokens": 256 if args.rehearse else cut.max_tokens,
                "max_documents": cut.max_documents,
                "look_ahead": 4,
            },
            "workers": 0 if args.rehearse else 4,
        },
        "stages": [
            {
                "name": "measured",
                "steps": args.steps + _WARM_UP,
                "train": [each for each in shape.train if each not in cut.frozen],
            }
        ],
        "engine": {
            "device": "cpu" if args.rehearse else "cuda",
            "precision": precision,
            "zero_stage": args.zero_stage,
        },
        "checkpoint": {"every_steps": None, "keep_last": 1},
        "metrics": {"tensorboard": False},
        "evaluation": {"sets": [], "captions": None},
    }
    path = folder / "written.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    config = load(path, [], RunConfig).value
    return config.model_copy(update={"model": shrink(config.model)}) if args.rehearse else config


def largest_fitting(
    shape: Shape, precision: str, args: argparse.Namespace, folder: Path, device_bytes: int
) -> tuple[Cut, RunConfig, int]:
    """Return the largest cut whose predicted memory fits a device, its run, and the prediction in bytes.

    Raises:
        UnsupportedError: even the smallest cut does not fit.
    """
    usable = _USABLE * device_bytes
    for cut in shape.cuts:
        config = run_config(shape, cut, precision, args, folder=folder)
        needed = memory_of_rank(config, 0, 1, device="cuda").peak_bytes
        if needed <= usable:
            return cut, config, needed
    raise UnsupportedError(
        f"{shape.cuts[-1]} need {needed / 1e9:.0f} GB, of which this device has {usable / 1e9:.0f} GB free"
    )


def kernels(args: argparse.Namespace, precision: Precision) -> list[AttentionChoice]:
    """Return the attention kernels of this machine. The rehearsal has one."""
    found: list[AttentionChoice] = []
    for kernel in args.kernels:
        try:
            found.append(resolve_backend(kernel, precision.dtype))
        except UnsupportedError as error:
            print(f"not measured: {error}", file=sys.stderr)
    return found


def measure(args: argparse.Namespace) -> Iterator[GpuRow]:
    """Yield a row for each model, kernel and setting of recomputation. Exits if there is nothing to measure."""
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures a CUDA device, and torch sees none; --rehearse tests the program on the CPU")
    precision = measured_precision(args)
    found = kernels(args, precision)
    print(f"measured in {precision.name} ({precision.reason})", file=sys.stderr)
    for model in args.models:
        with tempfile.TemporaryDirectory(prefix="mmscale-gpu-", dir=args.folder) as temporary:
            shape, predicted = SHAPES[model], None
            try:
                if args.rehearse:
                    size = "smoke-test model"
                    config = run_config(shape, shape.cuts[-1], precision.name, args, folder=Path(temporary))
                else:
                    memory = torch.cuda.get_device_properties(0).total_memory
                    cut, config, predicted = largest_fitting(shape, precision.name, args, Path(temporary), memory)
                    size = str(cut)
            except UnsupportedError as error:
                yield GpuRow(model, {}, str(error))
                continue
            saves = True
            for kernel in found:
                for recomputed in (False, True):
                    name = f"{model}, {size}, {precision.name}, {kernel}{', recomputed' if recomputed else ''}"
                    engine = {"attention": kernel, "activation_checkpointing": recomputed}
                    row = run_case(name, config, engine, saves, Path(temporary))
                    if predicted is not None and not recomputed and not row.error:
                        row = replace(row, figures=row.figures | {"predicted memory": (predicted / 1e9, "GB")})
                    yield row
                    saves = False


def run_case(name: str, config: RunConfig, engine: dict[str, Any], saves: bool, folder: Path) -> GpuRow:
    """Train a run in a process of its own and return its figures. The run folder is removed.

    Args:
        name: Name of the row.
        config: The run.
        engine: Changes of its engine block.
        saves: Whether to save in the middle of the run and report how long the step waited. Every run saves at its end.
        folder: For the file of the run.
    """
    steps = config.stages[0].steps
    written = config.model_copy(
        update={
            "engine": config.engine.model_copy(update=engine),
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": steps - 2 if saves else None}),
        }
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(written.model_dump(mode="json")), encoding="utf-8")
    words = [sys.executable, "-m", "mmscale.cli.main", "train", str(path)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_SECONDS, check=False, env=os.environ | _alone(), cwd=_ROOT
        )
    except subprocess.TimeoutExpired:
        return GpuRow(name, {}, f"no end after {_SECONDS} s")
    try:
        if done.returncode:
            return GpuRow(name, {}, f"exit code {done.returncode}: {_reason(done.stderr)}")
        lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((config.run_dir / "result.json").read_text())
    finally:
        shutil.rmtree(config.run_dir, ignore_errors=True)
    counted = [line for line in lines[_WARM_UP:] if line["applied"]]
    # In fp16 the gradient of the first steps overflows, until the loss scale is low enough.
    all_applied = config.engine.precision == "fp16" or all(line["applied"] for line in lines)
    if not counted or not all_applied or not all(math.isfinite(line["loss"]) for line in lines):
        return GpuRow(name, {}, f"losses {', '.join(str(line['loss']) for line in lines)}: a step was not applied")
    return GpuRow(name, figures(lines, counted, result, saves))


def figures(
    lines: list[dict[str, Any]], counted: list[dict[str, Any]], result: dict[str, Any], saves: bool
) -> dict[str, tuple[float, str]]:
    """Return the figures of a run from its lines of ``metrics.jsonl``, the counted ones, and its ``result.json``."""
    seconds = sum(line["seconds"] for line in counted)
    found = {
        "useful tokens": (sum(line["tokens"] for line in counted) / seconds, "tokens/s"),
        "step": (1e3 * seconds / len(counted), "ms"),
        "wait for the loader": (sum(line["data_wait_seconds"] for line in counted) / seconds, "of the time"),
    }
    if all("mfu" in line for line in counted):
        found["MFU"] = (sum(line["mfu"] * line["seconds"] for line in counted) / seconds, "of the peak")
    memory = result["memory"]
    found["peak memory"] = (max(memory["device_bytes"] or memory["rss_bytes"]) / 1e9, "GB")
    if saves:
        found["stall of a checkpoint"] = (max(line["checkpoint_seconds"] for line in lines), "s")
    return found


def _alone() -> dict[str, str]:
    """Return variables that let a process be a run of one rank, whatever launcher started this process."""
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if "rror" in line or "out of memory" in line]
    return (named or lines or ["no message"])[-1][:500]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument(
        "--steps",
        type=int,
        default=16,
        choices=range(1, 1001),
        metavar="N",
        help="measured steps of each case, 1 to 1000",
    )
    parser.add_argument("--zero-stage", type=int, default=3, choices=range(4))
    parser.add_argument("--folder", default=None, help="where the runs save; the default is the temporary folder")
    parser.add_argument(
        "--rehearse", action="store_true", help="smoke-test models on the CPU, to test this program: no figure of a GPU"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    settings = {name: getattr(options, name) for name in ("steps", "zero_stage", "rehearse")}
    rows = show("gpu", lambda: measure(options), options.json, settings)
    failed = [row for row in rows if isinstance(row, GpuRow) and row.error]
    for row in failed:
        print(row.line(), file=sys.stderr)
    if failed:
        sys.exit(1)
