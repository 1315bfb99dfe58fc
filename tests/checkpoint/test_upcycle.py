"""Upcycling: a model with experts that starts from a dense checkpoint computes what the dense model did.

The truth is a tiny Hugging Face Llama, imported from its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint import load_weights, read_manifest, warm_start
from mmscale.checkpoint.imports import import_folder
from mmscale.checkpoint.warm_start import match
from mmscale.errors import CheckpointError
from mmscale.models.build import build_model, build_weights
from mmscale.models.config import ModelConfig
from tests.checkpoint.plain_engine import plain_engine
from tests.checkpoint.upcycle_programs import with_mlp
from tests.engine.ranks import run_ranks
from tests.hf.decoders import saved_reference
from tests.models.packs import text_document
from tests.models.tiny import config

WIDTH, SLICES = 128, 4
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "renormalise": True}
AFTER = {"num_experts": 3, "experts_per_token": 2, "router": "topk_then_softmax"}
SECOND = {**AFTER, "scale": 2.5, "every": 2, "dense": {"hidden_dim": WIDTH}}
SLICED = {
    **EXPERTS,
    "router": "sigmoid",
    "num_experts": 12,
    "experts_per_token": 2 * SLICES,
    "expert_dim": WIDTH // SLICES,
}
CASES: dict[str, dict[str, Any]] = {
    "copies": {"mlp": EXPERTS, "zero": 3},
    "second": {"mlp": SECOND, "zero": 2},
    "slices": {"mlp": SLICED, "zero": 3, "expert_parallel": 2},
}
FAMILY = "llama, tied, grouped, stretched"
BLOCK = "decoder.layers.1.mlp"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Return the imported checkpoint, and the logits of transformers for the document of the cases."""
    folder = tmp_path_factory.mktemp("dense")
    reference = saved_reference(FAMILY, folder / "hf").eval()
    path = Path(import_folder(folder / "hf", folder / "run").checkpoint)
    tokens = text_document(3, 12, reference.config.vocab_size).tokens
    with torch.no_grad():
        return path, reference(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def answers(dense: tuple[Path, Tensor]) -> dict[str, Any]:
    arguments = {"path": str(dense[0]), "cases": list(CASES.values())}
    one, two = run_ranks("tests.checkpoint.upcycle_programs:upcycle_cases", 2, arguments)
    assert [answer["weights"] for answer in one] == [answer["weights"] for answer in two]
    return dict(zip(CASES, one, strict=True))


def experts_of(values: dict[str, list[float]], width: int) -> tuple[Tensor, Tensor]:
    gate_up, down = (torch.tensor(values[f"{BLOCK}.experts.{name}_proj"]) for name in ("gate_up", "down"))
    return gate_up.view(-1, 2, width, 64), down.view(-1, 64, width)


def dense_mlp(path: Path) -> list[Tensor]:
    model = build_model(ModelConfig.model_validate(read_manifest(path).model_config_values))
    load_weights(model, path)
    return [model.get_parameter(f"{BLOCK}.{name}_proj.weight").detach() for name in ("gate", "up", "down")]


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_dense_model(
    case: str, dense: tuple[Path, Tensor], answers: dict[str, Any]
) -> None:
    torch.testing.assert_close(torch.tensor(answers[case]["logits"]), dense[1], rtol=1e-4, atol=1e-5)


@pytest.mark.dist
def test_every_expert_is_the_dense_feed_forward_and_the_router_is_fresh(
    dense: tuple[Path, Tensor], answers: dict[str, Any]
) -> None:
    answer, (gate, up, down) = answers["copies"], dense_mlp(dense[0])
    gate_up, downs = experts_of(answer["weights"], WIDTH)
    for expert in range(4):
        assert torch.equal(gate_up[expert, 0], gate)
        assert torch.equal(gate_up[expert, 1], up)
        assert torch.equal(downs[expert], down)
    fresh = dict(build_model(with_mlp(dense[0], **EXPERTS), seed=2).named_parameters())
    assert answer["weights"][f"{BLOCK}.gate.weight"] == fresh[f"{BLOCK}.gate.weight"].flatten().tolist()
    assert answer["missing"] == [f"decoder.layers.{number}.mlp.gate.weight" for number in range(3)]
    assert not answer["unused"]
    assert "4 experts in 3 blocks: each a copy of the dense feed-forward" in answer["text"]
    trained, _ = experts_of(answer["trained"], WIDTH)
    assert not torch.equal(trained[0], trained[1]), "tokens of an expert must change it"


@pytest.mark.dist
def test_slices_of_a_copy_make_the_dense_feed_forward(dense: tuple[Path, Tensor], answers: dict[str, Any]) -> None:
    answer, (gate, up, down) = answers["slices"], dense_mlp(dense[0])
    gate_up, downs = experts_of(answer["weights"], WIDTH // SLICES)
    for copy in range(3):
        group = slice(copy * SLICES, (copy + 1) * SLICES)
        assert torch.equal(torch.cat([*gate_up[group, 0]]), gate)
        assert torch.equal(torch.cat([*gate_up[group, 1]]), up)
        assert torch.equal(torch.cat([*downs[group]], dim=1), down * SLICES)
    router = torch.tensor(answer["weights"][f"{BLOCK}.gate.weight"]).view(3, SLICES, 64)
    assert torch.equal(router, router[:, :1].expand_as(router))
    assert not torch.equal(router[0], router[1])
    assert not answer["missing"]
    assert "12 experts in 3 blocks: each 1/4 of the dense feed-forward" in answer["text"]


@pytest.mark.parametrize("mlp", [EXPERTS, SLICED], ids=["copies", "slices"])
@pytest.mark.parametrize("world_size", [2, 5, 7])
def test_ranks_that_own_parts_of_experts_read_the_same(
    dense: tuple[Path, Tensor], mlp: dict[str, Any], world_size: int
) -> None:
    whole, cut = (build_model(with_mlp(dense[0], **mlp), seed=2) for _ in range(2))
    warm_start(plain_engine(whole), dense[0], upcycle=True)
    for rank in range(world_size):
        warm_start(plain_engine(cut, rank, world_size), dense[0], upcycle=True)
    for name, values in whole.named_parameters():
        assert torch.equal(values, cut.get_parameter(name)), name


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        ({**EXPERTS, "renormalise": False}, "renormalise=false: the weights of the chosen experts do not sum to 1"),
        ({**EXPERTS, "shared_dim": 8}, "shared_dim=8: a shared expert would add to the dense output; set it to 0"),
        ({**EXPERTS, "activation": "gelu"}, "activation=gelu: must be silu, as in the dense feed-forward"),
        (
            {**EXPERTS, "expert_dim": 48},
            "expert_dim=48: must be 128, the width of the dense feed-forward, or a divisor",
        ),
        ({**EXPERTS, "expert_dim": 256}, "expert_dim=256: must be 128"),
        ({**EXPERTS, "expert_dim": 32}, "experts_per_token=2: must be a multiple of 4, because an expert of"),
        ({**SLICED, "num_experts": 14}, "num_experts=14: must be a multiple of 4"),
        (
            {**SLICED, "choice_groups": 2, "groups_per_token": 2},
            "choice_groups=2: each group must have a multiple of 4 experts",
        ),
        ({**EXPERTS, "router": "sigmoid", "renormalise": False}, "renormalise=false: the weights"),
    ],
)
def test_experts_of_another_function_are_rejected(
    dense: tuple[Path, Tensor], mlp: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=r"upcycle: decoder\.layers\.0\.mlp: ") as caught:
        match(build_weights(with_mlp(dense[0], **mlp)), read_manifest(dense[0]), upcycle=True)
    assert message in str(caught.value)


