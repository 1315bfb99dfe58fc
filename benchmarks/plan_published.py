"""Speeds that ``mmscale plan`` predicts for published runs, beside the published figures.

    python -m benchmarks.plan_published [--json]

Each row rebuilds a published run as a configuration of this project: the same model, sequence length, packs of a
microbatch, recomputation and GPUs. The published programs are others, so the error is that of the planner and of the
difference of the programs. ``differs`` names what a configuration cannot express. The row with a star was used to
choose ``matmul_share`` of the presets (``mmscale/plan/cluster.py``); the others are predictions.

Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import Case, show
from mmscale.config import load
from mmscale.config.layers import read_layers
from mmscale.config.validate import validate
from mmscale.models.config import ModelConfig
from mmscale.plan.cluster import PRESETS, Cluster
from mmscale.plan.load import ExampleDocument, stage_load
from mmscale.plan.step_time import StepTime, step_time
from mmscale.run.config import RunConfig

MODELS, RECIPES = Path("configs/models"), Path("configs/recipes")
TORCHTITAN = "[torchtitan](https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md)"
FOUNDRY = "[llm-foundry](https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md)"
AUTOMODEL = "[NeMo AutoModel](https://github.com/NVIDIA-NeMo/Automodel/blob/main/docs/performance-summary.md)"
FOLDING = "[arXiv 2504.14960](https://arxiv.org/abs/2504.14960), table 3"
OLMOE = "[arXiv 2409.02060](https://arxiv.org/abs/2409.02060), section 4.1"
CARD = "[model card](https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/MODEL_CARD_VISION.md)"
TOKENS, MFU, HOURS = "tokens/s a GPU", "MFU %", "1000 GPU hours"


@dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        name: Name of the model.
        gpus: Number of H100 GPUs, eight a node.
        published: The published figure.
        unit: Its unit; ``MFU`` counts full attention, and GPU hours are those of a whole stage.
        source: Where it was published, as a link.
        model: Values of the model block.
        tokens: Length of a sequence.
        sequences: Sequences of a microbatch.
        microbatches: Microbatches of a step.
        recompute: Share of the recomputation of ``engine.activation_checkpointing`` that the run did: 0, 0.5 or 1.
        expert_parallel: Ranks that share experts.
        recipe: A recipe in place of ``model`` and the sizes, and its stage. ``sequences`` are its ``micro_lanes``.
        device: Fields of the device that differ from the preset's.
        differs: What the configuration does not express.
        fitted: Whether the row was used to choose the shares of the presets.
    """

    name: str
    gpus: int
    published: float
    unit: str
    source: str
    model: dict[str, Any] = field(default_factory=dict)
    tokens: int = 4096
    sequences: int = 1
    microbatches: int = 1
    recompute: float = 0.0
    expert_parallel: int = 1
    recipe: tuple[str, int] | None = None
    device: dict[str, Any] = field(default_factory=dict)
    differs: str = ""
    fitted: bool = False

    @property
    def cluster(self) -> Cluster:
        """The GPUs."""
        return Cluster(self.gpus // 8, 8, PRESETS["h100"]().model_copy(update=self.device))

    def config(self, recompute: bool) -> RunConfig:
        """Return the run as a configuration."""
        if self.recipe is not None:
            return load(RECIPES / self.recipe[0], [f"engine.micro_lanes={self.sequences}"], RunConfig).value
        return RunConfig.model_validate(
            {
                "run_dir": "runs/published",
                "model": self.model,
                "data": {
                    "tokenizer": {"kind": "tokenizers", "path": "absent.json"},
                    "datasets": [{"name": "text", "manifest": "absent.manifest", "template": {"kind": "text"}}],
                    "lanes": self.gpus * self.sequences * self.microbatches,
                    "packing": {"max_tokens": self.tokens + 1},
                },
                "stages": [{"name": "measured", "steps": 1000}],
                "engine": {
                    "zero_stage": 3,
                    "precision": "bf16",
                    "micro_lanes": self.sequences,
                    "activation_checkpointing": recompute,
                    "expert_parallel": self.expert_parallel,
                },
            }
        )

    def predicted(self) -> float:
        """Return the prediction in ``unit``."""
        number = 0 if self.recipe is None else self.recipe[1]
        times: list[tuple[float, StepTime, float]] = []
        for share, recompute in ((1 - self.recompute, False), (self.recompute, True)):
            if share:
                config = self.config(recompute)
                pack = stage_load(config, number, ExampleDocument(64) if self.recipe else ExampleDocument(self.tokens))
                times.append((share, step_time(config, number, pack, self.cluster, "bf16"), pack.tokens))
        seconds = sum(share * time.seconds for share, time, _ in times)
        if self.unit == TOKENS:
            return self.sequences * self.microbatches * times[0][2] / seconds
        if self.unit == MFU:
            return 100 * times[0][1].model_flops / seconds / self.cluster.accelerator.peak_flops["bf16"]
        return config.stages[number].steps * seconds * self.gpus / 3600 / 1000


def _dense(dim: int, layers: int, hidden: int, vocab: int, **others: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "hidden_dim": dim, "num_layers": layers}
    mlp = {"kind": "dense", "hidden_dim": hidden, **others.pop("mlp", {})}
    return {"decoder": {**sizes, "attention": {"num_heads": dim // 128}, "mlp": mlp, **others}}


def _mpt(dim: int, layers: int, tokens: int) -> dict[str, Any]:
    positions = {"rope": None, "learned_positions": tokens + 1}
    return _dense(dim, layers, 4 * dim, 50432, mlp={"gated": False}, tie_embeddings=True, **positions)


def _file(name: str) -> dict[str, Any]:
    return validate(read_layers(MODELS / f"{name}.yaml"), ModelConfig, name)[0].model_dump()


LLAMA_8B = _dense(4096, 32, 14336, 128256, attention={"num_heads": 32, "num_kv_heads": 8}, tie_embeddings=False)
MIXTRAL_8X22B = {
    "decoder": {
        "vocab_size": 32768,
        "hidden_dim": 6144,
        "num_layers": 56,
        "tie_embeddings": False,
        "attention": {"num_heads": 48, "num_kv_heads": 8, "head_dim": 128},
        "mlp": {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert_dim": 16384},
    }
}
GRAND_TETON = {"memory_bandwidth": 2.4e12, "memory_bytes": 96 * 10**9}


def runs() -> list[Published]:
    """Return the published runs."""
    olmoe, qwen, mosaic = _file("olmoe-1b-7b"), _file("qwen3-30b-a3b"), "MPT"
    titan: dict[str, Any] = {"model": LLAMA_8B, "tokens": 8192, "sequences": 2, "recompute": 0.5, "device": GRAND_TETON}
    power = "GPUs limited to 500 W"
    return [
        Published("Llama 3.1 8B", 8, 5762, TOKENS, TORCHTITAN, **titan, differs=power),
        Published("Llama 3.1 8B", 8, 6667, TOKENS, TORCHTITAN, **titan, differs=f"{power}; torch.compile"),
        Published("Llama 3.1 8B", 128, 5605, TOKENS, TORCHTITAN, **titan, differs=power),
        Published("Llama 3.1 8B", 128, 6514, TOKENS, TORCHTITAN, **titan, differs=f"{power}; torch.compile"),
        Published(f"{mosaic} 7B", 8, 10643, TOKENS, FOUNDRY, _mpt(4096, 32, 2048), 2048, 6, fitted=True),
        Published(f"{mosaic} 7B", 8, 8611, TOKENS, FOUNDRY, _mpt(4096, 32, 4096), 4096, 16, 2, 1.0),
        Published(
            f"{mosaic} 7B", 8, 1956, TOKENS, FOUNDRY, _mpt(4096, 32, 65536), 65536, 1, 2, 1.0, differs="kernels of 2023"
        ),
        Published(f"{mosaic} 13B", 64, 4800, TOKENS, FOUNDRY, _mpt(5120, 40, 2048), 2048, 2),
        Published(f"{mosaic} 70B", 32, 882, TOKENS, FOUNDRY, _mpt(8192, 80, 2048), 2048, 2, 16, 1.0),
        Published(f"{mosaic} 70B", 64, 1039, TOKENS, FOUNDRY, _mpt(8192, 80, 2048), 2048, 8, 4, 1.0),
        Published("OLMoE 1B-7B", 256, 23600, TOKENS, OLMOE, olmoe, 4096, 4, differs="number of GPUs"),
        Published(
            "Qwen3 30B-A3B", 8, 12040, TOKENS, AUTOMODEL, qwen, 4096, 4, 16, expert_parallel=8, differs="fused kernels"
        ),
        Published("Mixtral 8x22B", 128, 4.3, MFU, FOLDING, MIXTRAL_8X22B, 4096, 1, 2, 1.0, differs="TP 8"),
        Published("Mixtral 8x22B", 128, 23.4, MFU, FOLDING, MIXTRAL_8X22B, 4096, 1, 2, 1.0, 8, differs="TP 2"),
        _vision("11b", 512, 0, 147),
        _vision("11b", 512, 1, 98),
        _vision("90b", 1024, 0, 885),
        _vision("90b", 1024, 1, 885),
    ]


def _vision(size: str, gpus: int, stage: int, hours: float) -> Published:
    name = f"Llama 3.2 {size.upper()} Vision, {('pairs', 'annealing')[stage]}"
    recipe = (f"llama3.2-{size}-vision.yaml", stage)
    return Published(
        name,
        gpus,
        hours,
        HOURS,
        CARD,
        recipe=recipe,
        sequences=16,
        recompute=1.0,
        differs="GPUs, batch and text length",
    )


@dataclass(frozen=True)
class PublishedTable:
    """All rows."""

    rows: tuple[tuple[Published, float], ...]

    def line(self) -> str:
        """Return a table in Markdown."""
        lines = [
            "| model | GPUs | unit | published | planned | error | differs | source |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for run, planned in self.rows:
            star = "*" if run.fitted else ""
            figures = f"{_figure(run.published)} | {_figure(planned)} | {planned / run.published - 1:+.0%}{star}"
            lines.append(f"| {run.name} | {run.gpus} | {run.unit} | {figures} | {run.differs} | {run.source} |")
        return "\n".join(lines)

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        return [
            Case(f"{run.name}, {run.gpus} GPUs, {run.published:g}", planned, {"published": run.published}, run.unit)
            for run, planned in self.rows
        ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def measure() -> Iterator[PublishedTable]:
    """Yield the table."""
    yield PublishedTable(tuple((run, run.predicted()) for run in runs()))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_published", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(words)


if __name__ == "__main__":
    show("plan_published", measure, arguments().json)
