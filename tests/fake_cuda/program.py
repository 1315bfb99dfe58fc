"""Runs training steps of shrunk recipes on fake CUDA tensors and prints what a GPU would do badly, as JSON.

    python tests/fake_cuda/program.py SHIM '[["configs/quickstart.yaml", "sdpa", ""], ...]'

Each entry is a recipe with overrides, an attention kernel, and the name of a function of ``planted.py`` to call first.
A process of its own: the shim must be loaded before torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def load_shim(path: str) -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    load_shim(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode()  # One for all: modules cache tables of positions.
    results = [run(fake, *entry) for entry in json.loads(sys.argv[2])]
    print(json.dumps(results))


def run(fake: Any, words: str, attention: str, plant: str) -> dict[str, Any]:
    """Return the findings of the steps of every stage of a recipe, by kind and line."""
    import torch

    from mmscale.cli.run_file import load_run
    from mmscale.nn import patch_embed
    from mmscale.shrink.run import shrink_run
    from tests.fake_cuda import contracts, planted
    from tests.fake_cuda.observer import Observer

    path, *overrides = words.split()
    whole = load_run(ROOT / path, overrides).value
    config, dtype = shrink_run(whole), torch.float16 if whole.engine.precision == "fp16" else torch.bfloat16
    observer = Observer(fake)
    real_buckets, patch_embed.buckets = patch_embed.buckets, outside_of_fake_mode(patch_embed.buckets)
    real = torch.cuda.is_available, torch.cuda.get_device_capability
    torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *_: (9, 0)
    try:
        with contracts.installed(), planted.active(plant), fake:
            for number in range(len(config.stages)):
                shares = [teacher.weight for teacher in whole.stages[number].distill]
                train(config, number, attention, fake, observer, dtype, shares)
        error = ""
    except Exception as raised:  # The test shows it.
        error = told(raised)
    finally:
        patch_embed.buckets = real_buckets
        torch.cuda.is_available, torch.cuda.get_device_capability = real
    return {"error": error, "found": [[*key, count] for key, count in sorted(observer.found.items())]}


def told(error: Exception) -> str:
    """Return an error with its places in this project."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if "/site-packages/" not in frame.filename]
    return f"{type(error).__name__}: {str(error)[:500]} at " + " < ".join(
        f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}" for frame in reversed(places[-6:])
    )


def outside_of_fake_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of host values whose tensors stay real."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call


def microbatches(config: Any, number: int) -> list[Any]:
    """Return microbatches of a stage, on the host: with and without images, all modalities, videos, codes of images."""
    from mmscale.check.batches import BatchMaker
    from mmscale.models.config import TokenizerConfig
    from tests.objectives.drawn import drawn_batch

    model, answers = config.stage_model(number), 1 if config.stages[number].preference is None else 2
    vocabulary = 64 if isinstance(model, TokenizerConfig) else model.decoder.vocab_size
    maker = BatchMaker(config.stage_media(number), vocabulary, 0, answers)
    kinds = [*maker.kinds[:2], *(kind for kind in ("all modalities", "videos only") if kind in maker.kinds)]
    batches = [maker.make(kind, 0, lane) for lane, kind in enumerate(kinds)]
    if not isinstance(model, TokenizerConfig) and model.decoder.image_tokens is not None and answers == 1:
        batches.append(drawn_batch(model.decoder, config.stage_media(number)))
    return batches


def train(config: Any, number: int, attention: str, fake: Any, observer: Any, dtype: Any, shares: list[float]) -> None:
    """Make one step of a stage with its microbatches: forward, backward, fused AdamW; a teacher for each share."""
    import torch

    from data_pipeline.batch import map_batch
    from mmscale.dist import World
    from mmscale.models.build import build_unset
    from mmscale.objectives.choice import choose_objective
    from mmscale.objectives.teacher import Teacher
    from tests.fake_cuda.observer import fake_constructors

    stage, model_config = config.stages[number], config.stage_model(number)
    device = torch.device("cuda", 0)
    world = World(0, 1, 0, device)

    def build() -> Any:
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = build_unset(model_config, attention=attention)
            return model.train()
        finally:
            torch.set_default_dtype(torch.float32)

    shares = [1.0] if stage.preference is not None else shares
    teachers = [Teacher(build().eval(), share, 1.0) for share in shares]
    model = build()
    objective = choose_objective(model_config, stage, world, teachers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = [map_batch(batch, torch.Tensor, fake.from_tensor) for batch in microbatches(config, number)]
    with observer, fake_constructors(fake, observer):
        batches = [batch.to(device, non_blocking=True) for batch in batches]
        prepare = getattr(objective, "prepare", None)
        for batch in prepare(model, batches) if prepare is not None else batches:
            objective(model, batch).loss_sum.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
