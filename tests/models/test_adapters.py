"""Models with adapters: targets, first values, dropout by place, operations, generation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MultimodalBatch
from data_pipeline.packing.collate import concatenate
from mmscale.engine.graph import recompute
from mmscale.errors import ConfigError
from mmscale.models.build import build_model, check_adapters, count_parameters, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.flops import cost_per_patch
from mmscale.models.generation import generate
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.adapters import ADAPTER_PARAMETERS, adapted_layers, merged_rows
from mmscale.objectives.next_token import NextToken
from mmscale.optim.schedule import decays, freeze
from mmscale.optim.stages import StageConfig
from tests.models import test_modality
from tests.models.audio import tower_config
from tests.models.packs import image_document, in_lane, pack, text_document
from tests.models.tiny import DENSE, MOE, VOCAB, config

KEY = (1, 6)
EVERYWHERE = {"vision": "all", "connector": "all", "decoder": "all"}


def adapted(
    connector: str | None = "cross_attention", *, decoder: dict[str, Any] | None = None, **adapters: Any
) -> ModelConfig:
    block = config(connector, **(decoder or {})).model_dump()
    targets = EVERYWHERE if connector else {"decoder": "all"}
    return ModelConfig.model_validate({**block, "adapters": {"rank": 4, "targets": targets, **adapters}})


def build(settings: ModelConfig) -> MultimodalModel:
    """Return a model whose adapters have an effect."""
    net = build_model(settings)
    assert isinstance(net, MultimodalModel)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted_layers(net).values():
            layer.lora_B.normal_(std=0.2, generator=generator)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.2 * torch.rand(layer.magnitude.shape, generator=generator))
    return net


def lane(net: MultimodalModel, number: int, key: tuple[int, int] | None = KEY) -> MultimodalBatch:
    spec = media_spec(net.config)
    docs = [text_document(number, 3 + 2 * number, VOCAB)]
    if net.config.connector is not None:
        docs.append(image_document(spec, number, 4, [(2, 2), (4, 2)], VOCAB))
    return in_lane(pack(docs, spec), number, key)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_model_computes_what_its_base_computes(kind: str) -> None:
    net, plain = build_model(adapted(kind=kind)), build_model(config("cross_attention"))
    kept = {name: p for name, p in net.named_parameters() if name.rpartition(".")[2] not in ADAPTER_PARAMETERS}
    base = dict(plain.named_parameters())
    assert kept.keys() == base.keys()
    assert all(torch.equal(values, base[name]) for name, values in kept.items())
    batch = lane(plain, 1)  # type: ignore[arg-type]
    torch.testing.assert_close(net(batch).hidden, plain(batch).hidden, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    for path, layer in adapted_layers(net).items():
        bound = 1 / math.sqrt(layer.in_features)  # Of torch's kaiming_uniform_(a=sqrt(5)), which peft uses.
        assert 0.8 * bound < layer.lora_A.abs().max() <= bound, path
        assert not layer.lora_B.any()
        if layer.magnitude is not None:
            torch.testing.assert_close(layer.magnitude, layer.weight.norm(dim=1))
    values = [layer.lora_A.flatten()[:8].tolist() for layer in adapted_layers(net).values()]
    assert len({tuple(each) for each in values}) == len(values), "two adapters begin with equal values"


def test_adapters_are_a_component() -> None:
    settings = adapted(kind="dora", targets={"decoder": ["q_proj"], "vision": ["layers.1.mlp.up_proj"]})
    net = build_model(settings)
    assert list(adapted_layers(net)) == [
        "vision.layers.1.mlp.up_proj",
        *(f"decoder.layers.{n}.self_attn.q_proj" for n in range(4)),
    ]
    assert settings.components[-1] == "adapters"
    counted, plain = count_parameters(settings), count_parameters(config("cross_attention"))
    assert counted.components == {**plain.components, "adapters": 4 * (4 * 64 + 32) + 4 * 64 + 40}
    freeze(net, net.components(), StageConfig(name="s", steps=1, train=("adapters",)))
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == set(ADAPTER_PARAMETERS)
    assert {name for name in trained if not decays(name, net.get_parameter(name).shape)} == {
        name for name in trained if name.endswith("magnitude")
    }


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"decoder": ["q_prj"]}, r"targets\.decoder: 'q_prj' matches no .* did you mean 'q_proj'\? \(it has "),
    "other block": ({"decoder": ["layers.9.mlp.up_proj"]}, r"layers\.\*\.mlp\.up_proj"),
    "embedding": ({"decoder": ["embed_tokens"]}, r"layers\.\*\.self_attn\.v_proj"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_target_without_a_layer_is_an_error_that_lists_the_layers(name: str) -> None:
    targets, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        check_adapters(adapted(targets=targets))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("gate_up_proj", "leave out 'gate_up_proj'"),
        ("experts", "leave out 'experts'"),
        ("down_proj", "select the other layers by 'mlp.down_proj' and 'shared_expert.down_proj'"),
    ],
)
def test_a_target_that_selects_experts_is_an_error_that_names_the_other_layers(name: str, remedy: str) -> None:
    mlp = {**MOE, "every": 2, "dense": DENSE}
    with pytest.raises(ConfigError, match=rf"{name!r} selects routed experts \(layers.1.mlp.experts.*; {remedy}, or"):
        check_adapters(adapted(None, decoder={"mlp": mlp}, targets={"decoder": [name]}))
    check_adapters(adapted(None, decoder={"mlp": mlp}, targets={"decoder": ["mlp.down_proj", "q_proj"]}))


def test_impossible_blocks_are_rejected() -> None:
    with pytest.raises(ConfigError, match="the model has no linear layers in its vision"):
        check_adapters(adapted(None, targets={"vision": ["q_proj"]}))
    with pytest.raises(ConfigError, match=r"targets\.audio=all: the audio has no linear layers"):
        check_adapters(adapted(targets={"audio": "all"}))
    for change, message in (
        (
            {"dropout": 0.1},
            "images and sounds have no such place; set dropout=0, or leave out targets.vision and targets",
        ),
        ({"targets": {"decoder": []}}, "no component has a target"),
        ({"kind": "qlora"}, "'lora' or 'dora'"),
        ({"targets": {"head": "all"}}, "head"),
    ):
        with pytest.raises(ValidationError, match=message):
            adapted(**change)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_of_a_lane_is_the_same_in_any_microbatch(kind: str) -> None:
    net = build(adapted("hybrid", kind=kind, dropout=0.3, targets={"decoder": "all"}))
    lanes = {number: lane(net, number) for number in (0, 3, 1)}
    outputs = {number: net(batch).hidden for number, batch in lanes.items()}
    for dealt in ([0, 3, 1], [1, 0]):
        whole = replace(concatenate([lanes[number] for number in dealt], media_spec(net.config)), dropout_key=KEY)
        expected = torch.cat([outputs[number] for number in dealt])
        torch.testing.assert_close(net(whole).hidden, expected, rtol=1e-4, atol=1e-5)
    other = net(lane(net, 3, (1, 7))).hidden
    assert not torch.allclose(other, outputs[3], rtol=1e-3)
    masks = [layer.masks.rows.tolist() for layer in adapted_layers(net).values() if layer.masks is not None]
    assert len({tuple(rows) for rows in masks}) == len(masks), "two layers share a mask"
    with pytest.raises(ValueError, match=r"adapters\.dropout=0\.3: a training batch needs dropout_key"):
        net(lane(net, 3, None))
    net.eval()
    assert torch.equal(net(lane(net, 3, None)).hidden, net(lane(net, 3)).hidden)


def gradients(net: MultimodalModel, batch: MultimodalBatch) -> list[torch.Tensor]:
    net.zero_grad()
    NextToken()(net, batch).loss_sum.backward()
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_recomputed_blocks_have_the_same_gradients(kind: str) -> None:
    net = build(adapted(kind=kind, dropout=0.3, targets={"decoder": "all"}))
    freeze(net, net.components(), StageConfig(name="s", steps=1, train=("adapters",)))
    stored = gradients(net, lane(net, 3))
    undo = recompute(net.checkpoint_units())
    again = gradients(net, lane(net, 3))
    undo()
    assert len(stored) == len(net.components()["adapters"])
    assert all(torch.equal(one, other) for one, other in zip(stored, again, strict=True))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_generation_with_a_cache_equals_that_of_merged_weights(kind: str) -> None:
    net = build(adapted(kind=kind)).eval()
    plain = build_model(config("cross_attention")).eval()
    state = net.state_dict()
    with torch.no_grad():
        for path, layer in adapted_layers(net).items():
            own = [state.pop(f"{path}.{name}", None) for name in ADAPTER_PARAMETERS]
            state[f"{path}.weight"] = merged_rows(layer.weight, *own, layer.scaling)  # type: ignore[arg-type]
    plain.load_state_dict(state)
    prompt = lane(net, 2, None)
    first = build_model(config("cross_attention")).eval()
    mine = generate(net, prompt, 6, eos_id=0)
    assert mine == generate(plain, prompt, 6, eos_id=0)  # type: ignore[arg-type]
    assert mine != generate(first, prompt, 6, eos_id=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("connector", "checkpointing"), [(None, True), ("embedding", True), ("cross_attention", False), ("hybrid", True)]
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_operations_are_those_that_torch_counts(connector: str | None, kind: str, checkpointing: bool) -> None:
    """The formula counts up to the gradient of one block's input in each component more: 3 % of 4 blocks."""
    wide = {"attention": {"num_heads": 8, "num_kv_heads": 4}, "hidden_dim": 64}
    settings = adapted(connector, kind=kind, decoder=wide)
    spec = media_spec(settings)
    crops = [(2, 4), (2, 4)] if connector else []
    batch = pack([image_document(spec, n, 40, crops, VOCAB, dummy=n == 2) for n in range(3)], spec)
    net = build_model(settings)
    assert isinstance(net, MultimodalModel)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net.head(net(batch).hidden)
    assert net.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.01)
    freeze(net, net.components(), StageConfig(name="s", steps=1, train=("adapters",)))
    undo = recompute(net.checkpoint_units()) if checkpointing else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        NextToken()(net, batch).loss_sum.backward()
    if undo:
        undo()
    found = net.training_flops(batch, ["adapters"], recompute=checkpointing).hardware
    assert 0.99 < found / counter.get_total_flops() < 1.04
    assert cost_per_patch(settings) == cost_per_patch(settings.model_copy(update={"adapters": None}))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_tower_and_a_projector_of_sounds_have_adapters(kind: str) -> None:
    hears = {"tower": tower_config(padded=False), "projector": {"kind": "conv_gmlp", "rate": 2}}
    targets = {"audio": "all", "audio_connector": ["gmlp.down_proj", "linear"], "decoder": []}
    settings = test_modality.settings(None, audio=hears, adapters={"kind": kind, "rank": 4, "targets": targets})
    net, spec = build_model(settings), media_spec(settings)
    assert {path.partition(".")[0] for path in adapted_layers(net)} == {"audio", "audio_connector"}
    batch = test_modality.packed(spec, *(test_modality.document(spec, seed, "atta") for seed in range(3)))
    freeze(net, net.components(), StageConfig(name="s", steps=1, train=("adapters",)))
    undo = recompute(net.checkpoint_units())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        NextToken()(net, batch).loss_sum.backward()
    undo()
    assert {id(p) for p in net.parameters() if p.grad is not None} == {id(p) for p in net.components()["adapters"]}
    assert 0.99 < net.training_flops(batch, ["adapters"], recompute=True).hardware / counter.get_total_flops() < 1.04
