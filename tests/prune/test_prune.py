"""Pruning a decoder: exact if the removed units contribute nothing, else better than removing random units."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pruning import by_chance
from data_pipeline.batch import MultimodalBatch
from data_pipeline.loader.loader import Loader
from mmscale.checkpoint import load_weights, read_manifest, verify
from mmscale.checkpoint.imports.write import manifest_of_weights, new_share, write_checkpoint
from mmscale.checkpoint.share import TensorPiece
from mmscale.checkpoint.warm_start import match
from mmscale.cli.main import main
from mmscale.config import dump, load
from mmscale.engine.partition import parameter_table
from mmscale.models.build import build_model, build_weights, count_parameters, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.prune import Calibration, PruneReport, prune_checkpoint
from mmscale.prune.activations import scores_of_activations
from mmscale.prune.limits import conflicts
from mmscale.prune.weights import scores_of_weights
from mmscale.run.config import RunConfig
from tests.engine.ranks import ROOT
from tests.prune.larger_model import grow

RUN = "configs/recipes/emoji-text.yaml"
DATA = ["data.lanes=1", "data.packing.max_tokens=256", "evaluation.sets=[]"]
HELD_OUT = (
    "evaluation.sets=[{name: pages, kind: perplexity, manifest: examples/text/shards/pages-heldout.manifest, "
    "template: {kind: text}, limit: 16}]"
)
TINY_EPS = 1e-10  # A narrower norm has another mean square, so a larger eps would change the result.
SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_dim": 24,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "mlp": {"kind": "dense", "hidden_dim": 20},
    "norm": {"eps": TINY_EPS},
    "rope": {"theta": 100},
}
LARGE: dict[str, Any] = {
    **SMALL,
    "hidden_dim": 40,
    "num_layers": 4,
    "attention": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 16},
    "mlp": {"kind": "dense", "hidden_dim": 33},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope": {"theta": 100, "scaling": {"original_context": 32}}},
    "tied, biases": {
        "tie_embeddings": True,
        "attention": {"qkv_bias": True, "out_bias": True},
        "mlp": {"bias": True, "gated": False, "activation": "gelu"},
    },
    "norms behind, over all heads": {"norm_placement": "post", "attention": {"qk_norm": "full"}},
    "norms of heads, half rotated": {"attention": {"qk_norm": "head"}, "rope": {"theta": 100, "fraction": 0.5}},
    "no positions, new tokens": {"rope": None, "extra_tokens": {"rows": 3}},
    "layer norms": {"norm": {"kind": "layernorm", "eps": TINY_EPS}, "hidden_dim": 24},
}


def config(base: dict[str, Any], changes: dict[str, Any]) -> ModelConfig:
    decoder = {
        **base,
        **{k: {**base[k], **v} if isinstance(v, dict) and k in ("attention", "mlp") else v for k, v in changes.items()},
    }
    return ModelConfig.model_validate({"decoder": decoder})


def save(model: MultimodalModel, run: Path) -> Path:
    """Write a checkpoint of the model's weights."""
    pieces = [TensorPiece(f"{name}|frozen", 0, values.detach()) for name, values in model.named_parameters()]
    manifest = manifest_of_weights(model, "fp32", "made", {})
    return write_checkpoint(run / "checkpoints", manifest, iter([new_share(0, pieces, run)]))


