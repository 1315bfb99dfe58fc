"""Fertility agrees with counts by hand with the tokenizers' own libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.prepare.stats.fertility import TextTokenizer, fertility, texts_of_file, texts_of_manifests
from data_pipeline.prepare.tokenizer_training import train_sentencepiece
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.cli.main import main

EMOJI = Path(__file__).resolve().parents[4] / "examples" / "emoji"
BUNDLED = EMOJI / "tokenizer.model"


def byte_level(folder: Path) -> Path:
    """Train a byte-level BPE tokenizer, as GPT-2's, on words that merge the two bytes of "é" into one piece."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(["été été été"] * 9, trainer)
    model.save(str(folder / "bytes.json"))
    return folder / "bytes.json"


def test_counts_are_those_of_the_libraries() -> None:
    texts = [("en", "red apple"), ("zh", "蓝莓"), ("en", "green apple"), ("zh", "A")]
    rows = fertility(texts, [TextTokenizer.open(BUNDLED)])
    model = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED))
    assert list(rows) == ["en", "zh", "all"]
    for language in ("en", "zh"):
        ids = [i for name, text in texts if name == language for i in model.encode(text)]
        held = rows[language]["tokenizers"]["tokenizer"]
        assert held["tokens"] == len(ids)
        spelled = [i for i in ids if model.id_to_piece(i).startswith("<0x")]
        assert held["byte_share"] == round(len(spelled) / len(ids), 4)
    english = rows["en"]
    assert (english["texts"], english["words"], english["characters"]) == (2, 4, 20)
    assert english["tokenizers"]["tokenizer"]["per_word"] == english["tokenizers"]["tokenizer"]["tokens"] / 4
    assert rows["zh"]["words"] is None
    assert rows["zh"]["bytes"] == 7
    assert rows["zh"]["tokenizers"]["tokenizer"]["byte_share"] > 0.5
    assert rows["all"]["texts"] == 4


def test_byte_level_pieces_that_split_a_character_are_counted(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.open(byte_level(tmp_path))
    held = fertility([("fr", "été")], [tokenizer])["fr"]["tokenizers"]["bytes"]
    assert held["byte_share"] == 0.0
    held = fertility([("fr", "à")], [tokenizer])["fr"]["tokenizers"]["bytes"]
    assert (held["tokens"], held["byte_share"], held["unknown_share"]) == (2, 1.0, 0.0)


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(models.WordLevel({"red": 0, "apple": 1, "<unk>": 2}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    held = fertility([("en", "red pear")], [TextTokenizer.open(tmp_path / "words.json")])["en"]["tokenizers"]["words"]
    assert (held["tokens"], held["unknown_share"]) == (2, 0.5)


def samples(folder: Path, fields: list[dict[str, object]]) -> Path:
    with ShardWriter(folder, "x") as writer:
        for number, held in enumerate(fields):
            writer.write(f"{number}", {"json": json.dumps(held).encode()})
    return write_manifest(folder / "x.manifest", writer.shards).path


def test_texts_come_from_a_field_with_its_language(tmp_path: Path) -> None:
    manifest = samples(
        tmp_path,
        [
            {"caption": "Apfel", "lang": "de", "names": {"fr": "pomme", "it": ["mela", "pomo"]}},
            {"captions": ["東京の空", "空"], "names": {}},
            {"caption": "rest", "meta": {"title": "Birne"}},
        ],
    )
    assert list(texts_of_manifests([manifest], "names")) == [("fr", "pomme"), ("it", "mela"), ("it", "pomo")]
    found = list(texts_of_manifests([manifest], language_field="lang"))
    assert found[:2] == [("de", "Apfel"), ("ja", "東京の空")]
    assert [text for _, text in texts_of_manifests([manifest], "meta.title", "lang")] == ["Birne"]


def test_a_field_of_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"x-00000\.tar/0: field 'names' holds 3, expected texts"):
        list(texts_of_manifests([samples(tmp_path, [{"caption": "x", "names": 3}])], "names"))


def test_files_of_texts(tmp_path: Path) -> None:
    lines = tmp_path / "x.txt"
    lines.write_text("東京の空\n\nкот\n")
    assert [text for _, text in texts_of_file(lines)] == ["東京の空", "кот"]
    rows = tmp_path / "x.jsonl"
    rows.write_text('{"text": "Apfel", "lang": "de"}\n{"text": 3}\n')
    found = texts_of_file(rows)
    assert next(found) == ("de", "Apfel")
    with pytest.raises(DataConfigError, match=r"x\.jsonl:2: expected"):
        next(found)


def test_the_verb_compares_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(EMOJI / "shards" / "heldout-style-quick.manifest")
    words = ["data", "fertility", str(BUNDLED), str(byte_level(tmp_path)), manifest, "--field", "names"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["languages"]
    assert set(rows) == {"de", "es", "fr", "it", "ja", "pt", "ru", "zh", "all"}
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[1:] == ["tokenizer" + " " * 26, "bytes"]
    assert len(lines) == 2 + len(rows)
    assert main(["data", "fertility", str(BUNDLED)]) == 2
    assert main(["data", "fertility", str(BUNDLED), manifest, "--field", "nothing"]) == 2


def test_the_documented_table_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = EMOJI.parents[1]
    monkeypatch.chdir(root)
    lines = (root / "docs" / "data.md").read_text().splitlines()
    command = next(i for i, line in enumerate(lines) if line.startswith("$ mmscale data fertility"))
    table = lines[command + 1 : lines.index("```", command)]
    capsys.readouterr()
    assert main(lines[command].split()[2:]) == 0
    assert capsys.readouterr().out.splitlines() == table


@pytest.mark.fault
def test_half_a_pair_of_utf16_is_named_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path, "x") as writer:
        writer.write("bad", {"json": b'{"captions": ["a\\ud800"]}'})
    manifest = write_manifest(tmp_path / "x.manifest", writer.shards).path
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": "a\\ud800"}\n')
    for source, place in (([str(manifest)], "x-00000.tar/bad"), (["--texts", str(tmp_path / "x.jsonl")], "x.jsonl:2")):
        assert main(["data", "fertility", str(BUNDLED), *source]) != 0
        printed = capsys.readouterr().err
        assert f"{place}: the text is not valid Unicode" in printed.replace("\n", "")
        assert "Traceback" not in printed
    with pytest.raises(SampleError, match=r"x-00000\.tar/bad: the text is not valid Unicode"):
        train_sentencepiece([manifest], tmp_path / "x.model", 300)
