"""The commands of ``mmscale data`` as a user calls them: output, exit code, no partial files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from data_pipeline.shards.manifest import Manifest, write_manifest
from mmscale.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SHARDS = ROOT / "examples" / "emoji" / "shards"


def figures(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", *words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def complaint(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    capsys.readouterr()
    assert main(["data", *words]) == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.csv"
    path.write_text("path,caption\n" + "".join(f",text number {i}\n" for i in range(9)))
    return path


def test_ingest_index_verify_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ("ingest", str(pairs(tmp_path)), "--output", str(out), "--name", "p", "--shard-samples", "4")
    assert figures(capsys, *words)["shards"] == 3
    manifest = out / "p.manifest"
    before = manifest.read_bytes()
    manifest.unlink()
    for sidecar in out.glob("*.index"):
        sidecar.unlink()
    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    assert figures(capsys, "index", *shards, "--manifest", str(manifest))["samples"] == 9
    assert manifest.read_bytes() == before
    assert figures(capsys, "index", "--manifest", str(manifest))["samples"] == 9
    assert figures(capsys, "verify", str(manifest))["damages"] == []
    found = figures(capsys, "stats", str(manifest))
    assert (found["samples"], found["text_bytes"]["max"]) == (9, len("text number 8"))


def test_reshard_cuts_filters_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, gone = SHARDS / "heldout-both.manifest", tmp_path / "gone.jsonl"
    whole = figures(capsys, "stats", str(manifest))["samples"]
    key = Manifest.open(manifest).open_index(0).row(2).key
    gone.write_text(json.dumps({"dataset": "held", "index": 2, "key": key}) + "\n")
    words = ["reshard", f"held={manifest}", "--output", str(tmp_path / "out"), "--exclude", str(gone), "--shards", "3"]
    found = figures(capsys, *words, "--shuffle", "1", "--jobs", "2")
    assert (found["samples"], found["shards"], found["skipped"]) == (whole - 1, 3, 0)
    assert "exists already" in complaint(capsys, *words, code=2)
    assert "--shards sets" in complaint(capsys, *words, "--shard-size", "1M", code=2)
    assert main(["data", "reshard", str(manifest), "--output", str(tmp_path), "--shard-size", "many"]) == 2


def test_export_writes_for_energon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(SHARDS / "heldout-both.manifest"), "--output", str(tmp_path / "out"), "--for", "energon"]
    found = figures(capsys, *words, "--split", "val", "--jobs", "2")
    assert (found["shards"], found["resumed_shards"]) == (1, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".nv-meta",
        "heldout-both-00000.tar",
        "heldout-both-00000.tar.idx",
    ]
    assert "exists already" in complaint(capsys, *words, code=2)


@pytest.mark.fault
def test_verify_names_damage_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "ingest", str(pairs(tmp_path)), "--output", str(out)]) == 0
    shard = out / "data-00000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    (damage, *_) = figures(capsys, "verify", str(shard), code=1)["damages"]
    assert damage["problem"] in ("header", "truncated", "index", "checksum")
    assert main(["data", "verify", str(shard)]) == 1
    assert f"{shard} key=" in capsys.readouterr().out


@pytest.mark.fault
def test_verify_reads_several_shards_at_once_and_reports_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["data", "ingest", str(pairs(tmp_path)), "--output", str(out), "--shard-samples", "3"]
    assert main(words) == 0
    manifest, shards = out / "data.manifest", sorted(out.glob("*.tar"))
    assert len(shards) == 3
    flipped = bytearray(shards[1].read_bytes())
    flipped[512] ^= 1  # The first byte of the first member.
    shards[1].write_bytes(flipped)
    alone = figures(capsys, "verify", str(manifest), str(shards[0]), code=1)
    together = figures(capsys, "verify", str(manifest), str(shards[0]), "--jobs", "2", code=1)
    assert together == alone
    assert (alone["shards"], alone["kinds"]["checksum"]) == (4, 1)
    assert {(damage["shard"], damage["offset"]) for damage in alone["damages"]} == {(str(shards[1]), 512)}


@pytest.mark.fault
def test_wrong_use_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in complaint(capsys, "ingest", str(tmp_path / "gone"), "--output", str(tmp_path), code=2)
    assert "--manifest" in complaint(capsys, "index", code=2)
    assert "no such file" in complaint(capsys, "stats", str(tmp_path / "gone.manifest"), code=1)
    assert "cannot be read" in complaint(capsys, "index", str(tmp_path / "gone.tar"), code=1)
    (tmp_path / "row.csv").write_text("path,caption\ngone.png,x\n")
    out = tmp_path / "out"
    assert "row 1" in complaint(capsys, "ingest", str(tmp_path / "row.csv"), "--output", str(out), code=1)
    words = ["tokenizer", str(SHARDS / "train-text.manifest"), "--output", str(tmp_path / "t.model"), "--vocab-size"]
    assert "cannot be trained" in complaint(capsys, *words, "300", code=2)
    assert not (tmp_path / "t.model").exists()
    assert main(["data", *words, "3"]) == 2


def test_a_tokenizer_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer", str(SHARDS / "train-text.manifest"), "--output", str(tmp_path / "t.model")]
    assert figures(capsys, *words, "--vocab-size", "1200", "--character-coverage", "0.99")["vocab_size"] == 1200
    counted = figures(capsys, "stats", str(SHARDS / "train-text.manifest"), "--tokenizer", str(tmp_path / "t.model"))
    assert counted["text_tokens"]["count"] == counted["samples"] == 218


def test_the_command_reproduces_the_bundled_tokenizer(tmp_path: Path) -> None:
    """The pieces are equal when trained with the options of examples/emoji/build.py."""
    manifests = [str(SHARDS / f"{name}.manifest") for name in ("train", "train-text")]
    words = ["--vocab-size", "2048", "--model-type", "unigram", "--character-coverage", "0.99"]
    assert main(["data", "tokenizer", *manifests, "--output", str(tmp_path / "t.model"), *words]) == 0
    files = (tmp_path / "t.model", SHARDS.parent / "tokenizer.model")
    ours, bundled = (SentencePieceProcessor(model_file=str(path)) for path in files)
    assert [ours.id_to_piece(i) for i in range(2048)] == [bundled.id_to_piece(i) for i in range(2048)]


@pytest.mark.parametrize("steps", ["5", "4:2", "a:b", "-1:3", ""])
def test_steps_must_be_a_forward_range(capsys: pytest.CaptureFixture[str], steps: str) -> None:
    assert "A:B" in complaint(capsys, "digest", str(ROOT / "configs" / "quickstart.yaml"), f"--steps={steps}", code=2)


def test_stats_of_a_config_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    page = tmp_path / "page.html"
    found = figures(capsys, "stats", config, "data.packing.max_tokens=48", "--html", str(page))["datasets"]["emoji"]
    assert found["documents"]["tokens"]["count"] == found["samples"] == 1024
    assert page.read_text().count("data:image/jpeg") == 24
    assert main(["data", "stats", str(SHARDS / "train-quick.manifest"), "--sample", "100"]) == 0
    table = capsys.readouterr().out
    assert "width, pixels" in table
    assert "looked at 100 of them" in table
    manifest = str(SHARDS / "train-quick.manifest")
    assert "no values to override" in complaint(capsys, "stats", manifest, "seed=1", code=2)
    assert "names its tokenizer" in complaint(capsys, "stats", config, "--tokenizer", "x.model", code=2)


def test_dedup_lists_what_a_run_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = str(SHARDS / "train-quick.manifest"), str(SHARDS / "heldout-style.manifest")
    out = tmp_path / "list.jsonl"
    found = figures(capsys, "dedup", f"emoji={train}", "--against", held_out, "--out", str(out), "--keep", "largest")
    assert found["against"] > 0
    assert found["left_out"] == len(out.read_text().splitlines()) > 0
    excluded = [f"data.faults.exclude=[{out}]", "--steps", "0:1"]
    assert main(["data", "digest", str(ROOT / "configs" / "quickstart.yaml"), *excluded]) == 0
    assert "--by hash" in complaint(capsys, "dedup", train, "--by", "hash", "--out", str(out), code=2)


def test_crops_of_an_image_size(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    tiles = "data.datasets.0.transforms={kind: tiles, tiling: {kind: internvl, max_tiles: 6}}"
    found = figures(capsys, "crops", config, tiles, "model.connector.kind=embedding", "--size", "2000x1000")
    assert [crop["crop"] for crop in found["crops"]] == ["tile 1,1", "tile 1,2", "whole"]
    assert (found["tokens"], found["patches"]) == (48, 48)
    split = "data.datasets.0.transforms={kind: scaled, longer: 48, shorter: 12, split: {kind: most_pixels, cell: 24}}"
    positions = "model.vision.positions={kind: bucketed, grid: [12, 12]}"
    found = figures(capsys, "crops", config, split, positions, "--size", "150x30")
    assert [(crop["at"], crop["of"], crop["pixels"]) for crop in found["crops"]] == [
        ("0,0", "120x24", "48x24"),
        ("48,0", "120x24", "48x24"),
        ("96,0", "120x24", "48x48"),
    ]
    assert main(["data", "crops", config, "--size", "90x90", "--dataset", "emoji"]) == 0
    assert "attended" in capsys.readouterr().out
    video = ["model.connector.kind=embedding", "data.video={frames: {kind: rate, per_second: 2}}"]
    found = figures(capsys, "crops", config, *video, "--size", "640x480", "--frames", "90", "--fps", "30")
    assert (found["crops"][0]["frames"], found["tokens"], found["seconds"][-1]) == ("6", 96, 2.967)
    heard = ["data.audio={from_video: true}", "model.audio={tower: {kind: frames, num_bins: 16, stack: 8}}"]
    assert figures(capsys, "crops", config, *video, *heard, "--size", "640x480", "--frames", "90") == found
    assert "has no block video" in complaint(capsys, "crops", config, "--size", "9x9", "--frames", "4", code=2)
    assert "--frames" in complaint(capsys, "crops", config, "--size", "9x9", "--fps", "4", code=2)
    assert "WIDTHxHEIGHT" in complaint(capsys, "crops", config, "--size", "12", code=2)
    assert "has emoji" in complaint(capsys, "crops", config, "--size", "9x9", "--dataset", "x", code=2)
    text = ("model.vision=null", "model.connector=null", "stages.0.train=[decoder]")
    assert "no image tower" in complaint(capsys, "crops", config, *text, "--size", "9x9", code=2)


def test_index_keeps_the_image_tokenizer_of_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    figures(capsys, "ingest", str(pairs(tmp_path)), "--output", str(out), "--name", "p")
    manifest = out / "p.manifest"
    write_manifest(manifest, [out / "p-00000.tar"], image_tokenizer="ab" * 32)
    figures(capsys, "index", "--manifest", str(manifest))
    assert Manifest.open(manifest).image_tokenizer == "ab" * 32
    manifest.write_bytes(b"damaged")
    figures(capsys, "index", str(out / "p-00000.tar"), "--manifest", str(manifest))
    assert Manifest.open(manifest).image_tokenizer is None