def test_weights_that_are_no_dense_feed_forward_of_the_stream_are_rejected(dense: tuple[Path, Tensor]) -> None:
    manifest, model = read_manifest(dense[0]), build_weights(with_mlp(dense[0], **EXPERTS))
    moe = manifest.model_copy(
        update={
            "model_config_values": model.config.model_dump(mode="json"),
            "parameters": {"decoder.layers.0.mlp.experts.down_proj": manifest.parameters["decoder.norm.weight"]},
        }
    )
    with pytest.raises(CheckpointError, match="the loaded weights have experts already; leave out `upcycle`"):
        match(model, moe, upcycle=True)
    with pytest.raises(CheckpointError, match="no feed-forward of 128 channels on a stream of 32"):
        match(build_weights(config(None, mlp={"kind": "moe", "expert_dim": 128, **EXPERTS})), manifest, upcycle=True)
    unknown = manifest.model_copy(update={"model_config_values": None})
    with pytest.raises(CheckpointError, match="the checkpoint has no valid configuration of its model"):
        match(model, unknown, upcycle=True)


def test_without_the_key_experts_keep_their_first_values(dense: tuple[Path, Tensor]) -> None:
    manifest, model = read_manifest(dense[0]), build_weights(with_mlp(dense[0], **EXPERTS))
    report = match(model, manifest)
    assert not report.upcycled
    assert f"{BLOCK}.experts.down_proj" in report.missing
    assert f"{BLOCK}.down_proj.weight" in report.unused
    assert not match(model, manifest, ["decoder"], upcycle=True).missing[3:]
    tower = config("embedding", mlp={"kind": "moe", "expert_dim": 24, **EXPERTS})
    assert not match(build_weights(tower), manifest, ["vision"], upcycle=True).upcycled
