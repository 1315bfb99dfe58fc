"""``mmscale init``: the file that it writes is valid, trains, and means what the data and the model's processor say."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.audio.transform import AudioConfig
from data_pipeline.images.video import VideoConfig
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.cli.main import main
from mmscale.config import load
from mmscale.init.write import _clips
from mmscale.run.config import RunConfig
from tests.init.conftest import NAMES, picture, pictures
from tests.sounds import encoded as encoded_sound
from tests.videos import encoded, stored_frames

SMALL = """
decoder:
  {vocab_size: 4096, hidden_dim: 32, num_layers: 2, attention: {num_heads: 2}, mlp: {kind: dense, hidden_dim: 64}}
vision:
  {patch_size: 8, hidden_dim: 32, num_layers: 1, attention: {num_heads: 2}, mlp: {hidden_dim: 64},
   positions: {kind: rotary_2d}}
connector: {kind: embedding, projector: {kind: mlp, merge: 2}}
"""
PROMPT = "Was ist das?"


def small(home: Path) -> str:
    (home / "klein.yaml").write_text(SMALL)
    return "klein.yaml"


def captions(folder: Path) -> Path:
    for number, name in enumerate(pictures(folder)):
        (folder / name).with_suffix(".txt").write_text(f"ein Bild in {NAMES[number % 4]}, Nummer {number}")
    return folder


def classes(folder: Path) -> Path:
    for number in range(24):
        target = folder / NAMES[number % 4] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(target)
    return folder


def questions(folder: Path) -> Path:
    with (folder / "fragen.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer"])
        for number, name in enumerate(pictures(folder / "bilder")):
            writer.writerow([f"bilder/{name}", f"Welche Farbe hat Bild {number}?", NAMES[number % 4]])
    return folder / "fragen.csv"


def llava(folder: Path) -> Path:
    rows = [
        {
            "id": str(number),
            "image": f"bilder/{name}",
            "conversations": [
                {"from": "human", "value": f"<image>\nWelche Farbe? ({number})"},
                {"from": "gpt", "value": NAMES[number % 4]},
            ],
        }
        for number, name in enumerate(pictures(folder / "bilder"))
    ]
    (folder / "llava.json").write_text(json.dumps(rows, ensure_ascii=False))
    return folder / "llava.json"


def lines(folder: Path) -> Path:
    rows = [{"path": f"bilder/{name}", "caption": NAMES[n % 4]} for n, name in enumerate(pictures(folder / "bilder"))]
    (folder / "zeilen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "zeilen.jsonl"


def imagefolder(folder: Path) -> Path:
    rows = [{"file_name": name, "text": NAMES[n % 4]} for n, name in enumerate(pictures(folder / "satz"))]
    (folder / "satz/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "satz"


def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [picture(number) for number in range(24)], "text": [NAMES[n % 4] for n in range(24)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "gespeichert")
    return folder / "gespeichert"


def parquet(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [picture(number) for number in range(24)], "label": [n % 4 for n in range(24)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def videos(folder: Path) -> Path:
    """Every fourth sample is a picture, the others are clips; every eighth is a folder of frames."""
    (folder / "clips").mkdir()
    for number in range(24):
        words = {"caption": f"{NAMES[number % 4]} bewegt sich, Nummer {number}"}
        if number % 8 == 0:
            (folder / f"clips/{number}").mkdir()
            for name, data in stored_frames(3, seed=number).items():
                (folder / f"clips/{number}/{name}").write_bytes(data)
            words["fps"] = 4
        elif number % 4 == 0:
            picture(number).save(folder / f"clips/{number}.png")
        else:
            (folder / f"clips/{number}.mp4").write_bytes(encoded(3, seed=number))
        (folder / f"clips/{number}.json").write_text(json.dumps(words))
    return folder / "clips"


def manifest(folder: Path) -> Path:
    assert main(["data", "ingest", str(lines(folder)), "--output", str(folder / "shards"), "--name", "zeilen"]) == 0
    return folder / "shards/zeilen.manifest"


SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "captions": (lambda folder: captions(folder / "bilder"), "caption"),
    "classes": (lambda folder: classes(folder / "klassen"), "caption"),
    "questions": (questions, "dialogue"),
    "llava": (llava, "dialogue"),
    "lines": (lines, "caption"),
    "imagefolder": (imagefolder, "caption"),
    "saved": (saved, "caption"),
    "parquet": (parquet, "caption"),
    "manifest": (manifest, "caption"),
    "videos": (videos, "caption"),
}


def run_of(file: str) -> RunConfig:
    return load(file, [], RunConfig).value


def init(model: object, data: object, *more: str, output: str = "lauf eins.yaml") -> int:
    return main(["init", str(model), str(data), "--output", output, *more])


@pytest.mark.parametrize("source", SOURCES)
def test_any_source_becomes_a_valid_run(home: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, kind = SOURCES[source]
    assert init(small(home), make(home)) == 0
    assert main(["config", "validate", "lauf eins.yaml"]) == 0, capsys.readouterr().err
    run = run_of("lauf eins.yaml")
    (dataset,) = run.data.datasets
    assert dataset.template.kind == kind
    assert (dataset.video is not None) == (source == "videos")
    held = [json.loads(line) for line in run.data.faults.exclude[0].read_text().splitlines()]
    assert len(held) == 4  # A fifth of 24 samples.
    everything = list(read_samples(dataset.indexed))
    heldout = next(each for each in run.evaluation.sets if each.name == "heldout").manifest
    kept = {sample.provenance.key.rpartition("/")[2]: sample for sample in read_samples(heldout)}
    assert len(everything) == 24
    assert {line["key"].rpartition("/")[2] for line in held} == kept.keys()
    for line in held:
        assert kept[line["key"].rpartition("/")[2]].parts == everything[line["index"]].parts
    # The file names the same values that `init` explains, and every value has a reason.
    text = Path("lauf eins.yaml").read_text()
    assert f"steps: {run.stages[0].steps}" in text
    assert text.count("#") > 30


def test_sounds_need_a_model_that_hears(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = home / "töne", small(home)
    data.mkdir()
    for number in range(8):
        (data / f"{number}.wav").write_bytes(encoded_sound(2000 + number, seed=number))
        (data / f"{number}.txt").write_text(f"{NAMES[number % 4]} klingt, Nummer {number}")
    assert init(model, data) == 2
    assert "the model has no audio tower" in capsys.readouterr().err
    with Path(model).open("a") as file:
        file.write("audio: {tower: {kind: frames, num_bins: 16, stack: 4}}\n")
    assert init(model, data) == 0
    (dataset,) = run_of("lauf eins.yaml").data.datasets
    assert (dataset.audio is None, dataset.video is None) == (False, True)
    assert run_of("lauf eins.yaml").stages[0].train == ("decoder", "audio_connector")
    assert main(["data", "digest", "lauf eins.yaml", "--steps", "0:1"]) == 0


@pytest.mark.parametrize("from_video", [False, True])
def test_videos_keep_the_sound_that_the_trained_run_reads(from_video: bool) -> None:
    trained = SimpleNamespace(video=VideoConfig(), audio=AudioConfig(from_video=from_video, max_seconds=9))
    data: Any = SimpleNamespace(examples=SimpleNamespace(clips=frozenset({"video"})))
    start: Any = SimpleNamespace(trained=trained)
    blocks = _clips(data, start, start)
    assert blocks.keys() == {"video", *(["audio"] if from_video else [])}
    assert not from_video or AudioConfig(**blocks["audio"]) == trained.audio


@pytest.mark.parity
@pytest.mark.parametrize("source", ["captions", "questions", "llava"])
def test_a_chat_model_reads_what_its_processor_gives(home: Path, source: str, published: Path, imported: Path) -> None:
    """The token ids and labels equal those of the processor's chat template with the same question and answer."""
    transformers = pytest.importorskip("transformers")
    assert init(imported, SOURCES[source][0](home), "--prompt", PROMPT) == 0
    run = run_of("lauf eins.yaml")
    processor = transformers.AutoProcessor.from_pretrained(published)
    builder = DocumentBuilder(run.data.datasets[0], load_tokenizer(run.data.tokenizer), run.media_spec)
    for sample in list(read_samples(run.data.datasets[0].indexed))[:4]:
        turns = sample.fields.get("messages") or [
            {"role": role, "content": turn["value"]}
            for role, turn in zip(("user", "assistant"), sample.fields["conversations"], strict=True)
        ]
        question, answer = turns[0]["content"].removeprefix("<image>"), turns[1]["content"]
        if source == "captions":
            assert (question, answer) == (PROMPT, sample.fields["caption"])
        content = [{"type": "image"}, {"type": "text", "text": question}]
        talk = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
        whole = processor.apply_chat_template([*talk, {"role": "assistant", "content": answer}])
        shown = [picture_of(sample)]
        theirs = processor(text=[whole], images=shown)["input_ids"][0]
        read = len(processor(text=[prompt], images=shown)["input_ids"][0])
        document = builder.dry_run(sample)
        assert document.token_ids.tolist() == theirs
        learned = [n + 1 for n, weight in enumerate(document.loss_weights.tolist()) if weight]
        assert learned == list(range(read, len(theirs)))


