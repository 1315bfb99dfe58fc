"""The training of an image tokenizer with all its losses: killed, moved to other numbers of ranks, and reported."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmscale.checkpoint import TrainState, save
from mmscale.models.build import TowerAlone, build_unset
from mmscale.models.config import TowerConfig
from mmscale.models.vision import VisionConfig
from mmscale.nn.init import initialise_
from tests.checkpoint.plain_engine import plain_engine
from tests.objectives.test_perceptual import CONFIG
from tests.system.conftest import MakeRun, Run, kill_group

TOKENIZER = Path(__file__).with_name("tokenizer.yaml")
GAME = (
    "model.discriminator={base_dim: 8, halvings: 1, norm_groups: 2}",
    "stages.0.train=[encoder, decoder, discriminator]",
    "stages.0.reconstruction.discriminator={start_step: 1}",
)
NOT_COMPARED = ("seconds", "bytes", "goodput", "mfu", "time")


def curve(run: Run) -> list[dict[str, Any]]:
    """Return the values of each step that must be equal: all but time and memory."""
    return [{k: v for k, v in line.items() if not any(word in k for word in NOT_COMPARED)} for line in run.metrics()]


def tower(folder: Path) -> Path:
    """Return the checkpoint of a random tower."""
    model = build_unset(TowerConfig(vision=VisionConfig.model_validate(CONFIG)))
    assert isinstance(model, TowerAlone)
    initialise_(model, 3)
    engine = plain_engine(model)
    engine.partition.whole.clear()
    return save(engine, TrainState(0, 0, 0), folder)


def pictures(run: Run) -> dict[str, bytes]:
    """Return the files of all pictures by their paths."""
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in run.folder.glob("drawings/*/*.webp")}


@pytest.mark.resume
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("game", [True, False])
def test_a_killed_tokenizer_continues_bit_for_bit_and_on_other_ranks(
    fork_run: MakeRun, tmp_path: Path, game: bool
) -> None:
    loss = f"stages.0.reconstruction.perceptual={{tower: {tower(tmp_path)}, layers: [0, 1]}}"
    words = (*GAME, loss) if game else ()
    whole = fork_run("whole", 2, *words, config=TOKENIZER)
    whole.finish()
    expected = curve(whole)
    assert [line["step"] for line in expected] == list(range(1, 9))
    assert ("metric/disc_fake" in expected[-1]) == game

    killed = fork_run("killed", 2, *words, config=TOKENIZER)
    process = killed.start(slow_from=6)
    killed.wait_for_step(process, 3)
    while not (killed.folder / "checkpoints" / "step-00000002").is_dir():  # Written in the background.
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    kill_group(process)
    assert killed.metrics()[-1]["step"] < 8, "the run was over before it was killed"
    assert "resuming from" in killed.finish()
    assert curve(killed) == expected
    assert pictures(killed) == pictures(whole)

    for ranks, steps in ((2, 3), (1, 5), (3, 8)):
        moved = fork_run("moved", ranks, *words, f"max_steps={steps}", config=TOKENIZER)
        moved.finish()
    for mine, theirs in zip(curve(moved), expected, strict=True):
        numbers = {key: value for key, value in theirs.items() if not isinstance(value, str)}
        assert {key: mine[key] for key in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)


@pytest.mark.dist
def test_the_report_shows_reconstructions_of_the_same_images(fork_run: MakeRun) -> None:
    run = fork_run("shown", 1, *GAME, "max_steps=5", "checkpoint.every_steps=null", config=TOKENIZER)
    run.finish()
    assert sorted(path.name for path in run.folder.glob("drawings/step-*")) == [
        f"step-{step:08d}" for step in (1, 4, 5)
    ]
    originals = set()
    for path in sorted(run.folder.glob("drawings/*/0000.webp")):
        with Image.open(path) as picture:
            pixels = np.array(picture)
        assert pixels.shape == (24 + 4 + 24, 24, 3)
        originals.add(pixels[:24].tobytes())
        assert (pixels[:24] != pixels[28:]).any()
    assert len(originals) == 1
    page = (run.folder / "report.html").read_text()
    for words in ("<h2>Reconstructions</h2>", "Codebook perplexity", "PSNR", "Adaptive weight", "mean per image"):
        assert words in page, words


def test_a_tower_that_does_not_fit_is_refused(fork_run: MakeRun, tmp_path: Path) -> None:
    for layers, path, message in (
        ("[3]", tower(tmp_path), "blocks of the tower have the numbers 0 to 2"),
        ("[0]", tmp_path / "none", "none"),
    ):
        loss = f"stages.0.reconstruction.perceptual={{tower: {path}, layers: {layers}}}"
        output = fork_run("unfit", 1, loss, config=TOKENIZER).finish(code=2)
        assert f"stages.0.reconstruction.perceptual.tower={path}" in output
        assert message in output
