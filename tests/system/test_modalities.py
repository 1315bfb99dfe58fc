"""A run on pictures, sounds and text: ranks without a sound or a picture do what the others do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data_pipeline.loader.loader import Loader
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.config import load
from mmscale.run.config import RunConfig
from tests.sounds import encoded
from tests.system.conftest import REPO, MakeRun

STEPS = 6


def _config(folder: Path) -> Path:
    """Write shards of sounds and a recipe that mixes them with pictures and text; return the recipe."""
    with ShardWriter(folder / "sounds", "part", max_samples=16) as writer:
        for number in range(24):
            parts = [{"audio": "0.wav"}, {"text": f" a tone of {number}"}]
            parts += [{"text": " and "}, {"audio": "1.flac"}, {"text": " another"}] if number % 3 == 0 else []
            members = {
                "0.wav": encoded(2000 + 700 * number, seed=number),
                "json": json.dumps({"parts": parts}).encode(),
            }
            members |= {"1.flac": encoded(3000, kind="flac", seed=number)} if number % 3 == 0 else {}
            writer.write(f"{number:06d}", members)
    manifest = folder / "sounds.manifest"
    write_manifest(manifest, writer.shards)
    base = yaml.safe_load((REPO / "tests/system/mixed.yaml").read_text())
    sounds = {"name": "sounds", "manifest": str(manifest), "weight": 0.6, "template": {"kind": "interleaved"}}
    recipe = {
        "base": str(REPO / "tests/system/mixed.yaml"),
        "model": {
            "audio": {
                "tower": {"kind": "frames", "num_bins": 16, "stack": 8, "max_frames": 100},
                "projector": {"kind": "linear"},
            }
        },
        "data": {"audio": {"max_seconds": 10}, "datasets": [*base["data"]["datasets"], sounds]},
    }
    path = folder / "sounds.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_without_a_sound_train_as_one_rank_does(fork_run: MakeRun, tmp_path: Path) -> None:
    recipe = _config(tmp_path)
    words = (f"max_steps={STEPS}", "engine.zero_stage=3", "metrics.grad_norms_every=1", "stages.0.train=[all]")
    config = load(recipe, list(words), RunConfig).value
    halves = config.data.lanes // 2
    absent = set[str]()
    with Loader(config.data, config.media_spec, seed=config.seed) as loader:
        for _, step in zip(range(STEPS), loader, strict=False):
            for name in ("image", "audio"):
                counts = [
                    sum(each.num_inputs(name) for each in part)
                    for part in (step.microbatches[:halves], step.microbatches[halves:])
                ]
                absent |= {name} if min(counts) == 0 < max(counts) else set()
    assert "audio" in absent, "one rank has a sound and the other has none"
    curves = {}
    for ranks in (1, 2):
        run = fork_run(f"world-{ranks}", ranks, *words, config=recipe)
        run.finish()
        curves[ranks] = run.metrics()
    assert sum(line["clips/audio"] for line in curves[1]) > 0
    for one, two in zip(curves[1], curves[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]
        assert (two["clips/audio"], two["images"]) == (one["clips/audio"], one["images"])
        assert (one["grad_norm/audio_connector"] > 0) == (one["clips/audio"] > 0)
    result = json.loads((run.folder / "result.json").read_text())
    assert result["params"]["components"]["audio_connector"] == 16 * 8 * 48 + 48
