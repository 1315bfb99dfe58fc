"""The common layouts of Hugging Face are ingested with their texts, and the description names guessed columns."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.errors import DataConfigError
from data_pipeline.prepare.choices import OnError, SourceKind
from data_pipeline.prepare.ingest import IngestReport, ingest
from data_pipeline.prepare.records import FieldNames
from data_pipeline.prepare.sources import SourceOptions, open_source
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.templates.base import images_of
from mmscale.cli.main import main

datasets = pytest.importorskip("datasets")

TEXTS = ["a red square", "a blue square", "a green one"]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), ((255, 0, 0), (0, 0, 255), (0, 255, 0))[number])


def encoded(number: int) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


def stored(source: Path, out: Path, **options: Any) -> tuple[list[Sample], str, IngestReport]:
    """Ingest a source and return samples, description and report."""
    opened = open_source(source, SourceOptions(**options))
    report = ingest(opened, out, "set", on_error=OnError.SKIP)
    return list(read_samples(report.manifest)), opened.description, report


def parquet(path: Path, features: dict[str, Any], columns: dict[str, list[Any]]) -> Path:
    """Write Parquet as ``datasets`` does, with the features in the schema's metadata."""
    pictures = [picture(number) for number in range(3)]
    made = datasets.Dataset.from_dict(columns | {"image": pictures}, features=datasets.Features(features))
    made.to_parquet(path)
    return path


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    image = {"image": datasets.Image()}
    text = {**image, "text": datasets.Value("string")}
    samples, said, report = stored(parquet(tmp_path / "a.parquet", text, {"text": TEXTS}), tmp_path / "a")
    assert [sample.texts for sample in samples] == [[text] for text in TEXTS]
    assert [sample.fields for sample in samples] == [{"caption": text} for text in TEXTS]
    assert all(images_of(sample) for sample in samples)
    assert "images in column image" in said
    assert "column text as caption" in said
    assert report.orphans.no_text == 0

    labelled = {**image, "label": datasets.ClassLabel(names=["cat", "dog"])}
    source = parquet(tmp_path / "b.parquet", labelled, {"label": [1, 0, -1]})
    samples, said, report = stored(source, tmp_path / "b")
    assert [sample.fields for sample in samples] == [
        {"label": "dog", "caption": "dog"},
        {"label": "cat", "caption": "cat"},
        {},
    ]
    assert "the name of the class in column label as caption" in said
    assert report.orphans.no_text == 1

    both = {**text, "label": datasets.ClassLabel(names=["cat", "dog"])}
    source = parquet(tmp_path / "c.parquet", both, {"text": TEXTS, "label": [0, 1, 0]})
    samples, _, _ = stored(source, tmp_path / "c")
    assert [sample.fields for sample in samples] == [
        {"label": label, "caption": text} for label, text in zip(["cat", "dog", "cat"], TEXTS, strict=True)
    ]
    samples, said, _ = stored(source, tmp_path / "d", names=FieldNames((("caption", "label"),)))
    assert [sample.fields["caption"] for sample in samples] == ["cat", "dog", "cat"]
    assert [sample.fields["text"] for sample in samples] == TEXTS
    assert "as caption" not in said


def test_parquet_without_a_note_of_features_and_with_an_image_of_another_name(tmp_path: Path) -> None:
    images = [{"bytes": encoded(number), "path": None} for number in range(3)]
    talks = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in TEXTS]
    pq.write_table(pa.table({"image": images, "txt": [[text, "x"] for text in TEXTS]}), tmp_path / "a.parquet")
    samples, said, _ = stored(tmp_path / "a.parquet", tmp_path / "a")
    assert [sample.fields for sample in samples] == [{"captions": [text, "x"]} for text in TEXTS]
    assert "column txt as captions" in said

    pq.write_table(pa.table({"messages": talks}), tmp_path / "b.parquet")
    samples, _, _ = stored(tmp_path / "b.parquet", tmp_path / "b")
    assert [sample.fields["messages"] for sample in samples] == talks

    photos = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    pictures = [picture(number) for number in range(3)]
    datasets.Dataset.from_dict({"photo": pictures, "text": TEXTS}, features=photos).to_parquet(tmp_path / "c.parquet")
    samples, said, _ = stored(tmp_path / "c.parquet", tmp_path / "c")
    assert [(bool(images_of(sample)), sample.texts) for sample in samples] == [(True, [text]) for text in TEXTS]
    assert "images in column photo" in said

    pq.write_table(pa.table({"image": images, "text": TEXTS, "description": TEXTS}), tmp_path / "d.parquet")
    with pytest.raises(DataConfigError, match=r"text, description may all be the text; choose one with --column"):
        open_source(tmp_path / "d.parquet")


def imagefolder(folder: Path, kind: str) -> Path:
    """Write an imagefolder as documented by ``datasets``: images, and one list of their names and texts."""
    (folder / "deep").mkdir(parents=True)
    rows = []
    for number, text in enumerate(TEXTS):
        name = f"{'deep/' if number else ''}{number}.png"
        (folder / name).write_bytes(encoded(number))
        rows.append({"file_name": name, "text": text})
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_imagefolder_of_datasets(tmp_path: Path, kind: str) -> None:
    folder = imagefolder(tmp_path / "pictures", kind)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "hub"))
    samples, said, report = stored(folder, tmp_path / "out")
    assert sorted(sample.texts[0] for sample in samples) == sorted(theirs["text"])
    assert all(images_of(sample) for sample in samples)
    assert f"a {kind} list of 3 rows, column file_name as path, column text as caption" in said
    assert (report.num_skipped, report.orphans.no_text) == (0, 0)
    assert [s.fields for s in stored(folder / f"metadata.{kind}", tmp_path / "again")[0]] == [s.fields for s in samples]

    split = imagefolder(tmp_path / "both/train", kind).parent
    imagefolder(split / "test", kind)
    with pytest.raises(DataConfigError, match=r"2 lists of images .*one split at a time"):
        open_source(split)


