"""Generate the table of configs/README.md: a row for each model. Its columns come from these files:

YAML: sizes, and its line "# unknown: ..."              recipes: those whose base is the model
layouts: the family that can hold its weights           tests/parity.json: the worst errors of that family
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from mmscale.errors import CheckpointError
from mmscale.hf.layouts import LAYOUTS
from mmscale.models.audio import AudioModalityConfig
from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.config import AnyModelConfig, ModelConfig, TokenizerConfig
from mmscale.models.connector_config import ContrastiveConnectorConfig, EmbeddingConnectorConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.moe import MoeConfig
from tests.configs.files import CONFIGS, MODELS, REPO, RUNS, bases_of, model_of, name_of
from tests.golden.describe import describe

README = CONFIGS / "README.md"
BEGIN, END = "<!-- table: make golden -->", "<!-- end of the table -->"
HEADER = ("model", "parameters", "decoder", "tower", "connector", "family", "worst errors", "recipes", "unknown")
COMPOSED = {"nvlm-x": "nvlm_x", "nvlm-h": "nvlm_h", "mm1.5": "c_abstractor", "baichuan-omni": "conv_pool"}
"""Family in tests/parity.json of models without a class in transformers, by the prefix of their names."""
_UNKNOWN = re.compile(r"^# unknown: (.*(?:\n# [^:\n]*$)*)", re.MULTILINE)
_UNKNOWN_HERE = re.compile(r"^\s*(\w+):.*[#;] unknown: (?!not published)(.*)$", re.MULTILINE)


def written() -> str:
    """Return the text of README.md with an up-to-date table."""
    text = README.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)
    rows = [HEADER, ("---", "---:", *["---"] * (len(HEADER) - 2)), *(row(path) for path in MODELS)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"{before}{BEGIN}\n{table}\n{END}{after.split(END)[1]}"


def row(path: Path) -> tuple[str, ...]:
    """Return the cells of a model."""
    config = model_of(path)
    decoder, tower, connector = _parts(config)
    _, count = describe(config)
    number = f"{count.total:,}" + (f" ({count.active:,} a token)" if count.active != count.total else "")
    golden = f"../tests/golden/{name_of(path)}.txt"
    families = _families(config)
    return (
        f"[{path.stem}](models/{path.name})",
        f"[{number}]({golden})",
        decoder,
        tower,
        connector,
        ", ".join(f"`{family}`" for family in families) or "none",
        _errors(families or [family for name, family in COMPOSED.items() if path.stem.startswith(name)]),
        ", ".join(f"[{run.stem}]({run.relative_to(CONFIGS)})" for run in RUNS if path in bases_of(run)),
        _unknown(path),
    )


def _parts(config: AnyModelConfig) -> tuple[str, str, str]:
    vision, connector = config.vision, getattr(config, "connector", None)
    if isinstance(config, TokenizerConfig):
        tokenizer = config.image_tokenizer
        sizes = f"{tokenizer.codebook_size:,} codes of {tokenizer.code_dim}, {tokenizer.stride} px a token"
        return "", f"{tokenizer.kind}, {sizes}", ""
    if connector is None:
        kind = ""
    elif isinstance(connector, ContrastiveConnectorConfig):
        kind = f"{connector.kind}, {connector.loss}, {connector.dim} channels"
    else:
        projector = connector.projector
        kind = f"{connector.kind}, {projector.kind}" + (
            f", {projector.merge}x{projector.merge}" * (projector.merge > 1)
        )
        if not isinstance(connector, EmbeddingConnectorConfig):
            kind += f", every {connector.every}"
        elif connector.video_projector is not None:
            kind += f"; videos: {connector.video_projector.kind}"
    tower, audio = _tower(vision), config.audio
    if isinstance(audio, AudioModalityConfig):
        kind = "; ".join(filter(None, (kind, f"audio: {audio.projector.kind}")))
    if audio is not None and isinstance(audio.tower, WhisperConfig):
        heard = f"{audio.tower.num_layers} x {audio.tower.hidden_dim}, {audio.tower.max_frames / 100:g} s of sound"
        tower = "; ".join(filter(None, (tower, heard)))
    return _decoder(config.decoder) if isinstance(config, ModelConfig) else "", tower, kind


def _decoder(decoder: DecoderConfig) -> str:
    heads = f"{decoder.attention.num_heads}/{decoder.attention.kv_heads} heads"
    experts = f", {decoder.mlp.num_experts} experts" if isinstance(decoder.mlp, MoeConfig) else ""
    return f"{decoder.num_layers} x {decoder.hidden_dim}, {heads}{experts}"


def _tower(vision: object) -> str:
    if isinstance(vision, VisionConfig):
        side = "any size" if vision.fixed_grid is None else f"{vision.fixed_grid[0] * vision.patch_size} px"
        return f"{vision.num_layers} x {vision.hidden_dim}, {side}"
    return "" if vision is None else f"{vision.kind} of {vision.patch_size} px"  # type: ignore[attr-defined]


def _families(config: AnyModelConfig) -> list[str]:
    """Return the Hugging Face families whose layout can hold the model's weights."""
    found = []
    for layout in LAYOUTS:
        with contextlib.suppress(CheckpointError):
            layout.config_values(config)
            found.append(layout.model_type)
    return found


def _errors(families: list[str]) -> str:
    """Return the worst error of outputs and of gradients."""
    rows = [each for each in json.loads((REPO / "tests/parity.json").read_text()) if each["family"] in families]
    gradients = [each["error"] for each in rows if each["quantity"] == "gradients"]
    outputs = [each["error"] for each in rows if each["quantity"] in ("logits", "features", "hidden rows", "images")]
    return " / ".join(f"{max(errors):.1e}" for errors in (outputs, gradients) if errors)


def _unknown(path: Path) -> str:
    """Return the first sentence after ``# unknown:``, and the ``unknown`` comments of single keys."""
    text = path.read_text(encoding="utf-8")
    first = [" ".join(each.replace("\n#", " ").split()).split(". ")[0].rstrip(".") for each in _UNKNOWN.findall(text)]
    return "; ".join([*first, *(f"`{key}`: {each}" for key, each in _UNKNOWN_HERE.findall(text))])
