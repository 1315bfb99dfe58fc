"""Tokenizers: exact round trips, no special id from text, and byte-identical training from equal shards."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.prepare.tokenizer_training import train_sentencepiece
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import (
    HuggingFaceTokenizerConfig,
    SentencePieceTokenizerConfig,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
)

BUNDLED = Path(__file__).resolve().parents[3] / "examples" / "emoji" / "tokenizer.model"
HOSTILE = ["<image>", "a <image><image> b", "</s><s>", "<pad>x<unk>", "<0x41>", "<image", "<imag<image>e>", " <image> "]


def manifest_of(folder: Path) -> Path:
    with ShardWriter(folder, "text", max_samples=20) as writer:
        for i in range(60):
            writer.write(f"{i:02d}", {"json": f'{{"captions": ["red apple {i}", "green pear {i * 7}"]}}'.encode()})
            writer.write(f"p{i:02d}", {"txt": f"page {i}\nwith <image> and two  spaces".encode()})
    write_manifest(folder / "text.manifest", writer.shards)
    return folder / "text.manifest"


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return load_tokenizer(SentencePieceTokenizerConfig(path=BUNDLED))


def user_defined_sentencepiece(path: Path) -> Tokenizer:
    """Train a model with a user-defined ``<image>``, which matches in text, and with a dummy prefix space."""
    text = ["red apple and green pear", "image of a page"] * 30
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=290, byte_fallback=True, model_type="bpe",
            user_defined_symbols=["<image>"], minloglevel=2,
        )  # fmt: skip
    return load_tokenizer(SentencePieceTokenizerConfig(path=path))


def hugging_face(path: Path, special: bool) -> Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(["red apple <image> </s>"] * 5, trainer)
    names = ["<s>", "</s>", "<pad>", "<image>"]
    (model.add_special_tokens if special else model.add_tokens)(names)
    model.save(str(path))
    return load_tokenizer(HuggingFaceTokenizerConfig(path=path))


def check_hostile(tokenizer: Tokenizer) -> None:
    reserved = {tokenizer.image_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert len(reserved | {tokenizer.vocab_size}) >= 4
    for text in HOSTILE:
        ids = tokenizer.encode(text)
        assert reserved.isdisjoint(ids), text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\u2581"), max_size=60))
def test_any_text_survives(bundled: Tokenizer, text: str) -> None:
    ids = bundled.encode(text)
    assert bundled.decode(ids) == text
    assert {0, 1, 2, 3, 4}.isdisjoint(ids)


@settings(max_examples=50, deadline=None)
@given(left=st.text("ab <>image", max_size=12), right=st.text("ab <>image", max_size=12))
def test_pieces_of_a_document_join_without_a_seam(bundled: Tokenizer, left: str, right: str) -> None:
    ids = [*bundled.encode(left), bundled.image_id, *bundled.encode(right), bundled.eos_id]
    assert bundled.decode(ids) == left + right


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_ids_beyond_the_vocabulary_have_no_text(bundled: Tokenizer, tmp_path: Path, kind: str) -> None:
    tokenizer = bundled if kind == "sentencepiece" else hugging_face(tmp_path / "tokenizer.json", special=True)
    ids = tokenizer.encode("red apple")
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 900]
    assert tokenizer.decode([beyond[0], *ids, beyond[1]]) == "red apple"
    assert tokenizer.decode(beyond) == ""


def test_special_names_in_text_are_spelled_out(bundled: Tokenizer, tmp_path: Path) -> None:
    check_hostile(bundled)
    check_hostile(hugging_face(tmp_path / "special.json", special=True))
    check_hostile(hugging_face(tmp_path / "added.json", special=False))
    other = user_defined_sentencepiece(tmp_path / "other.model")
    for text in HOSTILE:
        assert other.image_id not in other.encode(text), text
    assert other.decode(other.encode("a <image> pear")) == "a <image> pear"


def test_a_name_that_cannot_be_spelled_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["red pear"] * 9), model_writer=file, vocab_size=12, model_type="char",
            user_defined_symbols=["<image>"], minloglevel=2,
        )  # fmt: skip
    tokenizer = load_tokenizer(SentencePieceTokenizerConfig(path=tmp_path / "x.model"))
    with pytest.raises(SampleError, match="cannot spell out"):
        tokenizer.encode("a <image>")


def test_equal_shards_give_equal_models(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    first = train_sentencepiece([manifest], tmp_path / "a.model", 300)
    second = train_sentencepiece([manifest], tmp_path / "b.model", 300)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.fingerprint == second.fingerprint
    assert (first.pad_id, first.bos_id, first.eos_id, first.image_id, first.vocab_size) == (0, 1, 2, 4, 300)
    assert len(first.encode(" apple")) < 4
    half = train_sentencepiece([manifest], tmp_path / "c.model", 300, max_samples=60)
    assert half.fingerprint != first.fingerprint


def test_special_pieces_are_never_read_in_text(tmp_path: Path) -> None:
    trained = train_sentencepiece(
        [manifest_of(tmp_path)], tmp_path / "a.model", 300, special_tokens=["<tile_1>", "<row>"]
    )
    ids = [trained.special_id(name, "x") for name in ("<tile_1>", "<row>")]
    assert ids == [5, 6]
    spelled = trained.encode("a <tile_1><row>")
    assert set(ids).isdisjoint(spelled)
    assert trained.decode([*ids, *spelled]) == "a <tile_1><row>"


@pytest.mark.fault
def test_what_cannot_work_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    with pytest.raises(DataConfigError, match="cannot be trained"):
        train_sentencepiece([manifest], tmp_path / "x.model", 262)
    assert not (tmp_path / "x.model").exists()
    with pytest.raises(DataConfigError, match="no such file"):
        load_tokenizer(SentencePieceTokenizerConfig(path=tmp_path / "gone.model"))
    (tmp_path / "bad").write_bytes(b"no model")
    with pytest.raises(DataConfigError, match="not a SentencePiece model"):
        load_tokenizer(SentencePieceTokenizerConfig(path=tmp_path / "bad"))
    with pytest.raises(DataConfigError, match=r"not a valid tokenizer\.json"):
        load_tokenizer(HuggingFaceTokenizerConfig(path=tmp_path / "bad"))
    with pytest.raises(DataConfigError, match="has no piece <picture>"):
        load_tokenizer(SentencePieceTokenizerConfig(path=BUNDLED, image_token="<picture>"))


def test_the_kind_picks_the_config_and_workers_can_copy_it(bundled: Tokenizer) -> None:
    adapter: TypeAdapter[object] = TypeAdapter(TokenizerConfig)
    config = adapter.validate_python({"kind": "tokenizers", "path": "t.json"})
    assert isinstance(config, HuggingFaceTokenizerConfig)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "words", "path": "t"})
    copy = pickle.loads(pickle.dumps(bundled))
    assert copy.encode("a red apple") == bundled.encode("a red apple")


def test_training_names_the_sample_whose_text_cannot_be_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "text", max_samples=20) as writer:
        writer.write("good", {"txt": b"red apple"})
        writer.write("bad", {"json": b'{"captions": ["half \\ud800"]}'})
    manifest = write_manifest(tmp_path / "text.manifest", writer.shards)
    with pytest.raises(SampleError, match=r"/bad: the text is not valid Unicode") as caught:
        train_sentencepiece([manifest.path], tmp_path / "t.model", 300)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t.model").exists()