def picture_of(sample: Any) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(sample.parts[0].data)).convert("RGB")


def test_a_fine_tune_trains_adapters_alone(home: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of images and the folder of a published model: two commands to a trained adapter."""
    assert init(published, captions(home / "bilder"), "--steps", "2") == 0
    printed = capsys.readouterr().out
    assert "mmscale train 'lauf eins.yaml'" in printed
    assert (home / "tiny vl-imported/config.yaml").is_file()
    assert main(["train", "lauf eins.yaml"]) == 0
    run = run_of("lauf eins.yaml")
    assert run.stages[0].train == ("adapters",)
    records = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    # A random model predicts nothing: its loss is near that of equal probabilities.
    assert records[0]["loss"] == pytest.approx(math.log(run.model.decoder.vocab_size), abs=0.5)
    assert all("heldout/heldout/loss" in record for record in records)
    result = json.loads((run.run_dir / "result.json").read_text())
    assert result["heldout"]["heldout"]["n"] == 4
    assert init(published, home / "bilder", "--force") == 2
    assert "lauf eins: holds a run already; name a new folder with --run-dir" in capsys.readouterr().err
    # A second run from the same import, of all weights but the tower's.
    assert init(published, home / "bilder", "--full", "--run-dir", "zwei", output="zwei.yaml") == 0
    assert run_of("zwei.yaml").stages[0].train == ("connector", "decoder")
    assert run_of("zwei.yaml").model.adapters is None


@pytest.mark.slow
def test_a_trained_run_is_tuned_without_its_other_keys(home: Path) -> None:
    """A run that was trained here has data sets, stages and limits of its own, which the new run must not inherit."""
    more = ("--steps", "1", "--run-dir", "runs/erster")
    assert init(small(home), classes(home / "klassen"), *more, output="erster.yaml") == 0
    assert main(["train", "erster.yaml", "max_steps=1", "evaluation={sets: [], captions: null}"]) == 0
    assert init("runs/erster", home / "klassen", "--steps", "1", "--adapters", "dora") == 0
    run, before = run_of("lauf eins.yaml"), run_of("erster.yaml")
    assert run.max_steps is None
    assert run.model.adapters is not None
    assert run.model.adapters.kind == "dora"
    assert run.model.decoder == before.model.decoder
    assert run.data.tokenizer == before.data.tokenizer
    assert run.data.datasets[0].transforms == before.data.datasets[0].transforms
    assert main(["train", "lauf eins.yaml", "evaluation={sets: [], captions: null}"]) == 0


def test_nothing_is_overwritten(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = small(home), classes(home / "klassen")
    assert init(model, data) == 0
    before = run_of("lauf eins.yaml")
    assert init(model, data) == 2
    assert "lauf eins.yaml: exists already; --force replaces it" in capsys.readouterr().err
    Path("lauf eins.yaml").unlink()
    assert init(model, data) == 2
    assert "lauf eins-data: exists already; --force makes it anew" in capsys.readouterr().err
    assert init(model, data, "--force") == 0
    assert run_of("lauf eins.yaml") == before
    foreign = home / "fremd-data"
    foreign.mkdir()
    (foreign / "wichtig.txt").write_text("x")
    assert init(model, data, "--force", output="fremd.yaml") == 2
    assert "it is not from `mmscale init`" in capsys.readouterr().err
    assert (foreign / "wichtig.txt").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gibtesnicht", "klassen"), "no such model; give a folder"),
        (("leer", "klassen"), "neither a run folder (config.yaml) nor a Hugging Face folder"),
        (("clip-vit-h-14", "klassen"), "a vision tower without a decoder"),
        (("llama3.2-1b", "klassen"), "the samples have images, and the model has no vision tower"),
        (("klein.yaml", "gibtesnicht"), "gibtesnicht: no such file or folder"),
        (("klein.yaml", "stumm"), "no sample has a text"),
        (("klein.yaml", "klassen", "--heldout", "24"), "24 samples, of which 24 would be held out"),
        (("klein.yaml", "klassen", "--adapters", "lora"), "starts from random values, which adapters cannot train"),
        (("klein.yaml", "klassen", "--adapters", "lora", "--full"), "--full trains the weights themselves"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    home: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small(home)
    classes(home / "klassen")
    pictures(home / "stumm", 3)
    (home / "leer").mkdir()
    before = sorted(home.iterdir())
    assert main(["init", *words, "--output", "x.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(home.iterdir()) == before


def test_a_model_of_a_hub_is_imported_first(home: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tests/hf`` downloads from a real server; here the download is replaced by its result."""
    asked: list[str] = []

    def download(source: str, revision: str | None, say: Callable[[str], None]) -> Path:
        asked.append(source)
        return published

    monkeypatch.setattr("mmscale.hf.hub.local_folder", download)
    assert init("hf://org/tiny-vl", captions(home / "bilder")) == 0
    assert run_of("lauf eins.yaml").stages[0].weights[0].checkpoint == Path("tiny-vl-imported")
    assert init("hf://org/tiny-vl", home / "bilder", "--force") == 0  # The import is used again.
    assert asked == ["hf://org/tiny-vl"]


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "molmo-7b-d",
        pytest.param("llama3.2-11b-vision", marks=pytest.mark.slow),
        pytest.param("qwen2-vl-2b", marks=pytest.mark.slow),
        pytest.param("fuyu-8b", marks=pytest.mark.slow),
        pytest.param("nvlm-h-72b", marks=pytest.mark.slow),
        pytest.param("mm1.5-1b", marks=pytest.mark.slow),
        pytest.param("internvl3-1b", marks=pytest.mark.slow),
        pytest.param("llava-1.5-7b", marks=pytest.mark.slow),
        pytest.param("smolvlm-256m", marks=pytest.mark.slow),
        pytest.param("aria", marks=pytest.mark.slow),
    ],
)
def test_published_models_get_transforms_that_fit(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmscale.init import machine

    monkeypatch.setattr(machine, "find_machine", lambda: machine.Machine("cpu", "8 ranks", 8, 10**13, 64))
    assert init(name, captions(home / "bilder")) == 0
    run = run_of("lauf eins.yaml")
    assert run.data.lanes % 8 == 0
    assert run.model.decoder.vocab_size >= load_tokenizer(run.data.tokenizer).vocab_size
