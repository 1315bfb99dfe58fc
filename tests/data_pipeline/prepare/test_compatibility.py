"""Tars of webdataset are read here; tars written here are read by webdataset, Energon and datasets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipeline.errors import SampleError, ShardError
from data_pipeline.prepare import tar_layouts as layouts
from data_pipeline.prepare.choices import ExportTarget, OnError
from data_pipeline.prepare.export import export
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.sample import ImagePart
from data_pipeline.shards.index import build_index
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.sample_reader import SampleReader, read_samples


def pixels(shade: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(shade).integers(0, 255, (5, 6, 3), dtype=np.uint8)


def picture(shade: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(shade)).save(buffer, kind)
    return buffer.getvalue()


class _Exploding:
    """An object that fails the test when it is unpickled, which no code here may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (77,))


def test_what_webdataset_writes_is_indexed_read_and_verified(tmp_path: Path) -> None:
    pickle = io.BytesIO()
    torch.save({"bomb": _Exploding()}, pickle)
    keys = ["plain", "deep/er/key", "x" * 120, "d.ir/with.dots/key", "grüße/日本", "last"]
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i, key in enumerate(keys):
            writer.write(
                {
                    "__key__": key,
                    "png": picture(i),
                    "txt": f"text {i}",
                    "json": {"id": i},
                    "cls": i,
                    "seg.mask.npy": np.arange(i),
                    "left-eye.PTH": pickle.getvalue(),
                    "meta.pickle": b"\x80\x04.",
                }
            )
    tars = sorted(tmp_path.glob("w-*.tar"))
    assert [len(build_index(tar)) for tar in tars] == [4, 2]
    manifest = write_manifest(tmp_path / "all.manifest", tars).path
    theirs = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
    ours = list(read_samples(manifest))
    assert [sample.provenance.key for sample in ours] == [sample["__key__"] for sample in theirs] == keys
    for sample, other in zip(ours, theirs, strict=True):
        image, text = sample.parts
        assert isinstance(image, ImagePart)
        assert (image.data, image.size, text.text) == (other["png"], (5, 6), other["txt"].decode())  # type: ignore[union-attr]
        assert sample.fields == {**json.loads(other["json"]), "caption": other["txt"].decode()}
    assert all(shard.damages == [] for shard in verify(jobs_of(manifest)[1]))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_header_with_notes_and_folders_between(tmp_path: Path, form: int) -> None:
    long = "a" * 60 + "/" + "b" * 80
    names = {
        "./one.JPG": picture(1, "jpeg"),
        "./one.txt": b"one",
        "__notes__/x.json": b"not a sample",
        "README": b"no extension",
        "._two.jpg": b"what some archivers add",
        f"{long}.png": picture(2),
        f"{long}.txt": b"two",
    }
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("some/folder")
        folder.type = tarfile.DIRTYPE
        for name, content in names.items():
            tar.addfile(folder)
            info = tarfile.TarInfo(name)
            info.size, info.uname = len(content), "ü" if form == tarfile.PAX_FORMAT else "u"
            tar.addfile(info, io.BytesIO(content))
    build_index(path)
    samples = list(read_samples(write_manifest(tmp_path / "t.manifest", [path]).path))
    assert [(sample.provenance.key, sample.fields) for sample in samples] == [
        ("one", {"caption": "one"}),
        (long, {"caption": "two"}),
    ]
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"].removeprefix("./") for sample in theirs if "txt" in sample] == ["one", long]
    ingested = list(read_samples(ingest(path, tmp_path / "out", "set", on_error=OnError.SKIP).manifest))
    assert [(sample.parts, sample.fields) for sample in ingested] == [(s.parts, s.fields) for s in samples]


