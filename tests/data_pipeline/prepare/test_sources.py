"""Sources in the layouts of other tools, written with those tools, are ingested to the expected samples."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import random
import re
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from data_pipeline.errors import DataConfigError
from data_pipeline.prepare.choices import OnError, SourceKind
from data_pipeline.prepare.ingest import IngestReport, ingest
from data_pipeline.prepare.records import FieldNames
from data_pipeline.prepare.skipped import read_skipped
from data_pipeline.prepare.sources import SourceOptions, open_source
from data_pipeline.sample import ImagePart, Sample, TextPart
from data_pipeline.shards.sample_reader import read_samples
from tests.engine.fork_server import Child, fork_program, fork_server


def picture(kind: str = "jpeg", shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 10, 20)).save(buffer, kind)
    return buffer.getvalue()


def stored(source: Path, out: Path, *, skip: bool = False, **options: Any) -> tuple[list[Sample], IngestReport]:
    opened = open_source(source, SourceOptions(**options))
    report = ingest(opened, out, "set", on_error=OnError.SKIP if skip else OnError.FAIL)
    return list(read_samples(report.manifest)), report


def parts_of(sample: Sample) -> list[str | bytes]:
    return [part.data if isinstance(part, ImagePart) else part.text for part in sample.parts]


def keys(samples: list[Sample]) -> list[str]:
    return [sample.provenance.key for sample in samples]


def test_a_folder_a_class_gives_captions_only_where_there_is_no_text(tmp_path: Path) -> None:
    for name in ("cats/1.jpg", "cats/deep/2.jpg", "dogs/1.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(picture())
    samples, _ = stored(tmp_path / "in", tmp_path / "classes")
    assert keys(samples) == ["cats/1", "cats/deep/2", "dogs/1"]
    assert [parts_of(sample) for sample in samples] == [[picture(), name] for name in ("cats", "cats", "dogs")]
    assert [sample.fields["class"] for sample in samples] == ["cats", "cats", "dogs"]
    plain, _ = stored(tmp_path / "in", tmp_path / "plain", kind=SourceKind.FOLDER)
    assert [parts_of(sample) for sample in plain] == [[picture()]] * 3
    (tmp_path / "in/cats/Thumbs.db").write_bytes(b"no text")
    assert "4 samples in 2 classes" in open_source(tmp_path / "in").description
    (tmp_path / "in/cats/Thumbs.db").unlink()
    (tmp_path / "in/cats/1.txt").write_text("a tabby")
    assert [parts_of(s)[1:] for s in stored(tmp_path / "in", tmp_path / "auto")[0]] == [["a tabby"], [], []]
    forced, _ = stored(tmp_path / "in", tmp_path / "forced", kind=SourceKind.CLASSES)
    assert [parts_of(sample)[1:] for sample in forced] == [["a tabby"], ["cats"], ["dogs"]]
    (tmp_path / "in/beside.jpg").write_bytes(picture())
    with pytest.raises(DataConfigError, match=r"beside\.jpg: is in no class folder"):
        open_source(tmp_path / "in", SourceOptions(SourceKind.CLASSES))


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables_name_images_or_hold_them(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(picture("png"))
    large = picture("png") + bytes(200_000)  # In base64 larger than Python's default limit for a CSV field.
    rows = [["a.png", "", 'a\ttab, "quotes"'], ["", base64.b64encode(large).decode(), "inline"]]
    with (tmp_path / f"list.{kind}").open("w", newline="") as file:
        writer = csv.writer(file, dialect="excel" if kind == "csv" else "excel-tab")
        writer.writerows([["path", "image_base64", "caption"], *rows])
    samples, _ = stored(tmp_path / f"list.{kind}", tmp_path / "out")
    assert [parts_of(s) for s in samples] == [[picture("png"), 'a\ttab, "quotes"'], [large, "inline"]]


def test_jsonl_takes_images_from_the_line_or_the_folder_given(tmp_path: Path) -> None:
    folder = tmp_path / "fetched"
    for name in ("a.png", "host.org/x/y.png?z=1"):  # The second as wget -x names it.
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture("png"))
    encoded = base64.b64encode(picture("png")).decode()
    rows: list[dict[str, Any]] = [
        {"path": f"data:image/png;base64,{encoded}"},
        {"path": {"bytes": encoded, "path": None}},
        {"path": "a.png"},
        {"path": str(folder / "a.png")},
        {"path": "https://host.org/x/y.png?z=1"},
        {"path": "https://host.org/gone.png"},
        {"path": "../list.jsonl"},
        {"path": "https://../../list.jsonl"},
        {"path": "/etc/hostname"},
        {"path": "data:image/png;base64,?"},
        {"path": "a.png", "image_base64": encoded},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({**row, "caption": "c"}) + "\n" for row in rows))
    samples, report = stored(path, tmp_path / "out", skip=True, images=folder)
    assert [parts_of(sample) for sample in samples] == [[picture("png"), "c"]] * 5
    reasons = [row.reason for row in read_skipped(report.skipped)]
    for reason, expected in zip(
        reasons, ["no such file", "outside of", "outside of", "outside of", "not valid base64", "has both"], strict=True
    ):
        assert expected in reason
    path.write_text(json.dumps(rows[4]))
    with pytest.raises(DataConfigError, match=r"not one usable row.*downloads nothing.*--images"):
        stored(path, tmp_path / "none", skip=True)


def test_an_image_column_of_another_name_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("png"))
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "caption": "c"}\n')
    (tmp_path / "x.csv").write_text("file_name,caption\na.png,c\n")
    for name, column in (("x.jsonl", "image"), ("x.csv", "file_name")):
        (sample,), _ = stored(tmp_path / name, tmp_path / f"{name}-guessed")
        assert parts_of(sample) == [picture("png"), "c"]
        assert f"column {column} as path" in open_source(tmp_path / name).description
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        with pytest.raises(DataConfigError, match=f"--column path={column}"):  # No such file in that folder.
            open_source(tmp_path / name, SourceOptions(images=tmp_path / "elsewhere"))
        renamed = FieldNames((("path", column),))
        (sample,), _ = stored(tmp_path / name, tmp_path / f"{name}-renamed", names=renamed)
        assert parts_of(sample) == [picture("png"), "c"]
        (sample,), _ = stored(tmp_path / name, tmp_path / f"{name}-dropped", names=FieldNames((), (column,)))
        assert parts_of(sample) == ["c"]


def test_metadata_of_laion_is_no_data_set_of_texts(tmp_path: Path) -> None:
    """The images are not in the file, so rows are stored as text only if the user drops the image column."""
    pq.write_table(pa.table({"URL": ["http://x/1"], "TEXT": ["a caption"], "WIDTH": [9]}), tmp_path / "laion.parquet")
    names = FieldNames((("caption", "TEXT"),))
    with pytest.raises(DataConfigError, match="--column path=URL, else --drop URL"):
        open_source(tmp_path / "laion.parquet", SourceOptions(names=names))
    both = FieldNames((("caption", "TEXT"), ("path", "URL")))
    with pytest.raises(DataConfigError, match="downloads nothing: fetch with img2dataset"):
        stored(tmp_path / "laion.parquet", tmp_path / "urls", skip=True, names=both)
    (sample,), _ = stored(tmp_path / "laion.parquet", tmp_path / "out", names=FieldNames(names.renamed, ("URL",)))
    assert (parts_of(sample), sample.fields["WIDTH"]) == (["a caption"], 9)


def test_parquet_holds_paths_or_bytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(picture("png"))
    columns: dict[str, list[Any]] = {
        "path": ["a.png"] * 5,
        "image": [{"bytes": picture(), "path": "x.jpg"}] * 5,  # As Hugging Face writes images.
        "jpg": [picture()] * 5,  # As img2dataset writes them.
    }
    for name, images in columns.items():
        table = pa.table({name: images, "caption": [f"c{i}" for i in range(5)], "n": [1.5, float("nan"), None, 2, 3]})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet", row_group_size=2)
        samples, _ = stored(tmp_path / "in" / f"{name}.parquet", tmp_path / name)
        expected = picture("png") if name == "path" else picture()
        assert [parts_of(sample) for sample in samples] == [[expected, f"c{i}"] for i in range(5)]
        assert [sample.fields.get("n") for sample in samples] == [1.5, None, None, 2, 3]


@pytest.mark.parametrize("inside", [True, False])
def test_obelics_documents_keep_their_order(tmp_path: Path, inside: bool) -> None:
    folder = tmp_path / "images"
    (folder / "host.org").mkdir(parents=True)
    for shade, name in enumerate(("a.jpg", "b.jpg")):
        (folder / "host.org" / name).write_bytes(picture(shade=shade))
    a, b = [picture(), picture(shade=1)] if inside else ["http://host.org/a.jpg", "host.org/b.jpg"]
    table = pa.table(
        {
            "images": pa.array([[None, a, b], [None], [a, None]]),
            "texts": [["one", None, None], ["alone"], [None, "two"]],
            "metadata": [json.dumps([None, {"alt": "x"}, None]), None, "[]"],
            "general_metadata": ["{}"] * 3,
        }
    )
    pq.write_table(table, tmp_path / "part.parquet")
    options = {} if inside else {"images": folder}
    samples, _ = stored(tmp_path / "part.parquet", tmp_path / "out", kind=SourceKind.OBELICS, **options)
    first, second = picture(), picture(shade=1)
    assert [parts_of(sample) for sample in samples] == [["one", first, second], ["alone"], [first, "two"]]
    assert json.loads(samples[0].fields["metadata"])[1] == {"alt": "x"}


def test_documents_lose_unreadable_images_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("png"))
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    rows: list[dict[str, Any]] = [
        {"images": ["gone.jpg", None, "a.png", "page.jpg"], "texts": [None, "one", None, None]},
        {"images": ["gone.jpg"], "texts": [None]},
        {"path": "gone.jpg", "caption": "no document"},
        {"parts": [{"text": 3}]},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataConfigError, match="4 were skipped"):
        stored(path, tmp_path / "strict", skip=True)
    (sample,), report = stored(path, tmp_path / "out", skip=True, drop_images=True)
    assert parts_of(sample) == ["one", picture("png")]
    assert sample.fields == {"dropped_images": 2}
    assert [row.row for row in read_skipped(report.skipped)] == [2, 3, 4]


def img2dataset_folder(root: Path) -> Path:
    """Write two tars with their Parquet and statistics files, as img2dataset leaves them."""
    root.mkdir()
    for shard in range(2):
        rows = []
        with webdataset.TarWriter(str(root / f"{shard:05d}.tar")) as tar:
            for i in range(3):
                key = f"{shard:05d}{i:04d}"
                row = {"caption": f"c {key}", "url": f"http://x/{key}", "key": key, "status": "success", "width": 6}
                rows.append(row)
                tar.write({"__key__": key, "jpg": picture(shade=i), "txt": row["caption"], "json": row})
        failed = {**rows[0], "key": f"{shard:05d}0003", "status": "failed_to_download"}
        pq.write_table(pa.Table.from_pylist([*rows, failed]), root / f"{shard:05d}.parquet")
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 4, "successes": 3}))
    return root


def test_img2dataset_gives_one_caption_and_a_count_without_reading(tmp_path: Path) -> None:
    source = img2dataset_folder(tmp_path / "laion")
    opened = open_source(source)
    assert (opened.count(), "img2dataset" in opened.description) == (6, True)
    samples, _ = stored(source, tmp_path / "out")
    assert keys(samples) == [f"{s:05d}/{s:05d}{i:04d}" for s in range(2) for i in range(3)]
    assert [parts_of(s) for s in samples] == [
        [picture(shade=i), f"c {s:05d}{i:04d}"] for s in range(2) for i in range(3)
    ]
    assert {sample.fields["status"] for sample in samples} == {"success"}


def test_energon_folders_are_read_by_their_field_map(tmp_path: Path) -> None:
    root = tmp_path / "energon"
    for shard in ("train-0", "train-1", "val-0"):
        (root / shard).parent.mkdir(exist_ok=True)
        with webdataset.TarWriter(str(root / f"{shard}.tar")) as tar:
            tar.write({"__key__": shard, "jpg": picture(), "json": {"text": {"en": f"in {shard}"}, "other": 1}})
    meta = root / ".nv-meta"
    meta.mkdir()
    splits = {"train": ["train-{0..1}.tar"], "val": ["val-0.tar"], "test": []}
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": splits, "exclude": []}))
    (meta / "dataset.yaml").write_text(
        yaml.safe_dump(
            {
                "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
                "field_map": {"image": "png,jpg", "caption": "json[text][en]"},
            }
        )
    )
    samples, _ = stored(root, tmp_path / "out")
    assert [parts_of(sample) for sample in samples] == [[picture(), "in train-0"], [picture(), "in train-1"]]
    (sample,), _ = stored(root, tmp_path / "val", split="val")
    assert parts_of(sample) == [picture(), "in val-0"]
    (meta / "dataset.yaml").write_text("__class__: VQASample\nsample_loader: sample_loader.py:load\n")
    with pytest.raises(DataConfigError, match="is code"):
        open_source(root)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_mmc4_documents_in_tars(tmp_path: Path, suffix: str) -> None:
    record = {
        "text_list": ["zero", "one"],
        "image_info": [{"image_name": "x.jpg", "matched_text_index": 1}],
        "url": "http://page",
    }
    with tarfile.open(tmp_path / f"docs.{suffix}", "w:gz" if suffix.endswith("gz") else "w") as tar:
        for name, content in (("7.0.jpg", picture()), ("7.json", json.dumps(record).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (sample,), _ = stored(tmp_path / f"docs.{suffix}", tmp_path / "out")
    assert [type(part) for part in sample.parts] == [TextPart, ImagePart, TextPart]
    assert parts_of(sample) == ["zero", picture(), "one"]
    assert sample.fields == {"url": "http://page"}


def written(kind: str, root: Path, count: int) -> Path:
    """Write a source of a kind, with every eleventh row damaged."""
    root.mkdir()
    images = [b"damaged" if i % 11 == 3 else picture("png", i) for i in range(count)]
    texts = [f"text {i}" for i in range(count)]
    if kind == "parquet":
        for half in range(2):
            rows = slice(half * count // 2, (half + 1) * count // 2)
            table = pa.table({"image": images[rows], "caption": texts[rows]})
            pq.write_table(table, root / f"{half}.parquet", row_group_size=9)
        return root
    if kind == "tsv":
        with (root / "list.tsv").open("w") as file:
            file.write("image_base64\tcaption\n")
            file.writelines(f"{base64.b64encode(i).decode()}\t{t}\n" for i, t in zip(images, texts, strict=True))
        return root / "list.tsv"
    suffix = "tar.gz" if kind == "packed" else "tar"
    for part in range(3):
        with webdataset.TarWriter(str(root / f"{part}.{suffix}")) as tar:
            for i in range(part, count, 3):
                tar.write({"__key__": f"{i}", "png": images[i], "txt": texts[i]})
    return root


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["parquet", "tsv", "tars", "packed"])
def test_every_kind_of_source_can_be_resumed_after_any_row(tmp_path: Path, kind: str) -> None:
    source = written(kind, tmp_path / "in", 120)
    options: dict[str, Any] = {"max_samples": 7, "on_error": OnError.SKIP}
    whole = ingest(source, tmp_path / "whole", "set", **options)
    assert (whole.num_samples, whole.num_skipped) == (109, 11)
    rows, rng = 0, random.Random()
    stop = rng.randrange(1, 120)

    def interrupt(count: int) -> None:
        nonlocal rows
        rows += count
        if rows >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, tmp_path / "out", "set", **options, progress=interrupt)
    ingest(source, tmp_path / "out", "set", **options, workers=2)
    left = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert left[0] == left[1], stop


def test_another_process_computes_the_same_digest(tmp_path: Path) -> None:
    """Otherwise an interrupted ingest of tars could not be resumed."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"a"))
    code = "import sys; from data_pipeline.prepare.sources import open_source; print(open_source(sys.argv[1]).digest())"
    both = [fork_program(code, str(tmp_path / "a.tar"), log=tmp_path / f"{n}.log", number=n) for n in range(2)]
    first, second = (process.communicate(timeout=60)[0] for process in both)
    assert first == second
    assert re.fullmatch(r"[0-9a-f]+\n", first)


