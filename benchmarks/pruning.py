"""Held-out loss after pruning by activations, by weights and at random, with and without scaling, and of tied tables.

    python -m benchmarks.pruning

Trains the text recipe's decoder (1.4 million parameters) on bundled pages, prunes it along each axis, and scores pages
about concepts that are not in the training pages. Takes minutes on two cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch

from benchmarks.report import Case, main
from data_pipeline.loader.loader import Loader
from mmscale.config import load
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.prune import Calibration
from mmscale.prune.choice import UnitChoice, choose_units
from mmscale.prune.cut import cut_of
from mmscale.prune.scores import Scores
from mmscale.prune.weights import scores_of_weights
from mmscale.run.config import RunConfig

STEPS, BATCHES, SAMPLES, DRAWS = 240, 16, 66, 3
MORE_STEPS = (25, 100)
CONFIG = "configs/recipes/emoji-text.yaml"
PAGES = (
    "evaluation.sets=[{{name: pages, kind: perplexity, manifest: examples/text/shards/pages-heldout.manifest, "
    "template: {{kind: text}}, limit: {}}}]"
)
AXES: dict[str, dict[str, Any]] = {
    "blocks 4 -> 3": {"num_layers": 3},
    "channels 128 -> 96": {"hidden_dim": 96},
    "neurons 384 -> 192": {"mlp": {"kind": "dense", "hidden_dim": 192}},
    "heads 4 -> 2": {"attention": {"num_heads": 2, "head_dim": 32}},
    "width of heads 32 -> 16": {"attention": {"num_heads": 4, "head_dim": 16}},
    "3 blocks of 96 channels, 256 neurons, 3 heads": {
        "num_layers": 3,
        "hidden_dim": 96,
        "mlp": {"kind": "dense", "hidden_dim": 256},
        "attention": {"num_heads": 3, "head_dim": 32},
    },
}


def train(model: MultimodalModel, run: RunConfig, steps: int, rate: float) -> Iterator[int]:
    """Train on the recipe's pages from their start; yield after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    with Loader(run.data, media_spec(model.config), seed=run.seed, micro_lanes=run.data.lanes) as loader:
        for number, step in enumerate(islice(loader, steps)):
            (batch,) = step.microbatches
            model.train()
            loss = model.head(model(batch).hidden, batch.labels, batch.loss_weights) / batch.weight
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield number + 1


def by_chance(scores: Scores, seed: int) -> Scores:
    """Return random scores with the energy shares of ``scores``, so that norms are scaled as for any other choice."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(part: Any, *names: str) -> Any:
        shapes = {name: getattr(part, name).shape for name in names}
        return dataclasses.replace(part, **{k: torch.rand(shape, generator=generator) for k, shape in shapes.items()})

    blocks = tuple(drawn(block, "heads", "neurons", "query_key", "value") for block in scores.blocks)
    return dataclasses.replace(drawn(scores, "channels", "influence"), blocks=blocks)


def without_factors(choice: UnitChoice) -> UnitChoice:
    """Return the same units without scaling norms and queries."""
    names = ("attention_norm", "mlp_norm")
    blocks = tuple(
        dataclasses.replace(
            block, query_scale=1.0, **{name: getattr(block, name)._replace(factor=1.0) for name in names}
        )
        for block in choice.blocks
    )
    return UnitChoice(choice.norm._replace(factor=1.0), blocks)


def cut(model: MultimodalModel, small: ModelConfig, choice: UnitChoice, second: dict[str, str] | None = None) -> Any:
    """Return the pruned model in evaluation mode. ``second`` maps a tied parameter to the one whose values it gets."""
    values = dict(model.named_parameters(remove_duplicate=False))
    result = build_model(small, seed=None)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            found = cut_of(name, choice, second or {})
            parameter.copy_(found.apply(values[found.name]))
    return result.eval()


def smaller(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """Return the smaller decoder config. Heads keep their width unless ``head_dim`` is given."""
    decoder = config.decoder.model_dump()
    decoder["attention"]["head_dim"] = config.decoder.attention.resolved_head_dim(config.decoder.hidden_dim)
    return ModelConfig.model_validate({"decoder": {**decoder, **changes}})


def measure() -> list[Case]:
    """Return losses in nats per token."""
    run = load(CONFIG, [PAGES.format(SAMPLES)], RunConfig).value
    calibration = Calibration(run, BATCHES)
    model = cast(MultimodalModel, build_model(run.decoder_model(0), seed=run.seed))
    for _ in train(model, run, STEPS, 2e-3):
        pass
    scores, _ = calibration.scores(model)
    values = dict(model.named_parameters())
    of_weights = scores_of_weights(run.decoder_model(0).decoder, lambda name: values[name].detach())
    whole = calibration.losses(model)["pages"]
    cases = []
    for axis, changes in AXES.items():
        small = smaller(run.decoder_model(0), changes)
        chosen = choose_units(run.decoder_model(0).decoder, small.decoder, scores)
        choices = {
            "without factors": without_factors(chosen),
            "weights": choose_units(run.decoder_model(0).decoder, small.decoder, of_weights),
            **{
                f"chance {seed}": choose_units(run.decoder_model(0).decoder, small.decoder, by_chance(scores, seed))
                for seed in range(DRAWS)
            },
        }
        peers = {how: calibration.losses(cut(model, small, choice))["pages"] for how, choice in choices.items()}
        ours = calibration.losses(cut(model, small, chosen))["pages"]
        cases.append(Case(f"loss on pages, {whole:.3f} before, {axis}", ours, peers, "nats"))
    return [*cases, *_tables(model, run, calibration, scores)]


def _tables(model: MultimodalModel, run: RunConfig, calibration: Calibration, scores: Scores) -> list[Case]:
    """Return losses of a model with one table for embedding and head: the head's table, or the embedding's."""
    tied = smaller(run.decoder_model(0), {"tie_embeddings": True})
    choice = choose_units(run.decoder_model(0).decoder, tied.decoder, scores)
    losses: list[list[float]] = []
    for second in ({"decoder.embed_tokens.weight": "head.weight"}, {}):
        result = cut(model, tied, choice, second)
        found = [calibration.losses(result)["pages"]]
        for step in train(result, run, max(MORE_STEPS), 1e-3):
            if step in MORE_STEPS:
                found.append(calibration.losses(result.eval())["pages"])
        losses.append(found)
    return [
        Case(f"the same, one table, {steps} steps later", of_head, {"embedding": of_embedding}, "nats")
        for steps, of_head, of_embedding in zip((0, *MORE_STEPS), *losses, strict=True)
    ]


if __name__ == "__main__":
    main("pruning", measure)
