"""Ingested samples equal the source's files, also after a kill at any row and a second start."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.atomic import partial_path
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.skipped import SkippedRow, SkippedRowLog, read_skipped
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.shards.manifest import Manifest
from tests.engine.fork_server import fork_program


def picture(kind: str, shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 10, 20)).save(buffer, kind)
    return buffer.getvalue()


def stored(manifest_path: Path) -> dict[str, dict[str, bytes]]:
    """Return the members of every sample in the shards, by key."""
    manifest, samples = Manifest.open(manifest_path), {}
    for number in range(manifest.num_shards):
        index = manifest.open_index(number)
        data = index.tar_path.read_bytes()
        for i in range(len(index)):
            row = index.row(i)
            samples[row.key] = {m.ext: data[m.offset : m.offset + m.size] for m in row.members}
    assert all(report.damages == [] for report in verify(jobs_of(manifest_path)[1]))
    return samples


def folder_of(root: Path) -> Path:
    files = {
        "sub/cat.jpg": picture("jpeg"),
        "sub/cat.txt": b"a cat",
        "dog.PNG": picture("png"),
        "dog.json": b'{"caption": "a dog", "id": 7}',
        "page.txt": b"only text",
        "two.0.webp": picture("webp"),
        "two.1.png": picture("png"),
        "two.json": b'{"parts": [{"image": "0.webp"}, {"text": "and"}, {"image": "1.png"}]}',
        ".hidden": b"ignored",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def list_of(root: Path, rows: list[dict[str, Any]]) -> Path:
    path = root / "list.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def many(root: Path, count: int) -> Path:
    for i in range(count):
        (root / f"{i}.png").write_bytes(picture("png", i))
    return list_of(root, [{"path": f"{i}.png", "caption": f"number {i}"} for i in range(count)])


def test_a_folder_becomes_samples_by_stem(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    report = ingest(source, tmp_path / "out", "set")
    assert (report.num_samples, report.num_shards, report.num_skipped, report.skipped) == (4, 1, 0, None)
    assert stored(report.manifest) == {
        "sub/cat": {"jpg": (source / "sub/cat.jpg").read_bytes(), "txt": b"a cat"},
        "dog": {"png": (source / "dog.PNG").read_bytes(), "json": (source / "dog.json").read_bytes()},
        "page": {"txt": b"only text"},
        "two": {ext: (source / f"two.{ext}").read_bytes() for ext in ("0.webp", "1.png", "json")},
    }


def test_csv_rows_keep_their_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jpeg").write_bytes(picture("jpeg"))
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["path", "caption", "source"], ["a.jpeg", 'says "hi",\nthen', "web"], ["", "text alone", ""]])
    samples = stored(ingest(tmp_path / "list.csv", tmp_path / "out", "set").manifest)
    assert samples["000000001"]["jpg"] == picture("jpeg")
    assert json.loads(samples["000000001"]["json"]) == {"caption": 'says "hi",\nthen', "source": "web"}
    assert {key: json.loads(members["json"]) for key, members in samples.items() if "jpg" not in members} == {
        "000000002": {"caption": "text alone"}
    }


def test_jsonl_parts_become_numbered_members(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("png"))
    (tmp_path / "b.bin").write_bytes(picture("jpeg"))
    parts = [{"text": "see"}, {"image": "a.png"}, {"text": "or"}, {"image": "b.bin"}]
    rows = [{"parts": parts, "topic": "x"}, {"captions": ["one", "uno"], "path": "a.png"}]
    samples = stored(ingest(list_of(tmp_path, rows), tmp_path / "out", "set").manifest)
    first, second = samples["000000001"], samples["000000002"]
    assert (first["0.png"], first["1.jpg"]) == (picture("png"), picture("jpeg"))
    assert json.loads(first["json"]) == {
        "parts": [{"text": "see"}, {"image": "0.png"}, {"text": "or"}, {"image": "1.jpg"}],
        "topic": "x",
    }
    assert json.loads(second["json"]) == {"captions": ["one", "uno"]}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"path": "gone.png", "caption": "x"}, r"gone\.png: no such file"),
        ({"path": ".", "caption": "x"}, "a folder, expected a file"),
        ({"path": "text.png", "caption": "x"}, "no JPEG, PNG or WebP"),
        ({"path": "ok.png", "caption": 3}, "not a string"),
        ({"path": "ok.png", "captions": "x"}, "must be a list"),
        ({"path": "ok.png", "parts": []}, "both an image and parts"),
        ({"parts": [{"image": "ok.png", "text": "x"}]}, "or image alone"),
        ({"caption": ""}, "neither an image"),
        ([1], "expected an object"),
    ],
)
def test_a_bad_row_fails_or_is_skipped_by_number(tmp_path: Path, row: Any, reason: str) -> None:
    (tmp_path / "ok.png").write_bytes(picture("png"))
    (tmp_path / "text.png").write_text("no picture")
    source = list_of(tmp_path, [{"path": "ok.png", "caption": "fine"}, row, {"caption": "fine"}])
    with pytest.raises(SampleError, match=f"row 2: .*{reason}"):
        ingest(source, tmp_path / "fail", "set")
    assert sorted(path.name for path in (tmp_path / "fail").iterdir()) == ["set.ingest.json"]
    report = ingest(source, tmp_path / "skip", "set", on_error=OnError.SKIP)
    assert [(row.row, row.key) for row in read_skipped(report.skipped)] == [(2, "000000002")]
    assert list(stored(report.manifest)) == ["000000001", "000000003"]


@pytest.mark.fault
def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("file,text\na,b\n")
    (tmp_path / "x.parquet").write_text("")
    (tmp_path / "x.bin").write_text("")
    (tmp_path / "empty").mkdir()
    for name, reason in [
        ("x.csv", "column path"),
        ("x.parquet", "not a readable Parquet file"),
        ("x.bin", "reads a folder"),
        ("gone", "no such"),
        ("empty", "no files"),
    ]:
        with pytest.raises(DataConfigError, match=reason):
            ingest(tmp_path / name, tmp_path / "out", "set")
    source = many(tmp_path, 2)
    ingest(source, tmp_path / "out", "set")
    with pytest.raises(DataConfigError, match="exists already"):
        ingest(source, tmp_path / "out", "set")


_DIES = """
import os, signal, sys
from data_pipeline.io.atomic import partial_path
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
rows = 0
def progress(count):
    global rows
    rows += count
    if rows == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