def random_model(config: ModelConfig) -> MultimodalModel:
    """Return a model in which biases and norms are random as well."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() == 1:
                values.copy_(1 + torch.randn(values.shape, generator=generator) / 4)
    return model.eval()


def pruned(source: Path, small: ModelConfig, folder: Path, calibration: Calibration | None) -> PruneReport:
    folder.mkdir(parents=True)
    (folder / "model.yaml").write_text(dump(small))
    return prune_checkpoint(source, load(folder / "model.yaml", [], ModelConfig), folder / "checkpoints", calibration)


def batches(run: RunConfig, count: int) -> list[MultimodalBatch]:
    with Loader(run.data, media_spec(run.model), seed=5) as loader:
        return [step.microbatches[0] for step in islice(loader, count)]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # Paths of the bundled data are relative to it.


@pytest.fixture(scope="module")
def run() -> RunConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return load(RUN, DATA, RunConfig).value


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_units_without_effect_are_removed(family: str, run: RunConfig, tmp_path: Path) -> None:
    """Embed the small model in a larger one; pruning that restores the small model's logits.

    The largest error of a logit is 2.6e-6 of the largest logit (float32 sums in another order). A wrong channel, head
    or factor would change the first digit.
    """
    changes = FAMILIES[family]
    small, large = config(SMALL, changes), config(LARGE, changes)
    model = random_model(small)
    (batch,) = batches(run, 1)
    with torch.no_grad():
        wanted = model.head(model(batch).hidden)
        for calibration, blocks in ((Calibration(run, 2), [1, 2]), (None, [0, 3])):  # Without data: first and last.
            folder = tmp_path / str(calibration is not None)
            grown = grow(model, large, blocks)
            assert torch.allclose(grown.head(grown(batch).hidden), wanted, atol=1e-5 * float(wanted.abs().max()))
            report = pruned(save(grown, folder / "large"), small, folder / "small", calibration)
            assert report.blocks == tuple(blocks)
            assert verify(Path(report.checkpoint)) == []
            cut = build_model(small, seed=3)
            load_weights(cut, Path(report.checkpoint))
            found = cut.eval().head(cut(batch).hidden)
            worst = float((found - wanted).abs().max() / wanted.abs().max())
            print(f"{family}, {report.importance}: {worst:.1e}")
            assert worst < 1e-5
            ours, theirs = read_manifest(Path(report.checkpoint)), build_weights(small)
            assert {name: list(entry.shape) for name, entry in ours.parameters.items()} == {
                name: entry["shape"] for name, entry in parameter_table(theirs).items()
            }
            assert match(theirs, ours).complete  # A stage can load all weights.


TRAINED = {
    **SMALL,
    "hidden_dim": 64,
    "num_layers": 4,
    "attention": {"num_heads": 4},
    "mlp": {"kind": "dense", "hidden_dim": 160},
}
CUT = {
    **TRAINED,
    "hidden_dim": 48,
    "num_layers": 3,
    "attention": {"num_heads": 3, "head_dim": 16},
    "mlp": {"kind": "dense", "hidden_dim": 96},
}


@pytest.fixture(scope="module")
def trained(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with a model that was trained on the bundled pages for some seconds."""
    model = build_model(config(TRAINED, {}), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        steps = batches(run, 70)
    for batch in steps:
        loss = model.head(model(batch).hidden, batch.labels, batch.loss_weights) / batch.weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    save(model, folder)
    return folder


@pytest.mark.long
def test_a_calibrated_cut_loses_less_than_random_ones(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the loss on held-out pages, with all axes cut at once and the same norm factors."""
    calibration = Calibration(load(RUN, [*DATA[:2], HELD_OUT], RunConfig).value, 8)
    report = pruned(trained, config(CUT, {}), tmp_path / "calibrated", calibration)
    before, after = report.losses_before["pages"], report.losses_after["pages"]
    assert report.tokens > 1000
    assert len(report.blocks) == 3
    measured = Calibration.scores
    chances = []
    for seed in range(3):
        drawn = functools.partial(lambda self, model, seed: (by_chance(measured(self, model)[0], seed), 0), seed=seed)
        monkeypatch.setattr(Calibration, "scores", functools.partialmethod(drawn))
        chances.append(pruned(trained, config(CUT, {}), tmp_path / str(seed), calibration).losses_after["pages"])
    print(f"before {before:.3f}, calibrated {after:.3f}, by chance {chances}")
    assert before < after < min(chances)


def test_scores_of_weights_need_both_writers_and_readers() -> None:
    """A unit without weights that write to it, or without weights that read it, has the score 0."""
    model = random_model(config(SMALL, {}))
    block = model.decoder.layers[1]
    with torch.no_grad():
        for layer in model.decoder.layers:
            for each in (*list(layer.self_attn.children())[:3], layer.mlp.gate_proj, layer.mlp.up_proj):
                each.weight[:, 5] = 0
            layer.self_attn.o_proj.weight[7] = layer.mlp.down_proj.weight[7] = 0
        model.head.weight[:, 5] = model.decoder.embed_tokens.weight[:, 7] = 0
        model.head.weight[:, 9] = 0  # Channel 9 keeps its score, because blocks read it.
        block.self_attn.o_proj.weight[:, 16:24] = 0  # Head 2.
        block.self_attn.v_proj.weight[:8] = 0  # Heads 0 and 1.
        block.mlp.down_proj.weight[:, 3] = block.mlp.gate_proj.weight[4] = block.mlp.up_proj.weight[6] = 0
    values = dict(model.named_parameters())
    scores = scores_of_weights(model.config.decoder, lambda name: values[name].detach())
    assert torch.nonzero(scores.channels == 0).flatten().tolist() == [5, 7]
    assert torch.nonzero(scores.blocks[1].heads == 0).flatten().tolist() == [0, 1, 2]
    assert torch.nonzero(scores.blocks[1].neurons == 0).flatten().tolist() == [3, 4, 6]
    # The input of the second norm of block 1 is the embedding plus the outputs of all earlier projections.
    first, second = (layer.state_dict() for layer in model.decoder.layers)
    writers = (first["self_attn.o_proj.weight"], first["mlp.down_proj.weight"], second["self_attn.o_proj.weight"])
    energy = values["decoder.embed_tokens.weight"].detach().var(0, correction=0)
    energy += values["decoder.embed_tokens.weight"].detach().mean(0).square()
    energy += torch.stack([writer.norm(dim=1) ** 2 for writer in writers]).sum(0)
    assert torch.allclose(scores.blocks[1].mlp_energy, energy / energy.sum(), rtol=1e-4)


def test_scores_of_activations_are_norms_of_the_contributions_of_units(run: RunConfig) -> None:
    """Compute the contribution of each head and neuron alone: the output of a projection with zero other inputs."""
    model = random_model(config(SMALL, {"attention": {"out_bias": False}}))
    (batch,) = batches(run, 1)
    batch = dataclasses.replace(batch, valid=torch.arange(len(batch.valid)) < 200)  # As if dummy documents followed.
    seen: dict[str, Tensor] = {}
    block = model.decoder.layers[1]
    for name, module in (("heads", block.self_attn.o_proj), ("neurons", block.mlp.down_proj)):
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0][batch.valid]}))
    block.register_forward_hook(lambda module, args, output: seen.update(before=args[0], after=output[0]))
    scores, tokens = scores_of_activations(model, [batch])
    assert tokens == 200 < len(batch.valid)
    for name, module, width in (("heads", block.self_attn.o_proj, 8), ("neurons", block.mlp.down_proj, 1)):
        inputs = seen[name]
        for unit, score in enumerate(getattr(scores.blocks[1], name).tolist()):
            alone = torch.zeros_like(inputs)
            alone[:, unit * width : (unit + 1) * width] = inputs[:, unit * width : (unit + 1) * width]
            assert score == pytest.approx(float((alone @ module.weight.detach().T).norm(dim=1).mean()), rel=1e-4)
    before, after = seen["before"][batch.valid], seen["after"][batch.valid]
    cosines = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    assert scores.influence is not None
    assert float(scores.influence[1]) == pytest.approx(1 - float(cosines.mean()), rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_one_table_for_embedding_and_head(before: bool, after: bool, tmp_path: Path) -> None:
    """If the source has two tables, the tied table comes from the head. If it has one, both tables come from it."""
    model = random_model(config(SMALL, {"tie_embeddings": before}))
    shallow = config(SMALL, {"tie_embeddings": after, "num_layers": 1})
    report = pruned(save(model, tmp_path), shallow, tmp_path / "cut", None)
    cut = build_model(shallow)
    load_weights(cut, Path(report.checkpoint))
    assert torch.equal(cut.decoder.embed_tokens.weight, model.head.weight)
    assert torch.equal(cut.head.weight, model.head.weight)


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "num_layers": ({"num_layers": 9}, "num_layers: 9 is more than the source's 4; pruning only removes units"),
    "hidden_dim": ({"hidden_dim": 80}, "hidden_dim: 80 is more than the source's 64"),
    "vocab_size": ({"vocab_size": 100}, "decoder.vocab_size: 2048 in the source; pruning keeps the vocabulary"),
    "extra": ({"extra_tokens": {"rows": 2}}, "decoder.extra_tokens: null in the source"),
    "theta": ({"rope": {"theta": 7}}, "decoder.rope.theta: 100.0 in the source, and no cut can change it"),
    "norm": ({"norm": {"kind": "layernorm"}}, "decoder.norm.kind: rmsnorm in the source"),
    "post": ({"norm_placement": "post"}, "decoder.norm_placement: pre in the source"),
    "bias": ({"attention": {"num_heads": 3, "head_dim": 16, "qkv_bias": True}}, "qkv_bias: False in the source"),
    "pairs": ({"attention": {"num_heads": 3, "head_dim": 12}}, "12 rotated .* expected one of \\[2, 4, 8, 16\\]"),
    "groups": ({"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}}, "keep at least 4 key heads"),
    "experts": (
        {"mlp": {"kind": "moe", "num_experts": 4, "experts_per_token": 1, "expert_dim": 8}},
        "experts are not pruned",
    ),
    "nothing": ({**TRAINED}, "nothing to prune"),
}


@pytest.mark.parametrize("size", ["1b", "3b"])
def test_llama_3_2_can_be_cut_out_of_llama_3_1_8b(size: str) -> None:
    """Widths of 8B: its published configuration, which Llama 3.2 11B Vision's decoder shares but for new tokens."""
    smaller = load(f"configs/models/llama3.2-{size}.yaml", [], ModelConfig).value
    seeing = load("configs/models/llama3.2-11b-vision.yaml", [], ModelConfig).value
    source = ModelConfig(decoder=seeing.decoder.model_copy(update={"extra_tokens": None}))
    assert count_parameters(source).total == 8_030_261_248
    assert conflicts(source, smaller) == []


def test_heads_with_yarn_cannot_be_narrower() -> None:
    yarn = {"rope": {"theta": 100.0, "scaling": {"kind": "yarn", "factor": 4, "original_context": 64}}}
    source, heads = config(SMALL, yarn), SMALL["attention"]
    narrow = {**heads, "head_dim": source.decoder.attention.resolved_head_dim(source.decoder.hidden_dim) // 2}
    found = conflicts(source, config(SMALL, {**yarn, "attention": narrow}))
    assert [each.path for each in found] == ["decoder.attention.head_dim"]
    assert "rope.scaling.kind=yarn" in found[0].reason
    assert conflicts(source, config(SMALL, {**yarn, "num_layers": 1})) == []


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts_are_reported_with_their_lines(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = CONFLICTS[name]
    file = tmp_path / "model.yaml"
    file.write_text(dump(ModelConfig.model_validate({"decoder": {**CUT, **changes}})))
    assert main(["checkpoint", "prune", str(trained), str(file), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert f"{file}:" in error
    assert not (tmp_path / "run").exists()


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, words = tmp_path / "model.yaml", ["checkpoint", "prune"]
    file.write_text(dump(config(CUT, {})))
    assert main([*words, str(trained), str(file), str(tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["importance"], printed["tokens"], printed["blocks"]) == ("weights", 0, [0, 2, 3])
    assert printed["after"]["hidden_dim"] == 48 < printed["before"]["hidden_dim"]
    assert main([*words, str(trained), str(file), str(tmp_path / "table")]) == 0
    assert "hidden_dim" in capsys.readouterr().out
    wrong = [
        ([str(trained), str(file), str(tmp_path / "run")], "already exists; give another run folder"),
        ([str(tmp_path / "none"), str(file), str(tmp_path / "new")], "has no checkpoints; give a run folder"),
        ([str(trained), "configs/models/tiny.yaml", str(tmp_path / "new")], "leave out vision and connector"),
        ([str(trained), str(file), str(tmp_path / "new"), "--data", str(file)], "run_dir"),
    ]
    for arguments, message in wrong:
        assert main([*words, *arguments]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