@pytest.mark.fault
def test_the_command_line_killed_at_random_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Kill the whole process group at random moments, twice, and then let the command finish."""
    source, rng = tmp_path / "in", random.Random()
    source.mkdir()
    for i in range(1200):
        bad = i % 97 == 5
        (source / f"{i:04d}.png").write_bytes(b"damaged" if bad else picture("png", i % 256))
        (source / f"{i:04d}.txt").write_text(f"number {i}")

    def begin(out: Path) -> Child:
        words = ["--shard-samples", "10", "--jobs", "2", "--on-error", "skip"]
        command = ["data", "ingest", str(source), "--output", str(out), *words]
        return fork_server(0).fork(
            "tests.engine.fork_server:run_command", [command], dict(os.environ), tmp_path / "log"
        )

    start = time.monotonic()
    assert begin(tmp_path / "whole").wait() == 0
    took = time.monotonic() - start
    for _ in range(2):
        process = begin(tmp_path / "out")
        time.sleep(took * (0.3 + 0.7 * rng.random()))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out/data.manifest").exists():
            break
    else:
        assert begin(tmp_path / "out").wait() == 0
    left = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("whole", "out")]
    left[1].pop("data.ingest.json", None)  # A kill between writing the manifest and deleting this file leaves it.
    assert left[0] == left[1]
    assert len(left[0]) == 2 * 119 + 2


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_an_array_of_dialogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """LLaVA's and ShareGPT's files: one array, a broken row is skipped."""
    monkeypatch.setattr("data_pipeline.io.json_array._CHUNK_BYTES", chunk)
    (tmp_path / "a.png").write_bytes(picture("png"))
    talk = [{"from": "human", "value": '<image>\nWhat, "ist" größer: [a] or {b}?'}, {"from": "gpt", "value": "a"}]
    rows = [
        {"id": 1, "image": "a.png", "conversations": talk},
        {"id": 2, "conversations": talk},
        {"id": 3, "images": ["a.png", "a.png"], "messages": [{"role": "user", "content": "q"}]},
        {"id": 4, "image": "gone.png", "conversations": talk},
        "no object",
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1).replace('"id": 2', '"id": broken'))
    samples, report = stored(tmp_path / "x.json", tmp_path / "out", skip=True)
    assert [sample.fields.get("conversations") for sample in samples] == [talk, None]
    assert [len([part for part in sample.parts if isinstance(part, ImagePart)]) for sample in samples] == [1, 2]
    reasons = [row.reason for row in read_skipped(report.skipped)]
    for reason, expected in zip(reasons, ["damaged JSON", "no such file", "expected an object"], strict=True):
        assert expected in reason
    assert "a json list of 5 rows" in open_source(tmp_path / "x.json").description
    (tmp_path / "x.json").write_text('{"images": []}')
    with pytest.raises(DataConfigError, match=r"x\.json: expected a JSON array.* found an object; --from jsonl"):
        open_source(tmp_path / "x.json")
