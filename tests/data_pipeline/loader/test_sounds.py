"""Sounds in shards: index, plan without decoding, and batches that depend on no rank, worker or damaged neighbour."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.history.digest import digest
from data_pipeline.history.text_spans import text_spans
from data_pipeline.io.columns import read_columns, write_columns
from data_pipeline.media_spec import AudioSpec, MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.stats.count import count
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.sample import AudioPart, AudioSize, Sample, VideoPart
from data_pipeline.shards import index as shard_index
from data_pipeline.shards.damage import Problem
from data_pipeline.shards.index import ShardIndex, index_path
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.shards.token_grid import GridTimes, encode_grid
from data_pipeline.text.tokenizer import load_tokenizer
from tests.data_pipeline.conftest import Members, WriteSet, picture
from tests.data_pipeline.loader.moved_lanes import check_that_only_its_lane_moves
from tests.sounds import encoded, tones
from tests.videos import encoded as encoded_video

AUDIO = AudioSpec(num_bins=8, padded=False, extra_frames=2, reductions=((3, 1, 1), (3, 2, 1), (2, 2, 0)))
SPEC = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2, frames_per_patch=2, audio=AUDIO)
KINDS = ("wav", "flac", "mp3", "opus")


def _sample(number: int) -> Members:
    """Return a sound, every third time with a picture and a video before it, and a dialogue."""
    kind = KINDS[number % 4]
    content = f"<audio> says {number % 5}"
    sound = encoded(3000 + 900 * (number % 6), kind=kind, seed=number)
    members = {f"1.{kind}": sound}
    if number % 3 == 0:
        members |= {"0.png": picture(number), "2.mp4": encoded_video(3)}
        content = f"<image>, <video>, then {content}"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {number}"}]
    return {**members, "json": json.dumps({"messages": turns}).encode()}


def _config(manifest: Path, tokenizer: Path, **audio: object) -> DataConfig:
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "tokenizers", "path": tokenizer},
            "template": {"kind": "dialogue"},
            "transforms": {"kind": "native", "min_pixels": 256, "max_pixels": 1024},
            "video": {"frames": {"kind": "rate", "per_second": 4}, "min_pixels": 256, "max_pixels": 1024},
            "audio": {"max_seconds": 5, **audio},
            "datasets": [{"name": "sounds", "manifest": manifest}],
            "lanes": 3,
            "packing": {"max_tokens": 120},
            "order": {"block_size": 2, "window_blocks": 2},
        }
    )


@pytest.fixture
def sounds(write_set: WriteSet, tokenizer_path: Path) -> DataConfig:
    return _config(write_set("sounds", [_sample(number) for number in range(12)]), tokenizer_path)


def test_the_index_gives_the_document_that_decoding_gives(sounds: DataConfig) -> None:
    builder = DocumentBuilder(sounds.datasets[0], load_tokenizer(sounds.tokenizer), SPEC)
    reader = SampleReader(Manifest.open(sounds.datasets[0].indexed), "sounds")
    for number in range(12):
        sample, planned = reader.read(number), reader.read_without_images(number)
        (sound,) = [part for part in sample.parts if isinstance(part, AudioPart)]
        assert sound.size is not None
        assert (sound.size.rate, sound.size.channels) == (48000 if number % 4 == 3 else 16000, 1)
        assert sound.size.samples >= 3000 + 900 * (number % 6)
        plan, document = builder.dry_run(planned), builder(sample)
        assert [item.grid for item in plan.items] == [item.grid for item in document.items]
        for name in ("token_ids", "labels", "position_ids", "scatter_index"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(document, name))
        spans = [span for span in text_spans(document, builder.tokenizer, SPEC) if not span.is_text]
        assert [span.kind for span in spans] == (["image", "video", "audio"] if number % 3 == 0 else ["audio"])
        (item,) = [item for item in document.items if item.modality == "audio"]
        assert spans[-1].num_tokens == AUDIO.num_features(item.grid)
        # Without an index, the file itself gives the same size.
        parts = tuple(AudioPart(part.data, part.name) if part is sound else part for part in sample.parts)
        bare = builder.dry_run(Sample(parts, sample.fields, sample.provenance))
        assert [item.grid for item in bare.items] == [item.grid for item in document.items]
    reader.close()


@pytest.mark.slow
def test_batches_depend_on_no_rank_and_no_worker(sounds: DataConfig) -> None:
    config = sounds.model_copy(update={"lanes": 12})
    plain = list(digest(config, SPEC, 1, range(2)))
    assert len({checksum for _, checksum in plain}) == 2
    for world_size, workers in ((2, 1), (3, 2), (4, 3)):
        assert list(digest(config, SPEC, 1, range(2), world_size=world_size, workers=workers)) == plain
    assert list(digest(config, SPEC, 1, range(1, 2), world_size=2, resume_at=1)) == plain[1:]


@pytest.mark.fault
def test_a_damaged_sound_moves_no_other_lane(write_set: WriteSet, tokenizer_path: Path) -> None:
    samples = [_sample(number) for number in range(12)]
    broken = samples[4] | {"1.wav": samples[4]["1.wav"][:700]}
    sound = _config(write_set("sound", samples), tokenizer_path)
    damaged = _config(write_set("damaged", [*samples[:4], broken, *samples[5:]]), tokenizer_path)
    check_that_only_its_lane_moves(sound, damaged, SPEC, "000004")


def _film(with_sound: bool) -> bytes:
    """Return a video of four frames, with one second of sound in two channels."""
    if not with_sound:
        return encoded_video(4)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        video, audio = container.add_stream("mpeg4", rate=4), container.add_stream("aac", rate=16000, layout="stereo")
        video.height = video.width = 32
        video.pix_fmt = "yuv420p"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 60 * number, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        sound = av.AudioFrame.from_ndarray(tones(16000, 16000, 2), format="fltp", layout="stereo")
        sound.sample_rate, sound.pts = 16000, 0
        for stream, last in ((video, None), (audio, sound), (audio, None)):
            container.mux(stream.encode(last))
    return out.getvalue()


def test_the_sound_track_of_a_video_follows_its_frames(write_set: WriteSet, tokenizer_path: Path) -> None:
    films = [{"mp4": _film(number == 0), "txt": b"a film"} for number in range(2)]
    manifest = write_set("films", films)
    for with_frames in (True, False):
        config = _config(manifest, tokenizer_path, from_video=True)
        dataset = config.datasets[0].model_copy(update={} if with_frames else {"video": None})
        dataset = dataset.model_copy(update={"template": _caption()})
        builder = DocumentBuilder(dataset, load_tokenizer(config.tokenizer), SPEC)
        reader = SampleReader(Manifest.open(dataset.indexed), "films")
        sample, planned = reader.read(0), reader.read_without_images(0)
        (film,) = [part for part in sample.parts if isinstance(part, VideoPart)]
        assert film.sound == AudioSize(16384, 16000, 2)
        document, plan = builder(sample), builder.dry_run(planned)
        assert [item.modality for item in document.items] == (["image"] if with_frames else []) + ["audio"]
        assert [item.grid for item in plan.items] == [item.grid for item in document.items]
        assert document.items[-1].values.max() > 1  # As loud as a tone of 0.4.
        mute = reader.read(1)
        if with_frames:
            assert [item.modality for item in builder(mute).items] == ["image"]
        else:
            with pytest.raises(Exception, match=r"the video mp4 has no sound track"):
                builder(mute)
        reader.close()


TIMED = replace(SPEC, position_axes=3, tokens_per_second=25)


def test_frames_and_sound_of_a_video_take_turns(write_set: WriteSet, tokenizer_path: Path) -> None:
    """Two groups of two frames in one second, and 25 positions of sound: a turn of each, then the second of each."""
    manifest = write_set("films", [{"mp4": _film(number == 0), "txt": b"a film"} for number in range(2)])
    config = _config(manifest, tokenizer_path, from_video=True, interleave_seconds=0.5)
    dataset = config.datasets[0].model_copy(update={"template": _caption()})
    builder = DocumentBuilder(dataset, load_tokenizer(config.tokenizer), TIMED)
    reader = SampleReader(Manifest.open(dataset.indexed), "films")
    document, plan = builder(reader.read(0)), builder.dry_run(reader.read_without_images(0))
    for name in ("token_ids", "labels", "position_ids", "scatter_index"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(document, name))
    video, sound = document.items
    assert (video.modality, sound.modality, video.image, sound.image) == ("image", "audio", 0, 0)
    of_video, of_sound = np.split(document.scatter_index, [video.num_features(TIMED)])
    (film,) = document.images
    times = document.position_ids[:, 0] - document.position_ids[film.start, 0]
    assert times[of_video].tolist() == [0] * 4 + [12] * 4
    assert times[of_sound].tolist() == [*range(sound.num_features(TIMED))]
    kinds = ["v" if slot in of_video else "s" for slot in range(film.start, film.stop)]
    assert "".join(kinds) == "vvvv" + 12 * "s" + "vvvv" + (len(of_sound) - 12) * "s"
    (span,) = [span for span in text_spans(document, builder.tokenizer, TIMED) if not span.is_text]
    assert (span.kind, span.num_tokens) == ("video", film.stop - film.start)
    assert collate([Pack((document,), 0)], TIMED).pairs.tolist() == [[0, 0]]
    assert [item.modality for item in builder(reader.read(1)).items] == ["image"]
    reader.close()


def test_turns_that_no_document_can_have_are_rejected(tokenizer_path: Path) -> None:
    config = _config(Path("x"), tokenizer_path, from_video=True, interleave_seconds=0.5)
    tokenizer = load_tokenizer(config.tokenizer)
    for spec in (SPEC, replace(TIMED, tokens_per_second=1)):
        with pytest.raises(
            DataConfigError, match=r"data\.audio\.interleave_seconds=0\.5: needs a model with at least one"
        ):
            DocumentBuilder(config.datasets[0], tokenizer, spec)
    with pytest.raises(DataConfigError, match=r"the model has 24 time positions a second .* and 25 features of sound"):
        DocumentBuilder(config.datasets[0], tokenizer, replace(TIMED, tokens_per_second=24))
    assert config.datasets[0].video is not None
    timed = config.datasets[0].video.model_copy(update={"timestamps": "{seconds}"})
    with pytest.raises(DataConfigError, match=r"interleave_seconds: excludes data\.video\.timestamps"):
        DocumentBuilder(config.datasets[0].model_copy(update={"video": timed}), tokenizer, TIMED)
    with pytest.raises(ValueError, match="set from_video: true"):
        _config(Path("x"), tokenizer_path, interleave_seconds=2)


def test_an_index_of_an_earlier_version_hides_no_sound_track(write_set: WriteSet, tokenizer_path: Path) -> None:
    manifest = write_set("films", [{"mp4": _film(True), "txt": b"a film"}])
    (tar,) = manifest.parent.rglob("*.tar")
    path = index_path(tar)
    columns = read_columns(path, shard_index._COLUMNS, shard_index.INDEX_FORMAT)
    absent = ("samples", "rate", "channels", "row_crc32")
    arrays = {name: array.copy() for name, array in columns.arrays.items() if name not in absent}
    write_columns(path, arrays, columns.record)
    config = _config(manifest, tokenizer_path, from_video=True)
    dataset = config.datasets[0].model_copy(update={"template": _caption()})
    builder = DocumentBuilder(dataset, load_tokenizer(config.tokenizer), SPEC)
    reader = SampleReader(Manifest.open(dataset.indexed), "films")
    assert [item.modality for item in builder(reader.read(0)).items] == ["image", "audio"]
    with pytest.raises(SampleError, match=r"the index is old; then build it again"):
        builder.dry_run(reader.read_without_images(0))
    reader.close()


@pytest.mark.fault
def test_a_video_that_is_stored_as_tokens_alone_has_no_track_to_read(write_set: WriteSet, tokenizer_path: Path) -> None:
    codes = encode_grid(np.zeros((1, 2, 2), np.int64), 4, "ab" * 32, GridTimes(1, 8))
    manifest = write_set("films", [{"mp4.tokens": codes, "txt": b"a"}, {"mp4": _film(True), "mp4.tokens": codes}])
    reader = SampleReader(Manifest.open(manifest), "films")
    for reads_tracks in (True, False):
        config = _config(manifest, tokenizer_path, from_video=reads_tracks).datasets[0].audio
        assert config is not None
        inputs = config.inputs(load_tokenizer(_config(manifest, tokenizer_path).tokenizer), SPEC)
        for read in (reader.read, reader.read_without_images):
            alone, beside = (next(p for p in read(n).parts if isinstance(p, VideoPart)) for n in (0, 1))
            assert (inputs.track_of(beside) is not None) == reads_tracks
            if reads_tracks:
                with pytest.raises(
                    SampleError, match=r"stored as tokens alone, .* without --grids-only, or set audio\."
                ):
                    inputs.track_of(alone)
            else:
                assert inputs.track_of(alone) is None
    reader.close()


def _caption() -> object:
    return DataConfig.model_validate(
        {"tokenizer": {"kind": "tokenizers", "path": "x"}, "datasets": [], "lanes": 1, "packing": {"max_tokens": 9}}
    ).prompts.template


def test_a_folder_of_sounds_is_ingested_verified_and_counted(tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    for number, kind in enumerate(("wav", "flac", "mp3", "ogg", "opus", "m4a")):
        (folder / f"{number}.{kind}").write_bytes(encoded(4000 + number, kind=kind, channels=1 + number % 2))
        (folder / f"{number}.txt").write_text(f"sound {number}")
    (folder / "7.wav").write_bytes(encoded(4000)[:1000])
    (folder / "7.txt").write_text("a damaged one")
    report = ingest(folder, out, "sounds", on_error=OnError.SKIP)
    assert (report.num_samples, report.num_skipped, report.orphans.no_image) == (6, 1, 0)
    (index,) = [ShardIndex.open(tar) for tar in out.glob("*.tar")]
    found = {m.ext: (m.samples, m.rate, m.channels) for i in range(6) for m in index.row(i).members}
    assert found["wav"] == (4000, 16000, 1)
    assert found["flac"] == (4001, 16000, 2)
    assert found["txt"] == (0, 0, 0)
    index.check()
    (checked,) = verify(jobs_of(report.manifest)[1])
    assert not checked.damages
    summary = count(report.manifest).summary["sounds"]
    assert (summary["count"], summary["rate"]["min"], summary["channels"]["max"]) == (6, 16000, 2)
    assert summary["seconds"]["min"] == pytest.approx(0.25)
    tar = next(out.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    at = next(m.offset + m.size for i in range(6) for m in index.row(i).members if m.ext == "flac")
    data[at - 600 : at - 200] = bytes(400)  # The first 8 KB are padding.
    tar.write_bytes(data)
    (checked,) = verify(jobs_of(tar)[1])
    assert {damage.problem for damage in checked.damages} == {Problem.CHECKSUM, Problem.AUDIO}
