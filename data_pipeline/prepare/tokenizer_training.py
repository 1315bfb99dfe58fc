"""Train a SentencePiece tokenizer on the text of shards."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.json_member import all_texts, parse_member
from data_pipeline.prepare.choices import ModelType
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import open_shard
from data_pipeline.text.tokenizer import (
    IMAGE_TOKEN,
    SentencePieceTokenizer,
    SentencePieceTokenizerConfig,
    check_unicode,
)

_MAX_LINE_BYTES = 4096


def train_sentencepiece(
    manifests: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    model_type: ModelType = ModelType.BPE,
    character_coverage: float = 0.9995,
    max_samples: int = 1_000_000,
    special_tokens: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> SentencePieceTokenizer:
    """Trains a SentencePiece model on all text of the shards; equal shards give equal bytes.

    Text survives encoding and decoding exactly: bytes stand in for rare characters, spaces are kept, nothing is
    normalised. Pieces 0 to 4 are pad, bos, eos, unk and ``<image>``; then come the special ones that were asked for.

    Args:
        manifests: Whose text to read.
        output: The ``.model`` file, written whole or not at all.
        vocab_size: Pieces, at least 5 special ones and 256 bytes.
        model_type: Algorithm.
        character_coverage: Share of characters that get a piece of their own; the rest is spelled in bytes.
        max_samples: From larger data sets every n-th sample is taken.
        special_tokens: Further pieces that no text gives, such as those of an image's layout.
        progress: Called with (samples read, samples to read).

    Raises:
        DataConfigError: ``vocab_size`` does not fit the text, or there is no text.
        ManifestError, ShardError, StorageError, SampleError: a text cannot be read; as ``iterate_texts``.
    """
    opened = [Manifest.open(path) for path in manifests]
    total = sum(manifest.num_samples for manifest in opened)
    stride = max(1, -(-total // max_samples))
    model = io.BytesIO()
    lines = _Caught(_lines(opened, stride, total, progress))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type.value,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            control_symbols=[IMAGE_TOKEN, *special_tokens],
            max_sentence_length=4 * _MAX_LINE_BYTES,
            num_threads=1,  # More threads add up in another order.
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        raise DataConfigError(
            f"a vocabulary of {vocab_size} pieces cannot be trained on {total} samples: {error}"
        ) from error
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(output), model.getvalue())
    return SentencePieceTokenizer(SentencePieceTokenizerConfig(path=Path(output)))


class _Caught:
    """Lines for the trainer. It makes a text of its own of an exception, so the exception is kept in ``error``."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise
        except BaseException as error:  # An interrupt too.
            self.error = error
            raise


def _lines(
    manifests: list[Manifest], stride: int, total: int, progress: Callable[[int, int], None] | None
) -> Iterator[str]:
    """Lines short enough for the trainer, which passes over long ones in silence."""
    number = 0
    for manifest in manifests:
        for texts in iterate_texts(manifest):
            if number % stride == 0:
                for line in (line for text in texts for line in text.splitlines() if line.strip()):
                    yield from (line[i : i + _MAX_LINE_BYTES] for i in range(0, len(line), _MAX_LINE_BYTES))
            number += 1
            if progress is not None:
                progress(number, total)


def iterate_texts(manifest: Manifest) -> Iterator[list[str]]:
    """The texts of each sample in order; reads the text members only.

    Raises:
        ManifestError: a shard is missing or stale.
        ShardError: a shard is shorter than its index says.
        StorageError: a remote one cannot be read.
        SampleError: a text is no UTF-8 or a JSON is damaged; names shard and key.
    """
    for number in range(manifest.num_shards):
        shard = open_shard(manifest, number)
        try:
            for i in range(len(shard.index)):
                texts: list[str] = []
                row = shard.index.row(i)
                for member in row.members:
                    if member.ext in ("txt", "json"):
                        content = shard.read([member])[member.ext]
                        texts += _decoded(member.ext, content, str(shard.index.tar_path), row.key)
                yield texts
        finally:
            shard.close()


def _decoded(ext: str, content: bytes, shard: str, key: str) -> list[str]:
    try:
        if ext == "json":
            texts = all_texts(parse_member(content))
            for text in texts:
                check_unicode(text)
            return texts
        return [content.decode()]
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is no UTF-8: {error}", shard=shard, key=key, kind=FaultKind.TEXT) from error
    except SampleError as error:
        raise error.located(shard, key) from error
