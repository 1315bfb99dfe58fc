"""Ingest of videos from folders of frames, lists, dialogues of LLaVA and Qwen, and Parquet; and what keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import SampleError
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.dedup.signatures import Criterion, signature
from data_pipeline.prepare.folders import _frames_beside
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.media_files import FileLoader, frame_names
from data_pipeline.prepare.records import members_from_record
from data_pipeline.prepare.shrink_images import shrink
from data_pipeline.prepare.sources import open_source
from data_pipeline.prepare.text_kinds import DialogueSource, read_examples
from data_pipeline.sample import Provenance, Sample, StoredFrames, VideoPart
from data_pipeline.shards.sample_reader import assemble, read_samples
from data_pipeline.text.templates import DialogueTemplate
from data_pipeline.text.templates.base import media_of
from tests.data_pipeline.conftest import picture
from tests.sounds import encoded as encoded_sound
from tests.videos import encoded, stored_frames

MP4, WEBM = encoded(4), encoded(5, kind="webm")
FRAMES = stored_frames(12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two video files, one of them with a wrong extension, an image, and a folder of numbered frames."""
    root = tmp_path / "media"
    (root / "steps").mkdir(parents=True)
    (root / "a.mp4").write_bytes(MP4)
    (root / "b.mp4").write_bytes(WEBM)
    (root / "c.png").write_bytes(picture(0))
    for number, data in enumerate(FRAMES.values()):
        (root / "steps" / f"frame{number}.png").write_bytes(data)
    return root


def _sample(folder: Path, record: dict[str, Any]) -> Sample:
    return assemble(members_from_record(record, FileLoader(folder)), Provenance("?", "?", "0", 0))


def _media(sample: Sample) -> list[Any]:
    return [part.data.images if isinstance(part.data, StoredFrames) else part.data for part in media_of(sample)]


SAYS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "a"}]
ALL = tuple(FRAMES.values())


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"path": "a.mp4", "caption": "x"}, [MP4]),
        ({"video": "b.mp4", "caption": "x"}, [WEBM]),
        ({"videos": ["a.mp4", "b.mp4"], "caption": "x"}, [MP4, WEBM]),
        ({"video": "steps", "fps": "4", "caption": "x"}, [ALL]),
        ({"video": ["steps/frame3.png", "steps/frame1.png"], "fps": 2, "caption": "x"}, [(ALL[3], ALL[1])]),
        ({"videos": ["steps", "a.mp4"], "fps": 4, "caption": "x"}, [ALL, MP4]),
        ({"path": "c.png", "video": "https://there/is.mp4", "caption": "x"}, [picture(0)]),
        ({"id": 3, "video": "a.mp4", "conversations": SAYS}, [MP4]),
        (
            {"image": "c.png", "video": "a.mp4", "conversations": [{**SAYS[0], "value": "<image><video>?"}, SAYS[1]]},
            None,
        ),
        ({"parts": [{"text": "x"}, {"video": "steps", "fps": 4}, {"image": "c.png"}]}, [ALL, picture(0)]),
    ],
)
def test_rows_name_videos(folder: Path, record: dict[str, Any], expected: list[Any] | None) -> None:
    sample = _sample(folder, record)
    assert _media(sample) == ([picture(0), MP4] if expected is None else expected)
    for part in sample.parts:
        if isinstance(part, VideoPart) and isinstance(part.data, StoredFrames):
            assert part.data.per_second == float(record.get("fps", 4))
    if "conversations" in record:
        assert len([piece for piece in DialogueTemplate().pieces(sample, None) if hasattr(piece, "data")]) == len(
            _media(sample)
        )


def test_dialogues_of_llava_video_and_of_qwen(folder: Path) -> None:
    """LLaVA-Video marks its videos with ``<image>``; Qwen names frames and their rate in the turn."""
    told = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
    sample = _sample(folder, {"video": "a.mp4", "conversations": told})
    assert sample.fields["conversations"][0]["value"] == "<video>\nWhat?"
    items = [
        {"type": "video", "video": ["steps/frame0.png", "steps/frame1.png"], "sample_fps": 2.5},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "image", "image": "c.png"},
        {"type": "text", "text": "What?"},
    ]
    turns = [{"role": "user", "content": items}, {"role": "assistant", "content": "a"}]
    sample = _sample(folder, {"messages": turns})
    shown = [piece for piece in DialogueTemplate().pieces(sample, None) if hasattr(piece, "data")]
    frames, file, image = (part.data for part in shown)
    assert (frames, file, image) == (StoredFrames(ALL[:2], 2.5), MP4, picture(0))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"video": "steps", "caption": "x"}, "fps is None"),
        ({"video": "gone.mp4", "caption": "x"}, "no such file"),
        ({"video": "../media/a.mp4", "fps": 1, "caption": "x"}, None),
        ({"video": "../../etc", "fps": 1, "caption": "x"}, "outside of"),
        ({"video": ["a.mp4", "c.png"], "fps": 1, "caption": "x"}, r"a\.mp4: no JPEG, PNG or WebP"),
        ({"path": "steps", "fps": 1, "caption": "x"}, "a folder, expected a file"),
        ({"parts": [{"image": "a.mp4"}]}, "which is of kind video"),
        ({"parts": [{"video": "c.png"}]}, r"c\.png: a file of kind image, named by the field video"),
        ({"video": "old.avi", "caption": "x"}, r"old\.avi: no MP4, WebM, Matroska or GIF"),
        ({"audio": "old.avi", "caption": "x"}, r"old\.avi: no WAV, FLAC, MP3, Ogg or M4A"),
        ({"video": "speech.mp4", "caption": "x"}, "for its sound alone, rename an MP4 to .m4a"),
    ],
)
@pytest.mark.fault
def test_bad_references_are_bad_rows(folder: Path, record: dict[str, Any], message: str | None) -> None:
    (folder / "old.avi").write_bytes(b"RIFF\0\0\0\0AVI LIST")
    (folder / "speech.mp4").write_bytes(encoded_sound(4000, kind="m4a").replace(b"ftypM4A ", b"ftypisom"))
    if message is None:
        assert _media(_sample(folder, record)) == [MP4]
        return
    with pytest.raises(SampleError, match=message):
        _sample(folder, record)


