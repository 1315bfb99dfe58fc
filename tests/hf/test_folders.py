"""A damaged or unsupported folder raises an error with a reason, and leaves no files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.checkpoint.imports.write import new_share, write_checkpoint
from mmscale.checkpoint.manifest import FORMAT, Manifest
from mmscale.checkpoint.reshard import verify
from mmscale.checkpoint.share import TensorPiece
from mmscale.cli.main import main
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_for, layout_of
from mmscale.hf.read import CONFIG, INDEX, HfFolder
from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from tests.models.reference_models import distance
from tests.models.tiny import config
from tests.parity_table import Recorder

KEYS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
}
FILE = "model.safetensors"


def tensors(tied: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of ``KEYS`` by the names of Llama's code."""
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.0.self_attn.v_proj.weight": (4, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.0.mlp.gate_proj.weight": (16, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 16),
        "model.norm.weight": (8,),
    }
    if not tied:
        shapes["lm_head.weight"] = (12, 8)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path: Path, values: dict[str, torch.Tensor] | None = None, **keys: Any) -> Path:
    path.mkdir()
    (path / CONFIG).write_text(json.dumps({**KEYS, **keys}))
    save_file(tensors() if values is None else values, path / FILE)
    return path


def test_a_whole_folder_becomes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "source", rope_theta=1e4, torch_dtype="float32", use_cache=True, _commit="x")
    assert main(["checkpoint", "import", str(source), str(tmp_path / "run"), "--from", "hf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["tensors"]) == ("llama", 12)
    assert report["parameters"] == sum(values.numel() for values in tensors().values())
    assert report["model"]["decoder"]["rope"]["theta"] == 1e4
    assert verify(Path(report["checkpoint"])) == []
    again = ["checkpoint", "import", str(source), str(tmp_path / "run"), "--from", "hf"]
    assert main(again) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*again, "--stage", "x"]) == 2
    assert "not for --from hf" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--like", str(source)]) == 2
    assert "--like goes with --to hf and --to peft" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--stacked-experts"]) == 2
    assert "--stacked-experts goes with --to hf" in capsys.readouterr().err
    words = ["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--like", str(source)]
    assert main([*words, "--stacked-experts"]) == 1
    assert "llama has no spelling with stacked experts" in capsys.readouterr().err
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "llama"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["checkpoint", "import", "{}", "{}/run"], "add --from hf"),
        (["checkpoint", "verify", "{}"], "make a checkpoint of it with: mmscale checkpoint import {} RUN --from hf"),
        (
            ["checkpoint", "export", "{}", "{}/out"],
            "make a checkpoint of it with: mmscale checkpoint import {} RUN --from hf",
        ),
        (
            ["generate", "{}", "--prompt", "x"],
            "make a checkpoint of it with: mmscale checkpoint import {} RUN --from hf",
        ),
    ],
)
def test_a_folder_of_hugging_face_elsewhere(
    words: list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "source")
    assert main([word.format(source) for word in words]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert (
        f"{source} is a Hugging Face folder (model_type='llama' in its config.json); {remedy.format(source)}" in message
    )


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: values for key, values in tensors().items() if key != name}


