"""Code that the ranks of ``test_sharded.py`` run: training and generation of each kind of model under ZeRO-3."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmscale.dist import World, any_rank
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.models.generation import ImageGrid, draw, generate
from mmscale.models.sampling import SamplingConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.models.packs import image_document, in_lane, pack, text_document
from tests.models.tiny import CONNECTORS, LEARNED, MOE, VOCAB, config

VARIANTS: dict[str, dict[str, Any]] = {
    "embedding": {
        "vision": LEARNED,
        "tie_embeddings": True,
        "image_tokens": {"kind": "separate", "codes": 7, "code_dim": 3},
    },
    "cross_attention": {"tie_embeddings": True},
    "hybrid": {"mlp": MOE, "dropout": 0.1, "vocab_size": VOCAB - 8, "extra_tokens": {"rows": 8}},
}
LANES = 4


def run(world: World, steps: int = 4) -> dict[str, Any]:
    """Return losses, generated tokens and drawn codes by kind of connector."""
    assert set(VARIANTS) == set(CONNECTORS)
    return {kind: _run(world, kind, steps) for kind in VARIANTS}


def _run(world: World, kind: str, steps: int) -> dict[str, Any]:
    settings = config(kind, **VARIANTS[kind])
    spec = media_spec(settings)
    sizes = [(2, 4), (2, 4)] if spec.fixed_grid else [(2, 2), (4, 2)]
    ids = max(VOCAB, settings.decoder.image_ids.stop)  # Image tokens among the others.

    def lane(step: int, number: int) -> Any:
        """Return a pack. Lane 1 has only text and a dummy document; lanes differ in length."""
        docs = [text_document(step * LANES + number, 5 + 3 * number, ids)]
        dummy = number == 1
        docs.append(image_document(spec, step * LANES + number, 4, sizes, VOCAB, dummy=dummy))
        return in_lane(pack(docs, spec), number, (3, step))

    engine_config = EngineConfig(
        zero_stage=3,
        device="cpu",
        precision="fp32",
        timeout_seconds=60,
        persistent_parameter_elements=0,  # Shard even the smallest parameters.
        activation_checkpointing=kind == "hybrid",
    )
    build = partial(build_model, settings, seed=None)
    model = construct(build, engine_config, world, partial(initialise_, seed=3))
    stage = StageConfig.model_validate({"name": "all", "steps": steps, "learning_rate": {"default": 1e-2}})
    objective = NextToken(world=world)
    engine = Engine(model, objective, stage, engine_config, world)
    mine = range(world.rank, LANES, world.world_size)
    losses = [engine.train_step([lane(step, number) for number in mine]).loss for step in range(steps)]
    prompts = [pack([image_document(spec, 50 + number, number, sizes, VOCAB)], spec) for number in mine]
    with engine.inference() as net:
        running = partial(any_rank, world)
        texts = [generate(net, prompt, 5, eos_id=7, any_running=running)[0] for prompt in prompts]  # type: ignore[arg-type]
        if settings.decoder.image_ids:
            greedy = SamplingConfig()
            images = [draw(net, prompt, [ImageGrid(2, 2)], greedy)[0].flatten().tolist() for prompt in prompts]  # type: ignore[arg-type]
            texts = [text + image for text, image in zip(texts, images, strict=True)]
    engine.close()
    return {"losses": losses, "texts": dict(zip(map(str, mine), texts, strict=True))}
