from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.media_spec import MediaSpec, Placement
from mmscale.engine.engine import StepReport
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.metrics_file import read_metrics
from mmscale.metrics.run_log import UNSEEN_STEPS, LoggedStage, NullLog, RunLog, open_run_log
from mmscale.metrics.sample_images import CaptionedImage, batch_images, join_patches, with_caption


def report(loss: float = 2.0) -> StepReport:
    return StepReport(loss, 1.0, 0.5, {"decoder": 1e-3, "vision": 5e-4}, True, {"balance": 1.25})


def sums(tokens: int = 1, samples: int = 1, images: int = 1) -> dict[str, float]:
    counts = {"tokens": tokens, "samples": samples, "cut_documents": 0, "learned_tokens": 0, "images": images}
    return {"model_flops": 1e6, "hardware_flops": 2e6, **counts}


def _log(run_dir: Path, start: int, *, tensorboard: bool = False) -> RunLog:
    config = MetricsConfig(tensorboard=tensorboard, images_every=2, num_images=1)
    return RunLog(run_dir, config, start, 4, Console(file=io.StringIO()))


def test_a_line_has_every_promised_key(tmp_path: Path) -> None:
    log = _log(tmp_path, 0)
    with log.waiting_for_data():
        pass
    log.begin_stage(LoggedStage("align", peak_flops=1e9))
    log.step(1, report(), sums(640, 32), {"roll_backs": 3})
    log.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["mfu"] == pytest.approx(1e6 / 1e9 / line["seconds"])
    assert set(line) >= {"step", "loss", "tokens", "samples", "seconds", "data_wait_seconds", "lr", "grad_norm"}
    assert (line["step"], line["stage"], line["tokens"], line["samples"]) == (1, "align", 640, 32)
    assert (line["lr"], line["lr/vision"], line["metric/balance"], line["roll_backs"]) == (1e-3, 5e-4, 1.25, 3)