def test_a_folder_with_another_list_stays_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "metadata.csv").write_text("license,url\nCC0,x\n")
    assert "a folder of" in open_source(tmp_path).description
    assert (
        "a folder of" in open_source(imagefolder(tmp_path / "b", "csv"), SourceOptions(SourceKind.FOLDER)).description
    )


def test_a_source_without_a_text_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.png").write_bytes(encoded(number))
    out = tmp_path / "out"
    assert main(["data", "ingest", str(source), "--output", str(out), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["without_text"] == 3
    assert "warning: none of the 3 samples has a text" in said.err
    assert main(["data", "verify", str(out / "data.manifest"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["without_text"] == 3
    assert "none of the 3 samples has a text" in said.err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", b'{"file_na\n{"file_name": "0.png", "text": "a"}\n', "line 1: "),
        ("metadata.jsonl", b'\n["0.png"]\n', "line 2: the line holds a list, expected an object"),
        ("metadata.jsonl", b"", "line 1: it is empty"),
        ("metadata.csv", "file_name,text\n0.png,a\n".encode("utf-16"), "line 1: 'utf-8' codec can't decode"),
    ],
)
def test_a_list_of_a_folder_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / "0.png").write_bytes(encoded(0))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataConfigError, match=re.escape(f"{tmp_path / name}, {said}")):
        open_source(tmp_path)


def test_a_damaged_first_line_does_not_hide_the_columns(tmp_path: Path) -> None:
    path = imagefolder(tmp_path / "pictures", "jsonl") / "metadata.jsonl"
    path.write_bytes(b"{\n" + path.read_bytes())
    assert "4 rows, column file_name as path, column text as caption" in open_source(path).description


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_images_that_no_row_names_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = imagefolder(tmp_path / "pictures", kind)
    words = ["data", "ingest", str(folder), "--output", str(tmp_path / "out"), "--json", "--name"]
    assert main([*words, "whole"]) == 0
    assert "warning" not in capsys.readouterr().err
    for name in ("3.png", "deep/4.PNG"):
        (folder / name).write_bytes(encoded(0))
    assert main([*words, "left"]) == 0
    err = capsys.readouterr().err
    assert f"warning: 2 images of {folder} are left out, since no row of its list names them" in err
    assert f"the first: {folder / '3.png'}" in err


def saved(folder: Path, *, num_shards: int = 1) -> Path:
    """Save a data set of ``datasets`` to disk: 5 images with texts and classes."""
    features = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
    }
    columns = {
        "image": [{"bytes": encoded(number % 3), "path": None} for number in range(5)],
        "text": [f"text {number}" for number in range(5)],
        "label": [0, 1, 0, 1, 1],
    }
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.save_to_disk(folder, num_shards=num_shards)
    return folder


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_saved_data_set_of_datasets(tmp_path: Path, num_shards: int) -> None:
    folder = saved(tmp_path / "gespeichert, größer", num_shards=num_shards)
    theirs = datasets.load_from_disk(folder)
    samples, said, _ = stored(folder, tmp_path / "out")
    assert [sample.texts for sample in samples] == [[text] for text in theirs["text"]]
    names = theirs.features["label"].names
    assert [sample.fields["label"] for sample in samples] == [names[label] for label in theirs["label"]]
    assert [images_of(sample)[0].data for sample in samples] == [
        row["image"]["bytes"] for row in theirs.cast_column("image", datasets.Image(decode=False))
    ]
    assert f"{num_shards} Arrow files of 5 rows, images in column image, column text as caption" in said


def test_the_batches_of_an_arrow_file_are_read_in_any_process(tmp_path: Path) -> None:
    folder = saved(tmp_path / "in")
    stored(folder, tmp_path / "out")
    (file,) = folder.glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    opened = open_source(folder)
    assert [len(chunk) for chunk in opened.chunks()] == [2, 2, 1]
    ingest(opened, tmp_path / "workers", "set", workers=2)
    assert (tmp_path / "workers/set-00000.tar").read_bytes() == (tmp_path / "out/set-00000.tar").read_bytes()


def test_several_saved_splits_are_ingested_one_at_a_time(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "in")
    with pytest.raises(DataConfigError, match="holds the splits test, train: ingest one at a time"):
        open_source(tmp_path / "in")
    samples, _, _ = stored(tmp_path / "in/train", tmp_path / "out")
    assert [sample.texts for sample in samples] == [[text] for text in TEXTS]


@pytest.mark.parametrize(
    "listed", ["[", "[]", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}', '{"_data_files": 1}']
)
def test_a_damaged_list_of_files_is_one_sentence(tmp_path: Path, listed: str) -> None:
    folder = saved(tmp_path / "in")
    (folder / "state.json").write_text(listed)
    with pytest.raises(DataConfigError, match=r"state\.json: not the list of a saved data set"):
        open_source(folder)


def test_a_damaged_arrow_file_is_one_sentence(tmp_path: Path) -> None:
    folder = saved(tmp_path / "in")
    (file,) = folder.glob("*.arrow")
    content = file.read_bytes()
    for damaged in (b"", b"no Arrow", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(DataConfigError, match=r"not a readable Arrow file"):
            open_source(folder)
