"""Adapters compute what peft computes, their folders are exchanged both ways, and a merged export is peft's.

Measured worst cases: 8e-7 in logits, 3e-6 in gradients, 2e-7 in merged weights (relative to the largest value).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.batch import MultimodalBatch
from mmscale.checkpoint import load_weights, read_manifest
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.peft_folder import CONFIG, WEIGHTS, exchanged_layers, export_adapters, import_adapters
from mmscale.cli.main import main
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of
from mmscale.models.adapters import TargetsConfig
from mmscale.models.build import build_unset, media_spec
from mmscale.models.config import ModelConfig, read_model_config
from mmscale.nn.adapters import adapted_layers
from mmscale.nn.dropout import SubLayer
from tests.hf import mllama_reference, test_fuyu, test_pixtral, test_qwen2_audio, test_qwen2_vl
from tests.hf.decoders import reference_model
from tests.hf.pages import PAGES, Seen
from tests.hf.reference_models import imported, loaded
from tests.models.packs import in_lane, pack, text_document
from tests.models.reference_models import distance
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 3e-6, 1e-5
PARAMETERS = {"lora_A": "lora_A.default", "lora_B": "lora_B.default", "magnitude": "lora_magnitude_vector.default"}


@dataclass(frozen=True)
class Text:
    """A text as input of both implementations."""

    batch: MultimodalBatch

    def ours(self, model: Any) -> Tensor:
        return model.head(model(self.batch).hidden)

    def theirs(self, model: Any) -> Tensor:
        return model(input_ids=self.batch.token_ids[None]).logits[0]


def text(folder: Path, ours: Any) -> Text:
    del folder
    return Text(in_lane(pack([text_document(1, 30, 120)], media_spec(ours.config)), 0, (1, 5)))


def pages(module: Any) -> Callable[[Path, Any], Seen]:
    return lambda folder, ours: module.seen(folder, ours, [PAGES["several"], PAGES["none"]])


@dataclass(frozen=True)
class Case:
    model: Callable[[], Any]
    inputs: Callable[[Path, Any], Any]
    auto_class: str
    modules: list[str]
    adapters: dict[str, Any]
    """The ``targets`` of our configuration."""


def llama() -> Any:
    return reference_model("llama, biases everywhere").eval()


CASES = {
    "llama": Case(llama, text, "AutoModelForCausalLM", ["q_proj", "down_proj"], {"decoder": ["q_proj", "down_proj"]}),
    "qwen2_vl": Case(
        test_qwen2_vl.reference_model,
        pages(test_qwen2_vl),
        "AutoModelForImageTextToText",
        ["v_proj", "up_proj", "fc1", "mlp.0", "mlp.2"],
        {"vision": ["up_proj"], "connector": "all", "decoder": ["v_proj", "layers.0.mlp.up_proj"]},
    ),
    "llava": Case(
        test_pixtral.reference_model,
        pages(test_pixtral),
        "AutoModelForImageTextToText",
        ["q_proj", "linear_1"],
        {"vision": ["q_proj"], "connector": ["fc1"], "decoder": ["q_proj"]},
    ),
    "qwen2_audio": Case(
        test_qwen2_audio.reference_model,
        lambda folder, ours: test_qwen2_audio.heard(folder, ours, [test_qwen2_audio.PAGES["one clip"]]),
        test_qwen2_audio.AUTO,
        ["out_proj", "fc1", "multi_modal_projector.linear"],
        {"audio": ["o_proj", "up_proj"], "audio_connector": "all"},
    ),
}


def adapted(base: Any, modules: list[str], kind: str, **more: Any) -> Any:
    """Return the reference model with adapters of peft whose values are not the initial ones."""
    import peft

    # ``fc1`` would also match the up projection of a decoder under another name: peft matches ends of names.
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=modules, use_dora=kind == "dora", **more)
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


@dataclass(frozen=True)
class Pair:
    ours: Any
    theirs: Any
    checkpoint: Path
    adapters: dict[str, Any]
    inputs: Any

    def parameter(self, path: str, name: str) -> nn.Parameter:
        """Return their parameter of the adapter of our layer ``path``."""
        layout = layout_of(self.theirs.base_model.model.config.model_type)
        module = layout.module_name(layout.hf_name(self.ours.config, f"{path}.weight")).removesuffix(".weight")
        found = dict(self.theirs.named_parameters())
        return found[f"base_model.model.{module}.{PARAMETERS[name]}.weight"]


def pair(case: Case, kind: str, folder: Path) -> Pair:
    base = case.model()
    base.save_pretrained(folder / "base")
    plain, checkpoint = imported(folder / "base", folder / "of base")
    modules = [name for name, _ in base.named_modules() if name.endswith(tuple(f".{end}" for end in case.modules))]
    if case.adapters.get("decoder") == ["v_proj", "layers.0.mlp.up_proj"]:
        modules = [name for name in modules if "language_model" not in name or ".mlp." not in name or ".0.mlp." in name]
    theirs = adapted(base, modules, kind)
    theirs.save_pretrained(folder / "adapters")
    report = import_adapters(folder / "adapters", checkpoint, folder / "run/checkpoints")
    path = Path(report.checkpoint)
    ours = build_unset(read_model_config(read_manifest(path).model_config_values or {}), attention="sdpa")
    load_weights(ours, path)
    return Pair(ours.eval(), theirs, path, report.adapters, case.inputs(folder, plain))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_logits_gradients_folders_and_merged_weights(
    name: str, kind: str, tmp_path: Path, parity: Recorder
) -> None:
    from peft import PeftModel

    case = CASES[name]
    both = pair(case, kind, tmp_path)
    expected = {name: case.adapters.get(name, []) for name in TargetsConfig.model_fields}
    assert both.adapters == {"kind": kind, "rank": 4, "alpha": 10.0, "dropout": 0.0, "targets": expected}
    mine, theirs = both.inputs.ours(both.ours), both.inputs.theirs(both.theirs)
    count = len(theirs)  # Ours may have rows of a dummy document at the end.
    parity(f"peft, {kind}", "logits", distance(mine[:count], theirs), BOUND)
    with torch.no_grad():
        plain = both.inputs.theirs(loaded(tmp_path / "base", case.auto_class))
    assert distance(plain, theirs) > 0.01, "the adapters have no effect"

    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    mine[:count].backward(upstream)
    theirs.backward(upstream)
    for path, layer in adapted_layers(both.ours).items():
        for parameter in PARAMETERS if kind == "dora" else ("lora_A", "lora_B"):
            other = both.parameter(path, parameter).grad
            parity(f"peft, {kind}", "gradients", distance(getattr(layer, parameter).grad, other), GRADIENT_BOUND)

    export_adapters(both.checkpoint, tmp_path / "back")
    before, after = load_file(tmp_path / "adapters" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        again = PeftModel.from_pretrained(loaded(tmp_path / "base", case.auto_class), tmp_path / "back")
        assert torch.equal(both.inputs.theirs(again.eval()), theirs)

    report = export_weights(both.checkpoint, tmp_path / "merged", to=HuggingFace())
    assert report.merged == len(adapted_layers(both.ours))
    merged = dict(both.theirs.merge_and_unload().named_parameters())
    for parameter, values in loaded(tmp_path / "merged", case.auto_class).named_parameters():
        parity(f"peft, {kind}", "merged weights", distance(values, merged[parameter]), 1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_same_results_with_dropout(kind: str, tmp_path: Path, parity: Recorder) -> None:
    """Peft's dropout layers are replaced by ones that drop what our masks drop."""
    both = pair(CASES["llama"], kind, tmp_path)
    values = both.ours.config.model_dump()
    values["adapters"]["dropout"] = 0.3
    ours = build_unset(read_model_config(values), attention="sdpa")
    ours.load_state_dict(both.ours.state_dict())
    mine = both.inputs.ours(ours.train())
    modules = dict(both.theirs.named_modules())
    for path, layer in adapted_layers(ours).items():
        assert layer.masks is not None
        module = modules[f"base_model.model.{path.replace('decoder.', 'model.')}"]
        module.lora_dropout["default"] = _Masked(layer.masks.dropped(SubLayer.ATTENTION, layer.in_features), 0.3)
        module.train()
    theirs = both.inputs.theirs(both.theirs)
    parity(f"peft, {kind}", "logits with dropout", distance(mine, theirs), BOUND)
    assert distance(mine, both.inputs.ours(ours.eval())) > 0.01