def test_numbers_order_frames_by_value() -> None:
    assert frame_names(["f10.jpg", "f9.JPG", "f1.png", "notes.txt", ".x.jpg"]) == ["f1.png", "f9.JPG", "f10.jpg"]


def test_a_folder_of_frames_beside_its_json(folder: Path, tmp_path: Path) -> None:
    (folder / "steps.json").write_text(json.dumps({"fps": 4, "caption": "steps"}))
    (folder / "c.txt").write_text("c")
    (folder / "IMG_1.MOV").write_bytes(MP4.replace(b"ftypisom", b"ftypqt  "))
    report = ingest(folder, tmp_path / "out", "set", on_error=OnError.FAIL)
    samples = {sample.provenance.key: sample for sample in read_samples(report.manifest)}
    assert sorted(samples) == ["IMG_1", "a", "b", "c", "steps"]
    assert media_of(samples["IMG_1"])[0].size == media_of(samples["a"])[0].size
    assert _media(samples["steps"]) == [ALL]
    assert samples["steps"].fields == {"caption": "steps"}
    (video,) = media_of(samples["steps"])
    assert (video.size.num_frames, video.size.microseconds) == (12, 3_000_000)


def test_more_than_ten_thousand_frames_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.json").write_text('{"fps": 25}')
    (tmp_path / "long").mkdir()
    monkeypatch.setattr("os.listdir", lambda _: [f"{number}.jpg" for number in range(10_001)])
    frames = sorted(_frames_beside(tmp_path / "long.json").items())
    assert [path.stem for _, path in frames] == [str(number) for number in range(10_001)]


def test_an_m4a_with_the_brand_of_mp4_is_a_sound(tmp_path: Path) -> None:
    sound = encoded_sound(4000, kind="m4a").replace(b"ftypM4A ", b"ftypisom")
    (tmp_path / "a.m4a").write_bytes(sound)
    for field in ("audio", "path"):
        members = members_from_record({field: "a.m4a", "caption": "x"}, FileLoader(tmp_path))
        assert members["m4a"] == sound


def test_parquet_with_videos_of_datasets(tmp_path: Path) -> None:
    features = {"clip": {"_type": "Video"}, "text": {"_type": "Value"}}
    table = pa.table({"clip": [{"bytes": MP4, "path": None}, {"bytes": WEBM, "path": "b"}], "text": ["a", "b"]})
    note = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(note), tmp_path / "x.parquet")
    report = ingest(tmp_path / "x.parquet", tmp_path / "out", "set")
    samples = list(read_samples(report.manifest))
    assert [_media(sample) for sample in samples] == [[MP4], [WEBM]]
    assert [sample.texts for sample in samples] == [["a"], ["b"]]


def test_what_changes_samples_keeps_their_videos(folder: Path, tmp_path: Path) -> None:
    members = members_from_record({"video": "steps", "fps": 4, "caption": "x"}, FileLoader(folder))
    small = assemble(shrink(members, 16), Provenance("?", "?", "0", 0))
    (video,) = media_of(small)
    assert (len(video.data.images), video.data.per_second) == (12, 4.0)
    (folder / "list.jsonl").write_text(json.dumps({"video": "steps", "fps": 4, "caption": "x"}))
    source = open_source(folder / "list.jsonl")
    assert read_examples(source).have_images
    asked = DialogueSource(source, "What?")
    (chunk,) = asked.chunks()
    (found,) = asked.reader.read(chunk)
    sample = assemble(found, Provenance("?", "?", "0", 0))
    assert sample.fields["messages"][0]["content"] == "<video>What?"
    assert _media(sample) == [ALL]
    keys = [signature(one, Criterion.EXACT, 1 << 20) for one in (sample, small, _sample(folder, {"path": "a.mp4"}))]
    assert len({key for _, key in keys}) == 3