def test_a_resumed_log_goes_on_where_the_checkpoint_stands(tmp_path: Path) -> None:
    log = _log(tmp_path, 0)
    for step in (1, 2, 3):
        log.step(step, report(float(step)), sums())
    log.close()
    log = _log(tmp_path, 2)
    log.step(3, report(30.0), sums())
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_tensorboard_has_the_scalars_and_the_captioned_images(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = _log(tmp_path, 0, tensorboard=True)
    pixels = np.full((16, 16, 3), 200, np.uint8)
    limits = []

    def make(limit: int) -> list[CaptionedImage]:
        limits.append(limit)
        return [CaptionedImage(pixels, "a | red\nballoon")]

    for step in (1, 2, 3):
        log.step(step, report(float(step)), sums(10))
        log.images(step, make)
    log.amend(3, {"heldout/style/score": 0.25})
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [(event.step, event.value) for event in events.Scalars("heldout/style/score")] == [(3, 0.25)]
    assert "tokens_per_second" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("samples/0")] == [1, 2]
    assert limits == [1, 1]
    table = events.Tensors("samples/captions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 0 | a \\| red balloon |" in table


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = open_run_log(tmp_path / "run", MetricsConfig(), 0, 4, rank=1)
    assert isinstance(log, NullLog)
    with log.waiting_for_data():
        log.begin_stage(LoggedStage("all"))
        log.step(1, report(), sums())
    assert not log.wants_images(200)
    log.images(200, lambda limit: pytest.fail("made images for nobody"))
    log.print_line("nothing")
    log.pause()
    log.close()
    assert not (tmp_path / "run").exists()


def _cut(picture: np.ndarray, side: int) -> np.ndarray:
    """Patches by the definition of ``MediaItem.values``, pixel by pixel."""
    height, width, channels = picture.shape
    return np.stack(
        [
            np.array(
                [
                    picture[row * side + y, column * side + x, channel]
                    for channel in range(channels)
                    for y in range(side)
                    for x in range(side)
                ]
            )
            for row in range(height // side)
            for column in range(width // side)
        ]
    )


def test_patches_join_to_the_picture_they_were_cut_from() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    spec = MediaSpec(Placement.EMBEDDING, patch_size=4)
    assert np.array_equal(join_patches(_cut(picture, 4), (1, 2, 3), spec), picture)
    frames = np.random.default_rng(1).integers(0, 256, (15, 8, 12, 3), dtype=np.uint8)
    strip = join_patches(np.concatenate([_cut(frame, 4) for frame in frames]), (15, 2, 3), spec)
    assert np.array_equal(strip, np.concatenate(list(frames[::2]), axis=1))  # Eight of the fifteen.
    pairs = MediaSpec(Placement.EMBEDDING, patch_size=4, frames_per_patch=2)
    first, later = (np.concatenate([_cut(frame, 4) for frame in frames[start:6:2]]) for start in (0, 1))
    strip = join_patches(first, (3, 2, 3), pairs, later)
    assert np.array_equal(strip, np.concatenate(list(frames[:6]), axis=1))


def test_images_of_a_batch_come_with_the_text_that_carries_loss() -> None:
    spec = MediaSpec(Placement.CROSS_ATTENTION, patch_size=4)
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (4, 8, 3), dtype=np.uint8) for _ in range(2)]
    values = torch.from_numpy(np.concatenate([_cut(picture, 4) for picture in pictures]).astype(np.uint8))
    empty = torch.empty(0, dtype=torch.int64)
    block = MediaBlock(
        values=values,
        grid=torch.tensor([[1, 1, 2]] * 2, dtype=torch.int32),
        grids=((1, 1, 2),) * 2,
        items=Segments.from_lengths([2, 2]),
        gather_index=empty,
        scatter_index=empty,
        attended_index=empty,
        span_tokens=Segments.from_lengths([5]),
        span_keys=Segments.from_lengths([0]),
    )
    batch = MultimodalBatch(
        token_ids=torch.arange(5),
        labels=torch.tensor([-100, 7, -100, 8, 9]),
        loss_weights=torch.ones(5),
        position_ids=torch.arange(5),
        segments=Segments.from_lengths([2, 3]),
        valid=torch.ones(5, dtype=torch.bool),
        media={"image": block},
        pairs=torch.tensor([[1, 0], [0, 1]]),
    )
    images = batch_images(batch, spec, lambda ids: " ".join(map(str, ids)), limit=5)
    assert [image.caption for image in images] == ["7", "8 9"]
    assert np.array_equal(images[0].pixels, pictures[1])
    assert np.array_equal(images[1].pixels, pictures[0])
    assert len(batch_images(batch, spec, lambda ids: "", limit=1)) == 1
    # The second item is a video of two frames in one group; a still image before it has no later frames.
    second = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)
    later = torch.from_numpy(_cut(second, 4).astype(np.uint8))
    shown = replace(batch, media={"image": replace(block, later_values=later, later_index=torch.tensor([2, 3]))})
    video, still = batch_images(shown, replace(spec, frames_per_patch=2), lambda ids: "", limit=5)
    assert np.array_equal(video.pixels, np.concatenate([pictures[1], second], axis=1))
    assert np.array_equal(still.pixels, pictures[0])


def test_a_caption_is_printed_below_the_untouched_image() -> None:
    pixels = np.full((16, 16, 3), 77, np.uint8)
    shown = with_caption(CaptionedImage(pixels, "word " * 40), min_side=32)
    assert shown.shape[1] == 32
    assert (shown[:32] == 77).all()
    assert (shown[32:] == 0).any()


@pytest.mark.parametrize(
    ("has_tower", "images", "warnings"),
    [
        (True, [0] * (3 * UNSEEN_STEPS), 1),
        (True, [0] * (UNSEEN_STEPS - 1), 0),
        (True, [0] * (UNSEEN_STEPS - 1) + [1] + [0] * (3 * UNSEEN_STEPS), 0),
        (False, [0] * (3 * UNSEEN_STEPS), 0),
    ],
)
def test_a_stage_without_an_image_is_named_once(
    tmp_path: Path, has_tower: bool, images: list[int], warnings: int
) -> None:
    printed = io.StringIO()
    log = RunLog(tmp_path, MetricsConfig(tensorboard=False), 0, len(images), Console(file=printed))
    log.begin_stage(LoggedStage("align", expects_images=has_tower))
    for step, count in enumerate(images, start=1):
        log.step(step, report(), sums(images=count))
    log.close()
    said = [line for line in printed.getvalue().splitlines() if line.startswith("warning")]
    assert len(said) == warnings
    assert all("stage align" in line and "no image" in line for line in said)