REFUSED: dict[str, tuple[dict[str, torch.Tensor] | None, dict[str, Any], str]] = {
    "unknown family": (None, {"model_type": "mamba"}, "model_type='mamba' is not supported"),
    "no family": (None, {"model_type": None}, "no model_type"),
    "a tensor is missing": (without("model.norm.weight"), {}, r"does not hold 1 tensor \(model.norm.weight\)"),
    "a tensor too many": (
        {**tensors(), "score.weight": torch.ones(1)},
        {},
        r"holds 1 tensor \(score.weight\) that a llama model does not have",
    ),
    "another width": (None, {"vocab_size": 13}, r"is \[12, 8\], by config.json it should be \[13, 8\]"),
    "another head": (tensors(), {"tie_word_embeddings": True}, "config.json declares the two tied"),
    "an odd format": ({**tensors(), "model.norm.weight": torch.ones(8).to(torch.float8_e5m2)}, {}, "number format"),
    "a key is missing": (None, {"rms_norm_eps": None}, "rms_norm_eps is missing"),
    "a key of another type": (None, {"hidden_size": "8"}, "hidden_size='8' must be of type int"),
    "contradiction": (None, {"num_attention_heads": 3}, "num_heads=3"),
    "another activation": (None, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    "a key that nobody knows": (None, {"logit_scale": 0.5}, "logit_scale=0.5 is not known"),
    "several unknown keys": (
        None,
        {"logit_scale": 0.5, "alibi": True},
        r"(?s)2 unknown keys.*logit_scale=0.5.*alibi=True",
    ),
    "names of another family": (
        {name.replace("norm", "ln"): values for name, values in tensors().items()},
        {},
        r"does not hold 3 tensors \(model.layers.0.input_layernorm.weight, .*; it holds 3 tensors \(.*input_layerln",
    ),
    "other rotations": (None, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type='dynamic'"),
    "part of a head": (None, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    "a window": (None, {"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
    "a window by default": (
        None,
        {"model_type": "mistral"},
        "sliding_window=4096 .the class default.* is shorter than",
    ),
    "a window in some layers": (
        None,
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
        "sliding_window=4096 .* is shorter than max_position_embeddings=32768",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_values_are_rejected(case: str, tmp_path: Path) -> None:
    values, keys, message = REFUSED[case]
    source = folder(tmp_path / "source", values, **keys)
    with pytest.raises(CheckpointError, match=message):
        import_folder(source, tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


def split(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Store the folder as two files with an index, and apply ``change``."""
    values = load_file(path / FILE)
    (path / FILE).unlink()
    names = sorted(values)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: values[name] for name in held}, path / file)
    places = {name: file for file, held in parts.items() for name in held}
    change(places)
    (path / INDEX).write_text(json.dumps({"weight_map": places}))


def cut(path: Path) -> None:
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-4])


def pickled(path: Path) -> None:
    (path / FILE).rename(path / "pytorch_model.bin")


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "missing or damaged"),
    "pickled": (pickled, "pickled weights, which are not read"),
    "no configuration": (lambda path: (path / CONFIG).unlink(), "config.json cannot be read"),
    "no JSON": (lambda path: (path / CONFIG).write_text("{"), "is not valid JSON"),
    "a list": (lambda path: (path / CONFIG).write_text("[]"), "is no JSON object"),
    "no map": (lambda path: (path / INDEX).write_text("{}"), "no weight_map"),
    "a file is missing": (
        lambda path: split(path, lambda places: places.update({"x": "c.safetensors"})),
        "c.safetensors is missing or damaged",
    ),
    "a file elsewhere": (
        lambda path: split(path, lambda places: places.update({"x": "../source/a.safetensors"})),
        "is not a plain file name",
    ),
    "not in the index": (
        lambda path: split(path, lambda places: places.pop("model.norm.weight")),
        "model.norm.weight is not both in",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    damage(folder(tmp_path / "source"))
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "source", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_with_an_index_a_tied_head_twice_and_old_frequencies(tmp_path: Path) -> None:
    values = tensors(tied=True)
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    source = folder(tmp_path / "source", values, tie_word_embeddings=True)
    split(source, lambda places: None)
    report = import_folder(source, tmp_path / "run")
    assert report.left_out == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert report.tied == {"head.weight": "decoder.embed_tokens.weight"}


def test_tensors_stay_on_the_disk(tmp_path: Path) -> None:
    """A tensor that is read twice has the same address: that of the mapped file."""
    source = HfFolder(folder(tmp_path / "source"))
    first, second = source.tensor("lm_head.weight"), source.tensor("lm_head.weight")
    assert first.data_ptr() == second.data_ptr()


def saved(path: Path, settings: ModelConfig) -> tuple[Any, Path]:
    """Return a model and a checkpoint of it."""
    model = build_model(settings, attention="sdpa", seed=1)
    pieces = [TensorPiece(f"{name}|frozen", 0, values.detach().flatten()) for name, values in model.named_parameters()]
    manifest = {
        "format": FORMAT,
        "state": {"step": 3, "stage_index": 0, "stage_step": 3, "tokens": 0, "samples": 0, "extra": {}},
        "stage": "all",
        "world_size": 1,
        "zero_stage": 0,
        "precision": "fp32",
        "optimizer_steps": 3,
        "parameters": {n: {"shape": list(p.shape), "trained": False} for n, p in model.named_parameters()},
        "buffers": {},
        "tied": {"head.weight": "decoder.embed_tokens.weight"} if settings.decoder.tie_embeddings else {},
        "model_config_values": settings.model_dump(mode="json"),
        "files": {},
        "versions": {},
    }
    share = new_share(0, pieces, path)
    return model, write_checkpoint(path, Manifest.model_validate(manifest), [share])


def text_config(**decoder: Any) -> ModelConfig:
    block = layout_of("llama").model_config(KEYS, "here").model_dump(mode="json")["decoder"]
    return ModelConfig.model_validate({"decoder": {**block, **decoder}})


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_rows_of_the_table(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: Recorder
) -> None:
    """An export concatenates both parameters; transformers computes the same, for new ids too."""
    from transformers import AutoModelForCausalLM

    from tests.models.test_parity import text_batch

    monkeypatch.setattr("mmscale.checkpoint.export._CHUNK_VALUES", 7)
    ours, path = saved(tmp_path / "run", text_config(extra_tokens={"rows": 5}, tie_embeddings=tied))
    export_weights(path, tmp_path / "out", to=HuggingFace())
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    batch = text_batch(17, lengths=[40])
    assert {12, 16} <= set(batch.token_ids.tolist())
    logits = ours.head(ours(batch).hidden)
    assert logits.shape == (40, 17)
    expected = theirs(input_ids=batch.token_ids[None]).logits[0]
    parity("llama", "logits with new tokens", distance(logits, expected), 2e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (text_config(extra_tokens={"rows": 5, "predicted": False}), "model.decoder.extra_tokens="),
        (text_config(rope=None), "model.decoder.rope=None"),
        (text_config(norm={"kind": "layernorm"}), "model.decoder.norm.kind='layernorm'"),
        (
            text_config(mlp={"kind": "dense", "hidden_dim": 16, "activation": "gelu"}),
            "model.decoder.mlp.activation='gelu'",
        ),
        (
            text_config(attention={"num_heads": 2, "qk_norm": "head"}, norm_placement="post"),
            "model.decoder.attention.qk_norm='head'",
        ),
        (
            text_config(mlp={"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_dim": 8}),
            "cannot express experts",
        ),
        (config("embedding"), "cannot express a vision tower"),
    ],
)
def test_a_model_that_no_family_can_express(settings: ModelConfig, message: str, tmp_path: Path) -> None:
    _, path = saved(tmp_path / "run", settings)
    with pytest.raises(CheckpointError) as error:
        export_weights(path, tmp_path / "out", to=HuggingFace())
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_first_family_that_fits() -> None:
    grouped = {"num_heads": 2, "num_kv_heads": 1}
    assert layout_for(text_config()).model_type == "llama"
    assert layout_for(text_config(attention={**grouped, "qkv_bias": True})).model_type == "qwen2"
    assert layout_for(text_config(attention={"num_heads": 3, "head_dim": 4})).model_type == "mistral"
    post = {"norm_placement": "post", "attention": {**grouped, "qk_norm": "full"}}
    assert layout_for(text_config(**post)).model_type == "olmo2"
    per_head = {"num_heads": 2, "head_dim": 4, "qk_norm": "head"}
    assert layout_for(text_config(attention=per_head)).model_type == "qwen3"
    experts = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_dim": 8}
    full = {"num_heads": 2, "qk_norm": "full"}
    assert layout_for(text_config(attention=full, mlp=experts)).model_type == "olmoe"
    assert layout_for(text_config(attention=per_head, mlp=experts)).model_type == "qwen3_moe"
    assert layout_for(text_config(mlp={**experts, "router": "topk_then_softmax"})).model_type == "mixtral"
