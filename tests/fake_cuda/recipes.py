"""Recipes whose steps are tested on fake CUDA tensors; ``python -m tests.gpu.listing`` writes them to docs/gpu.md."""

from __future__ import annotations

SHOWS = {
    "quickstart": "cross-attention",
    "emoji-moe": "experts",
    "llama3.2-11b-vision": "cross-attention with tiles",
    "qwen2-vl-2b": "native resolution, videos",
    "emoji-contrast": "contrastive loss",
    "llama3.2-1b": "distillation, two teachers",
    "emoji-preferences": "preferences, a reference model",
    "emoji-draw": "images as tokens",
    "emoji-omni": "videos and sound",
    "nvlm-h-72b": "hybrid connector",
    "molmo-7b-d": "overlapping crops",
    "aria": "experts and images",
    "emu3-8b": "images as tokens",
    "janus-1.3b": "images as tokens with a head of their own",
    "emoji-vq": "image tokenizer, all stages",
    "emoji-grow": "growing model, all stages",
    "pixtral-12b": "native resolution",
}
ENGINE: dict[str, tuple[tuple[int, str], ...]] = {
    "quickstart": ((0, "fp32"), (0, "bf16"), (2, "fp16"), (3, "bf16"), (3, "fp16")),
    "recipes/emoji-moe": ((0, "bf16"), (3, "bf16")),
    "recipes/llama3.2-11b-vision": ((3, "bf16"),),
    "recipes/qwen2-vl-2b": ((3, "bf16"),),
    "recipes/emoji-contrast": ((3, "bf16"),),
    "recipes/llama3.2-1b": ((3, "bf16"),),
    "recipes/emoji-preferences": ((3, "bf16"),),
    "recipes/emoji-draw": ((3, "bf16"),),
    "recipes/emoji-omni": ((3, "bf16"),),
}
"""ZeRO stages and number formats of the recipes whose whole step by the engine is tested, as rank 0 of 2."""
PLAIN = (
    *(
        "llama3.2-11b-vision",
        "llama3.2-1b",
        "qwen2-vl-2b",
        "emoji-contrast",
        "emoji-preferences",
        "emoji-draw",
        "emoji-omni",
    ),
    *("nvlm-h-72b", "molmo-7b-d", "aria", "emu3-8b", "janus-1.3b", "emoji-vq", "emoji-grow", "pixtral-12b"),
)
"""Further recipes of which every stage is tested on one rank without DeepSpeed: forward, backward, fused AdamW."""
FAST = (("quickstart", "fp16", "flash"), ("recipes/emoji-moe", "bf16", "torch_varlen"))
"""Recipes, number formats and kernels of the test without the marker ``slow``, which runs them in the same way."""


def table() -> str:
    """Return the table of recipes, ZeRO stages and number formats for docs/gpu.md."""
    rows = ["| recipe | shows | stage 0 | stage 2 | stage 3 | one rank, no DeepSpeed |", "|---|---|---|---|---|---|"]
    cases = {name.removeprefix("recipes/"): found for name, found in ENGINE.items()}
    fast = {name.removeprefix("recipes/"): precision for name, precision, _ in FAST}
    for name, shown in SHOWS.items():
        own = cases.get(name, ())
        formats = [", ".join(precision for stage, precision in own if stage == number) for number in (0, 2, 3)]
        plain = fast.get(name, "bf16" if name in PLAIN else "")
        rows.append(f"| `{name}` | {shown} | {' | '.join(formats)} | {plain} |")
    return "\n".join(rows)