options = {"max_samples": 4, "workers": int(sys.argv[4]), "on_error": OnError.SKIP}
ingest(sys.argv[1], sys.argv[2], "set", progress=progress, **options)
"""


@pytest.mark.fault
@pytest.mark.parametrize(
    ("rows_until_death", "num_stored", "workers"), [(2, 0, 0), (9, 4, 0), (12, 8, 0), (39, 36, 2), (88, 84, 2)]
)
def test_killed_and_started_again_ends_with_the_same_bytes(
    tmp_path: Path, rows_until_death: int, num_stored: int, workers: int
) -> None:
    source = many(tmp_path, 14 if workers == 0 else 100)
    (tmp_path / "3.png").unlink()
    options = {"max_samples": 4, "on_error": OnError.SKIP}
    whole = ingest(source, tmp_path / "whole", "set", **options)  # type: ignore[arg-type]
    out = tmp_path / "out"
    words = [str(source), str(out), str(rows_until_death), str(workers)]
    assert fork_program(_DIES, *words, log=tmp_path / "log").wait() == -9
    assert not (out / "set.manifest").exists()
    again = ingest(source, out, "set", **options)  # type: ignore[arg-type]
    assert again.num_resumed == num_stored
    assert [row.row for row in read_skipped(again.skipped)] == [4]
    assert again.num_skipped == whole.num_skipped == 1
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path / "whole", out)]
    assert files[0] == files[1]


@pytest.mark.fault
def test_where_the_manifest_exists_the_log_of_skipped_rows_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path, 9)
    (tmp_path / "3.png").unlink()
    options = {"max_samples": 4, "on_error": OnError.SKIP}
    whole = ingest(source, tmp_path / "whole", "set", **options)  # type: ignore[arg-type]

    def dies(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.prepare.ingest.write_manifest", dies)
        with pytest.raises(OSError, match="killed"):
            ingest(source, tmp_path / "out", "set", **options)  # type: ignore[arg-type]
    assert (tmp_path / "out/set.skipped.jsonl").exists()
    assert ingest(source, tmp_path / "out", "set", **options).num_skipped == whole.num_skipped == 1  # type: ignore[arg-type]
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert files[0] == files[1]


@pytest.mark.long
def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    source = many(tmp_path, 150)
    for number in (0, 33, 34, 149):
        (tmp_path / f"{number}.png").write_bytes(b"damaged")
    files = []
    for workers in (0, 1, 3):
        out = tmp_path / f"out-{workers}"
        report = ingest(source, out, "set", max_bytes=30_000, workers=workers, on_error=OnError.SKIP)
        assert (report.num_samples, report.num_skipped) == (146, 4)
        assert [row.row for row in read_skipped(report.skipped)] == [1, 34, 35, 150]
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1] == files[2]
    assert len(files[0]) == 2 * report.num_shards + 2 > 10


@pytest.mark.fault
@pytest.mark.parametrize("named", [True, False])
def test_the_list_of_skipped_rows_survives_a_kill(tmp_path: Path, named: bool) -> None:
    path = tmp_path / "set.skipped.jsonl"
    with SkippedRowLog(path, 0) as rows:
        for number in (2, 5, 9):
            rows.add(SkippedRow(number, f"key-{number}", "a reason"))
    if named:  # Killed after the renaming, before the manifest.
        rows.publish()
    else:
        with partial_path(path).open("ab") as file:
            file.write(b'{"row": 10, "ke')
    with SkippedRowLog(path, 5) as rows:  # Rows after 5 are read again.
        rows.add(SkippedRow(9, "key-9", "another reason"))
        assert rows.count == 3
    assert [(row.row, row.reason) for row in read_skipped(rows.publish())] == [
        (2, "a reason"),
        (5, "a reason"),
        (9, "another reason"),
    ]
    with SkippedRowLog(path, 0) as rows:
        assert rows.publish() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_an_unfinished_ingest_of_another_source_is_not_mixed_in(tmp_path: Path) -> None:
    source = many(tmp_path, 14)
    out = tmp_path / "out"
    fork_program(_DIES, str(source), str(out), "9", "0", log=tmp_path / "log").wait()
    with pytest.raises(DataConfigError, match="other sizes"):
        ingest(source, out, "set", max_samples=5, on_error=OnError.SKIP)
    (out / "set.ingest.json").unlink()
    with pytest.raises(DataConfigError, match="belongs to no unfinished ingest"):
        ingest(source, out, "set")


_FULL = """
import resource, sys
from data_pipeline.io.atomic import partial_path
from data_pipeline.prepare.ingest import ingest
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    ingest(sys.argv[1], sys.argv[2], "set", max_samples=30)
except OSError as error:
    sys.exit(7)
"""


@pytest.mark.fault
def test_a_full_disk_leaves_only_finished_shards(tmp_path: Path) -> None:
    source = many(tmp_path, 60)
    assert fork_program(_FULL, str(source), str(tmp_path / "out"), log=tmp_path / "log").wait() == 7
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set.ingest.json"]
