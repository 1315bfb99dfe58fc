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

_ROOT = Path(__file__).resolve().parents[2]


def load_shim(path: str) -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    load_shim(sys.argv[1])
    sys.path.insert(0, str(_ROOT))
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
    whole = load_run(_ROOT / path, overrides).value
    config, dtype = shrink_run(whole), torch.float16 if whole.engine.precision == "fp16" else torch.bfloat16
    observer = Observer(fake)
    real_buckets, patch_embed.buckets = patch_embed.buckets, outside_of_fake_mode(patch_embed.buckets)
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        with contracts.installed(), planted.active(plant), fake:
            for number in range(len(config.stages)):
                shares = [teacher.weight for teacher in whole.stages[number].distill]
                train(config, number, attention, fake, observer, dtype, shares)
        error = ""
    except Exception as raised:  # The test shows it.
        places = [
            frame for frame in traceback.extract_tb(raised.__traceback__) if "/site-packages/" not in frame.filename
        ]
        error = f"{type(raised).__name__}: {str(raised)[:500]} at " + " < ".join(
            f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}" for frame in reversed(places[-6:])
        )
    finally:
        torch.cuda.is_available, patch_embed.buckets = is_available, real_buckets
    return {"error": error, "found": [[*key, count] for key, count in sorted(observer.found.items())]}


def outside_of_fake_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of host values whose tensors stay real."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call


def train(config: Any, number: int, attention: str, fake: Any, observer: Any, dtype: Any, shares: list[float]) -> None:
    """Make one step of a stage with two microbatches: forward, backward, fused AdamW; a teacher for each share."""
    import torch

    from data_pipeline.batch import map_batch
    from mmscale.check.batches import BatchMaker
    from mmscale.dist import World
    from mmscale.models.build import build_unset
    from mmscale.models.config import TokenizerConfig
    from mmscale.objectives.choice import choose_objective
    from mmscale.objectives.teacher import Teacher
    from tests.fake_cuda.observer import fake_constructors

    stage, model_config = config.stages[number], config.stage_model(number)
    device = torch.device("cuda", 0)
    world = World(0, 1, 0, device)
    answers = 1 if stage.preference is None else 2
    vocabulary = 64 if isinstance(model_config, TokenizerConfig) else model_config.decoder.vocab_size
    maker = BatchMaker(config.stage_media(number), vocabulary, 0, answers)

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
    microbatches = [
        map_batch(maker.make(kind, 0, lane), torch.Tensor, fake.from_tensor)
        for lane, kind in enumerate(maker.kinds[:2])
    ]
    with observer, fake_constructors(fake, observer):
        microbatches = [batch.to(device, non_blocking=True) for batch in microbatches]
        prepare = getattr(objective, "prepare", None)
        for batch in prepare(model, microbatches) if prepare is not None else microbatches:
            objective(model, batch).loss_sum.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
