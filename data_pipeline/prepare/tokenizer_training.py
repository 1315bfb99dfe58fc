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
    """Train a SentencePiece model on the text of the shards; equal shards give equal bytes.

    Encoding and decoding preserve a text: rare characters become bytes, spaces are kept, and nothing is normalised. The
    exception is U+2581, SentencePiece's own mark of a space, which decodes to a space. Pieces 0 to 4 are pad, bos, eos,
    unk and ``<image>``, followed by ``special_tokens``.

    Args:
        manifests: Manifests of the data sets whose text to read.
        output: The ``.model`` file, written atomically.
        vocab_size: Number of pieces, including pieces 0 to 4, ``special_tokens`` and 256 bytes.
        model_type: Algorithm.
        character_coverage: Share of characters that get a piece of their own; the others are encoded as bytes.
        max_samples: With more samples than this, only every n-th is used.
        special_tokens: Further special pieces, such as those of an image's layout. Text never encodes to them.
        progress: Called with (samples read, samples in all) after each sample.

    Raises:
        DataConfigError: ``vocab_size`` does not fit the text, or there is no text.
        ManifestError, ShardError, StorageError, SampleError: a text cannot be read; as ``iterate_texts``.
    """
    opened = [Manifest.open(path) for path in manifests]
    total = sum(manifest.num_samples for manifest in opened)
    stride = max(1, -(-total // max_samples))
    model = io.BytesIO()
    lines = _RecordedError(_lines(opened, stride, total, progress))
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
            num_threads=1,  # Several threads add in varying order, which changes the bytes of the model.
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


class _RecordedError:
    """Lines for the trainer. The trainer replaces an exception by its own, so the original is kept in ``error``."""

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
        except BaseException as error:  # Includes KeyboardInterrupt.
            self.error = error
            raise


def _lines(
    manifests: list[Manifest], stride: int, total: int, progress: Callable[[int, int], None] | None
) -> Iterator[str]:
    """Yield lines short enough for the trainer, which silently skips longer ones."""
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
    """Yield the texts of each sample in order. Only the text members are read.

    Raises:
        ManifestError: a shard is missing or stale.
        ShardError: a shard is shorter than its index says.
        StorageError: a remote shard cannot be read.
        SampleError: a text is not UTF-8 or a JSON is damaged; the error names shard and key.
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
        raise SampleError(f"the text is not UTF-8: {error}", shard=shard, key=key, kind=FaultKind.TEXT) from error
    except SampleError as error:
        raise error.located(shard, key) from error