@pytest.mark.fault
def test_compressed_tars_and_members_are_refused_by_the_index_and_ingested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed.tar.gz"
    with webdataset.TarWriter(str(packed)) as writer:
        writer.write({"__key__": "a", "png": picture(0), "txt": "a"})
    assert packed.read_bytes()[:2] == b"\x1f\x8b"
    with pytest.raises(ShardError, match=r"compressed with gzip.*mmscale data ingest"):
        build_index(packed)
    inside = tmp_path / "inside.tar"
    with webdataset.TarWriter(str(inside)) as writer:
        writer.write({"__key__": "a", "png": picture(0), "json.gz": {"caption": "a"}})
    with pytest.raises(ShardError, match=r"'a\.json\.gz' at byte \d+ is compressed.*mmscale data ingest"):
        build_index(inside)
    for tar in (packed, inside):
        (sample,) = read_samples(ingest(tar, tmp_path / tar.name.partition(".")[0], "set").manifest)
        assert (sample.parts[0].data, sample.fields["caption"]) == (picture(0), "a")  # type: ignore[union-attr]
    with webdataset.TarWriter(str(tmp_path / "bomb.tar")) as writer:
        writer.write({"__key__": "a", "txt.gz": "0" * 2000})
    monkeypatch.setattr(layouts, "_MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(SampleError, match="decompresses to more than"):
        ingest(tmp_path / "bomb.tar", tmp_path / "bomb", "set")


def pairs(root: Path, count: int = 11) -> Path:
    source = root / "in"
    source.mkdir()
    for i in range(count):
        (source / f"{i:03d}.png").write_bytes(picture(i))
        (source / f"{i:03d}.json").write_text(json.dumps({"caption": f"caption {i}", "n": i}))
    return ingest(source, root / "shards", "set", max_samples=4).manifest


def test_webdataset_decodes_our_shards(tmp_path: Path) -> None:
    manifest = pairs(tmp_path)
    tars = [str(path) for path in sorted(manifest.parent.glob("*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "json"))
    assert [(key, fields) for key, _, fields in read] == [
        (f"{i:03d}", {"caption": f"caption {i}", "n": i}) for i in range(11)
    ]
    assert all(np.array_equal(image, pixels(i)) for i, (_, image, _) in enumerate(read))


_DATASETS = """
import hashlib, json, sys, datasets
*tars, cache = sys.argv[1:]
found = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=cache)
print(json.dumps([[s["__key__"], hashlib.sha256(s["png"].tobytes()).hexdigest(), s["json"]] for s in found]))
"""


@pytest.mark.long
def test_datasets_loads_our_shards(tmp_path: Path) -> None:
    manifest = pairs(tmp_path)
    tars = [str(path) for path in sorted(manifest.parent.glob("*.tar"))]
    assert run(_DATASETS, *tars, str(tmp_path / "cache")) == [
        [f"{i:03d}", hashlib.sha256(pixels(i).tobytes()).hexdigest(), {"caption": f"caption {i}", "n": i}]
        for i in range(11)
    ]


_ENERGON = """
import json, sys
import torch
from megatron.energon import Cooker, DefaultTaskEncoder, TextSample, WorkerConfig, basic_sample_keys
from megatron.energon import get_savable_loader, get_val_dataset, stateless

@stateless
def cook(sample):
    return TextSample(**basic_sample_keys(sample), text=" ".join(sorted(map(str, sample))))

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]

found = []
for folder in sys.argv[1:]:
    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    data = get_val_dataset(folder, worker_config=worker, batch_size=None, split_part="train", task_encoder=Encoder())
    for sample in get_savable_loader(data):
        image = getattr(sample, "image", None)
        shown = None if image is None else (image * 255).round().to(torch.uint8).permute(1, 2, 0).tolist()
        text = getattr(sample, "caption", None) or sample.text
        found.append([sample.__key__.rpartition("/")[2], shown, text])
print(json.dumps(found))
"""


@pytest.mark.long
def test_energon_opens_what_export_writes(tmp_path: Path) -> None:
    """Load pairs, texts and documents with Energon's own loader."""
    report = export(pairs(tmp_path), tmp_path / "energon", reader=ExportTarget.ENERGON, workers=2)
    assert (report.sample_type, report.num_samples) == ("CaptioningSample", 11)
    for name, files in {
        "texts": {"a.txt": b"one", "b.json": b'{"captions": ["two", "too"]}', "c.json": b'{"caption": "three"}'},
        "mixed": {"a.png": picture(0), "b.0.png": picture(0), "b.1.png": picture(1), "c.txt": b"x"},
    }.items():
        (tmp_path / f"{name}-in").mkdir()
        for file, content in files.items():
            (tmp_path / f"{name}-in" / file).write_bytes(content)
        manifest = ingest(tmp_path / f"{name}-in", tmp_path / f"{name}-shards", "set").manifest
        kind = export(manifest, tmp_path / name, reader=ExportTarget.ENERGON).sample_type
        assert kind == {"texts": "TextSample", "mixed": "CrudeWebdataset"}[name]
    keys = ["a" * 150, "b", "d/" * 60 + "c"]  # Long names have an extra header before their member.
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for i, key in enumerate(keys):
            writer.write({"__key__": key, "png": picture(i), "txt": f"t{i}"})
    build_index(tmp_path / "theirs.tar")
    theirs = write_manifest(tmp_path / "theirs.manifest", [tmp_path / "theirs.tar"]).path
    export(theirs, tmp_path / "theirs", reader=ExportTarget.ENERGON)

    again = read_samples(
        ingest(tmp_path / "energon", tmp_path / "again", "set").manifest
    )  # Ingested as an Energon folder.
    assert [(s.parts[0].data, s.fields) for s in again] == [  # type: ignore[union-attr]
        (picture(i), {"caption": f"caption {i}"}) for i in range(11)
    ]
    found = run(_ENERGON, *(str(tmp_path / name) for name in ("energon", "texts", "mixed", "theirs")))
    assert found[:11] == [[f"{i:03d}", pixels(i).tolist(), f"caption {i}"] for i in range(11)]
    assert found[11:14] == [["a", None, "one"], ["b", None, "two"], ["c", None, "three"]]
    assert [(key, [ext for ext in text.split() if ext[0] != "_"]) for key, _, text in found[14:17]] == [
        ("a", ["png"]),
        ("b", ["0.png", "1.png"]),
        ("c", ["txt"]),
    ]
    assert found[17:] == [[key.rpartition("/")[2], pixels(i).tolist(), f"t{i}"] for i, key in enumerate(keys)]


def run(program: str, *words: str) -> Any:
    """Run a program without network and return the JSON in the last line of its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_reading_by_number_ignores_unknown_members(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "a", "npy": np.zeros(3), "pth": b"\x80"})
    build_index(tmp_path / "x.tar")
    reader = SampleReader(write_manifest(tmp_path / "x.manifest", [tmp_path / "x.tar"]), "x")
    with pytest.raises(SampleError, match="neither image nor video nor sound nor text among its members: npy, pth"):
        reader.read(0)
