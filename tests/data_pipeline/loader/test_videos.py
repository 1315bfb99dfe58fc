"""Videos in shards: index, plan without decoding, and batches that depend on no rank, worker or damaged neighbour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.history.digest import digest
from data_pipeline.history.text_spans import text_spans
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.stats.count import count
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.sample import VideoPart, VideoSize
from data_pipeline.shards.damage import Problem
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.tokenizer import load_tokenizer
from tests.data_pipeline.conftest import Members, WriteSet, picture
from tests.data_pipeline.loader.moved_lanes import check_that_only_its_lane_moves
from tests.videos import encoded

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2, frames_per_patch=2)


def _sample(number: int) -> Members:
    """Return a video, every third time with a picture before it, and a dialogue."""
    kind = ("mp4", "webm", "gif")[number % 3]
    content = f"<video> moves {number % 5}"
    members = {f"1.{kind}": encoded(3 + number % 4, kind=kind, height=32 + 16 * (number % 2), seed=number)}
    if number % 3 == 0:
        members["0.png"] = picture(number)
        content = f"<image>, then {content}"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {number}"}]
    return {**members, "json": json.dumps({"messages": turns}).encode()}


def data_config(manifest: Path, tokenizer: Path) -> DataConfig:
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "tokenizers", "path": tokenizer},
            "template": {"kind": "dialogue"},
            "transforms": {"kind": "native", "min_pixels": 256, "max_pixels": 1024},
            "video": {"frames": {"kind": "rate", "per_second": 4}, "min_pixels": 256, "max_pixels": 1024},
            "datasets": [{"name": "clips", "manifest": manifest}],
            "lanes": 3,
            "packing": {"max_tokens": 120},
            "order": {"block_size": 2, "window_blocks": 2},
        }
    )


@pytest.fixture
def clips(write_set: WriteSet, tokenizer_path: Path) -> DataConfig:
    return data_config(write_set("clips", [_sample(number) for number in range(12)]), tokenizer_path)


def test_the_index_gives_the_document_that_decoding_gives(clips: DataConfig) -> None:
    builder = DocumentBuilder(clips.datasets[0], load_tokenizer(clips.tokenizer), SPEC)
    reader = SampleReader(Manifest.open(clips.datasets[0].indexed), "clips")
    for number in range(12):
        sample, planned = reader.read(number), reader.read_without_images(number)
        (video,) = [part for part in sample.parts if isinstance(part, VideoPart)]
        assert video.size == VideoSize(3 + number % 4, video.size.microseconds, 32 + 16 * (number % 2), 32)
        plan, document = builder.dry_run(planned), builder(sample)
        assert [item.grid for item in plan.items] == [item.grid for item in document.items]
        for name in ("token_ids", "labels", "position_ids", "scatter_index"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(document, name))
        kinds = [span.kind for span in text_spans(document, builder.tokenizer, SPEC)]
        assert (kinds.count("image"), kinds.count("video")) == (number % 3 == 0, 1)
        # Without an index, the file itself gives the same size.
        bare = builder.dry_run(type(sample)(tuple(_without_size(sample.parts)), sample.fields, sample.provenance))
        assert [item.grid for item in bare.items] == [item.grid for item in document.items]
    reader.close()


def _without_size(parts: Sequence[object]) -> list[object]:
    return [VideoPart(part.data, part.name) if isinstance(part, VideoPart) else part for part in parts]


@pytest.mark.long
def test_batches_depend_on_no_rank_and_no_worker(clips: DataConfig) -> None:
    plain = list(digest(clips, SPEC, 1, range(3)))
    assert len({checksum for _, checksum in plain}) == 3
    assert list(digest(clips, SPEC, 1, range(3), world_size=3)) == plain
    assert list(digest(clips, SPEC, 1, range(1, 3), world_size=2, workers=2, resume_at=1)) == plain[1:]


@pytest.mark.fault
def test_a_damaged_video_moves_no_other_lane(write_set: WriteSet, tokenizer_path: Path) -> None:
    samples = [_sample(number) for number in range(12)]
    broken = samples[4] | {"1.webm": samples[4]["1.webm"][:700]}
    sound = data_config(write_set("sound", samples), tokenizer_path)
    damaged = data_config(write_set("damaged", [*samples[:4], broken, *samples[5:]]), tokenizer_path)
    check_that_only_its_lane_moves(sound, damaged, SPEC, "000004")


def test_a_folder_of_videos_is_ingested_verified_and_counted(tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    for number, kind in enumerate(("mp4", "webm", "mkv", "gif")):
        (folder / f"{number}.{kind}").write_bytes(encoded(4 + number, kind=kind))
        (folder / f"{number}.txt").write_text(f"clip {number}")
    (folder / "4.mp4").write_bytes(encoded(8)[:1000])
    (folder / "4.txt").write_text("a damaged one")
    report = ingest(folder, out, "clips", on_error=OnError.SKIP)
    assert (report.num_samples, report.num_skipped, report.orphans.no_image) == (4, 1, 0)
    (index,) = [ShardIndex.open(tar) for tar in out.glob("*.tar")]
    frames = {member.ext: member.num_frames for i in range(4) for member in index.row(i).members}
    assert frames == {"mp4": 4, "webm": 5, "mkv": 6, "gif": 7, "txt": 0}
    (checked,) = verify(jobs_of(report.manifest)[1])
    assert not checked.damages
    videos = count(report.manifest).summary["videos"]
    assert (videos["count"], videos["frames"]["max"], videos["width"]["min"]) == (4, 7, 32)
    tar = next(out.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    at = index.row(0).members[0].offset
    data[at + 40 : at + 400] = bytes(360)
    tar.write_bytes(data)
    (checked,) = verify(jobs_of(tar)[1])
    assert {damage.problem for damage in checked.damages} == {Problem.CHECKSUM, Problem.VIDEO}
