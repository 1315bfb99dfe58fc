"""A run on documents of pictures, videos, sounds and text in any order, with a projector for videos, on two ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_pipeline.batch import MultimodalBatch
from data_pipeline.loader.loader import Loader
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.config import DroppedKeyWarning, load
from mmscale.run.config import RunConfig
from tests import sounds, videos
from tests.system.conftest import REPO, MakeRun

STEPS = 5
TILES = {"kind": "mm1_5", "min_tiles": 1, "max_tiles": 2}
PAD = {"last_columns": "pad"}
MODEL: dict[str, Any] = {
    "vision": {"positions": {"kind": "learned", "grid": [3, 3]}},
    "connector": {
        "kind": "embedding",
        "projector": {"kind": "mean_pool", **PAD},
        "video_projector": {"kind": "conv_pool", **PAD},
    },
    "audio": {
        "tower": {"kind": "frames", "num_bins": 16, "stack": 8, "max_frames": 100},
        "projector": {"kind": "linear"},
    },
}


def _documents(folder: Path) -> Path:
    """Write documents of up to three media in a random order, with text before each; return their manifest."""
    rng = np.random.default_rng(3)
    with ShardWriter(folder / "omni", "part", max_samples=32) as writer:
        for number in range(24):
            picture = io.BytesIO()
            Image.fromarray(videos.pictured(number, 24, 24 + number)).save(picture, "png")
            files = {
                "image": ("0.png", picture.getvalue()),
                "video": ("1.mkv", videos.encoded(3 + number % 5, seed=number, kind="mkv", width=64)),
                "audio": ("2.wav", sounds.encoded(3000, seed=number)),
            }
            used = [str(kind) for kind in rng.permutation(list(files))[: 1 + number % 3]]
            parts = [part for kind in used for part in ({"text": f" see {number}"}, {kind: files[kind][0]})]
            page = json.dumps({"parts": [*parts, {"text": " the end"}]}).encode()
            writer.write(f"{number:06d}", {**dict(files[kind] for kind in used), "json": page})
    manifest = folder / "omni.manifest"
    write_manifest(manifest, writer.shards)
    return manifest


def _recipe(folder: Path) -> Path:
    base = yaml.safe_load((REPO / "tests/system/mixed.yaml").read_text())
    omni = {
        "name": "omni",
        "manifest": str(_documents(folder)),
        "template": {"kind": "interleaved"},
        "transforms": {"kind": "tiles", "tiling": TILES},
        "video": {"frames": {"kind": "rate", "per_second": 4, "min_frames": 1, "max_frames": 3}, "tiling": TILES},
        "audio": {"max_seconds": 10},
    }
    data = {"datasets": [omni, base["data"]["datasets"][2]], "packing": {"max_tokens": 256, "max_documents": 2}}
    path = folder / "omni.yaml"
    path.write_text(yaml.safe_dump({"base": str(REPO / "tests/system/mixed.yaml"), "model": MODEL, "data": data}))
    return path


def _num_videos(batch: MultimodalBatch) -> int:
    """Return the number of frames' crops of videos, without those of dummy documents."""
    locations = batch.media["image"].locations
    return sum(each.is_video for each in locations if batch.provenance[each.segment] is not None)


@pytest.mark.slow
@pytest.mark.dist
def test_documents_of_all_modalities_train_on_two_ranks_as_on_one(fork_run: MakeRun, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    words = (f"max_steps={STEPS}", "engine.zero_stage=3", "metrics.grad_norms_every=1", "stages.0.train=[all]")
    with pytest.warns(DroppedKeyWarning):  # Keys of the cross-attention of the base file.
        config = load(recipe, list(words), RunConfig).value
    half, found = config.data.lanes // 2, list[tuple[int, int]]()
    with Loader(config.data, config.media_spec, seed=config.seed) as loader:
        for _, step in zip(range(STEPS), loader, strict=False):
            first, second = step.microbatches[:half], step.microbatches[half:]
            found.append((sum(map(_num_videos, first)), sum(map(_num_videos, second))))
    assert any(min(counts) == 0 < max(counts) for counts in found), "one rank has a video and the other has none"
    curves = {}
    for ranks in (1, 2):
        run = fork_run(f"world-{ranks}", ranks, *words, config=recipe)
        run.finish()
        curves[ranks] = run.metrics()
    for one, two, counts in zip(curves[1], curves[2], found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]
        assert (one["grad_norm/video_connector"] > 0) == (two["grad_norm/video_connector"] > 0) == (sum(counts) > 0)
    assert {"connector", "video_connector", "audio_connector"} <= json.loads((run.folder / "result.json").read_text())[
        "params"
    ]["components"].keys()