class _Masked(nn.Module):
    def __init__(self, dropped: Tensor, rate: float) -> None:
        super().__init__()
        self.dropped, self.rate = dropped, round(rate * 2**16) / 2**16

    def forward(self, rows: Tensor) -> Tensor:
        return rows.masked_fill(self.dropped, 0.0) / (1 - self.rate)


def test_the_commands_exchange_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = pair(CASES["llama"], "lora", tmp_path)
    words = ["checkpoint", "import", str(tmp_path / "adapters"), str(tmp_path / "second"), "--from", "peft", "--json"]
    assert main(words) == 2
    assert "--base goes with --from peft" in capsys.readouterr().err
    assert main([*words, "--base", str(tmp_path / "of base")]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == both.adapters
    assert main(["checkpoint", "export", str(tmp_path / "second"), str(tmp_path / "out"), "--to", "peft"]) == 0
    mine, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "adapters"))
    assert {key: values.tolist() for key, values in mine.items()} == {k: v.tolist() for k, v in theirs.items()}
    assert main(["checkpoint", "export", str(tmp_path / "of base"), str(tmp_path / "y"), "--to", "peft"]) != 0
    assert "its model has no adapters" in capsys.readouterr().err


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only 'LORA'"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the weights of the base"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, "not supported: rank_pattern="),
    "biases": ({"bias": "all"}, "not supported: bias='all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "not supported: modules_to_save="),
    "rank": ({"r": 8}, r"lora_A is \[4, 64\], expected \[8, 64\]"),
    "rank that is no number": ({"r": [4]}, "r or lora_alpha is missing or no number"),
    "negative alpha": ({"lora_alpha": -1}, "alpha"),
    "no magnitudes": ({"use_dora": True}, "q_proj.magnitude is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_that_cannot_be_computed_is_rejected(name: str, folder: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    values = json.loads((folder / "adapters" / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | change))
    (tmp_path / WEIGHTS).symlink_to(folder / "adapters" / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        import_adapters(tmp_path, folder / "of base/checkpoints/step-00000000", tmp_path / "run")
    assert not (tmp_path / "run").exists()


FAMILIES = {
    "qwen2_vl": test_qwen2_vl.reference_model,
    "llava": test_pixtral.reference_model,
    "mllama": mllama_reference.reference_model,
    "fuyu": test_fuyu.reference_model,
    "qwen2_audio": test_qwen2_audio.reference_model,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_modules_are_those_of_the_class(family: str, tmp_path: Path) -> None:
    base = FAMILIES[family]()
    base.save_pretrained(tmp_path / "base")
    ours, _ = imported(tmp_path / "base", tmp_path / "of base")
    layout, modules = layout_of(family), dict(base.named_modules())
    layers = [path for path, module in ours.named_modules() if type(module) is nn.Linear]
    names = {
        layout.module_name(layout.hf_name(ours.config, f"{path}.weight")).removesuffix(".weight") for path in layers
    }
    assert names <= modules.keys(), sorted(names - modules.keys())[:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft")
    pair(CASES["llama"], "lora", path)
    return path


def test_other_files_are_rejected(folder: Path, tmp_path: Path) -> None:
    base = folder / "of base/checkpoints/step-00000000"
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        import_adapters(tmp_path, base, tmp_path / "run")
    (tmp_path / CONFIG).write_text((folder / "adapters" / CONFIG).read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Pickled weights are not read"):
        import_adapters(tmp_path, base, tmp_path / "run")
    tensors = load_file(folder / "adapters" / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name.replace("layers.0", "layers.9"): tensors[name].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"layers\.9\..* is not an adapter of a layer of llama"):
        import_adapters(tmp_path, base, tmp_path / "run")


def test_scaling_by_the_root_of_the_rank(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "adapters" / CONFIG).read_text()) | {"use_rslora": True}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    (tmp_path / WEIGHTS).symlink_to(folder / "adapters" / WEIGHTS)
    report = import_adapters(tmp_path, folder / "of base/checkpoints/step-00000000", tmp_path / "run")
    assert report.adapters["alpha"] == 20.0  # alpha / sqrt(4), as alpha' / 4


def test_a_fused_projection_has_no_counterpart(tmp_path: Path) -> None:
    base = test_qwen2_vl.reference_model()
    base.save_pretrained(tmp_path / "base")
    _, checkpoint = imported(tmp_path / "base", tmp_path / "of base")
    fused = [name for name, _ in base.named_modules() if name.endswith("blocks.0.attn.qkv")]
    adapted(base, fused, "lora").save_pretrained(tmp_path / "adapters")
    with pytest.raises(
        CheckpointError, match=r"qkv.* our model stores visual\.blocks\.0\.attn\.qkv\.weight in another"
    ):
        import_adapters(tmp_path / "adapters", checkpoint, tmp_path / "run")
    layout, config = layout_of("qwen2_vl"), read_model_config(read_manifest(checkpoint).model_config_values or {})
    assert isinstance(config, ModelConfig)
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj \(in visual\.blocks\.0\.attn\.qkv\.weight\)"):
        exchanged_layers(layout, config, ["vision.layers.0.self_attn.q_proj"])
