"""Convert text to token ids and back.

    config --load_tokenizer--> Tokenizer

User text never yields a special id or a control token (``control_tokens``): ``<image>``, ``</s>`` or ``<|im_start|>``
in a caption is encoded as ordinary text. Otherwise the author of a caption could insert images and open turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import sentencepiece
import tokenizers
from pydantic import Field

from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.io.missing import no_such_file
from data_pipeline.io.strict import StrictConfig
from data_pipeline.io.untrusted import UntrustedError, read_bytes
from data_pipeline.text.control_tokens import any_of, control_tokens, user_defined_pieces

IMAGE_TOKEN = "<image>"
_MAX_FILE_BYTES = 1 << 28
"""Largest size of a tokenizer file; the largest published ones have 40 MB."""


class SentencePieceTokenizerConfig(StrictConfig):
    """A SentencePiece model."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    path: Path
    """The ``.model`` file."""
    image_token: str | None = IMAGE_TOKEN
    """Piece that is the placeholder of an image feature; null for a model of text alone."""
    text_tokens: tuple[str, ...] = ()
    """User-defined pieces of the form ``<...>`` or ``[...]`` that user text may produce; ``*`` matches any characters
    (``<loc_*>``). Other such pieces in a text are spelled out."""


class HuggingFaceTokenizerConfig(StrictConfig):
    """A ``tokenizer.json`` of the ``tokenizers`` library."""

    kind: Literal["tokenizers"] = "tokenizers"
    path: Path
    """The ``tokenizer.json``."""
    image_token: str | None = IMAGE_TOKEN
    """Token that is the placeholder of an image feature. null for models without one: of text alone, and contrastive
    ones."""
    bos_token: str | None = "<s>"
    """Token at the beginning of a document. null for none; then the first token of a text is not predicted."""
    eos_token: str = "</s>"
    """Token at the end of a document."""
    pad_token: str = "<pad>"
    """Padding token, used in dummy documents."""
    text_tokens: tuple[str, ...] = ()
    """Added tokens of the form ``<...>`` or ``[...]``, not marked as special, that user text may produce; ``*`` matches
    any characters (``<loc_*>``). Other such tokens in a text are spelled out."""


TokenizerConfig = Annotated[SentencePieceTokenizerConfig | HuggingFaceTokenizerConfig, Field(discriminator="kind")]
"""A tokenizer; ``kind`` selects its type."""


class Tokenizer(Protocol):
    """The interface of a tokenizer for the loader, evaluation and generation."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def image_id(self) -> int:
        """Id of the placeholder of an image feature; -1 without one."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids of a text."""

    def names_token(self, text: str) -> bool:
        """Return whether a text contains the name of a token that ``encode`` spells out."""

    def special_id(self, name: str, field: str) -> int:
        """Return the id of the token with exactly this name, special or not.

        Args:
            name: Name of the token in the vocabulary.
            field: Configuration key that names the token, for the message.

        Raises:
            DataConfigError: the vocabulary has no such token. The message explains how to add it.
        """

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without bos and eos. They contain no special id and no control token.

        The text must be valid Unicode (``check_unicode``).

        Raises:
            SampleError: the text contains a special token that this tokenizer cannot spell out.
        """

    def name_of(self, token_id: int) -> str:
        """Return the name of a token in the vocabulary."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``. Invalid UTF-8 becomes U+FFFD.

        Skips special ids, and ids from ``vocab_size`` up, which a model with a larger ``vocab_size`` can sample.
        """


def check_unicode(text: str) -> None:
    """Raise if ``text`` contains a lone surrogate, such as ``\\ud800`` from JSON, which UTF-8 cannot encode.

    Raises:
        SampleError: it contains one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"the text is not valid Unicode: {error}", kind=FaultKind.TEXT) from error


def load_tokenizer(config: SentencePieceTokenizerConfig | HuggingFaceTokenizerConfig) -> Tokenizer:
    """Load a tokenizer.

    Raises:
        DataConfigError: the file is missing or of another format, the vocabulary lacks a special token, or
            ``text_tokens`` matches no control token.
    """
    if isinstance(config, SentencePieceTokenizerConfig):
        return SentencePieceTokenizer(config)
    return HuggingFaceTokenizer(config)


class SentencePieceTokenizer:
    """``Tokenizer`` of a SentencePiece model."""

    def __init__(self, config: SentencePieceTokenizerConfig) -> None:
        self._config = config
        content = _read(config.path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataConfigError(
                f"tokenizer {config.path}: not a SentencePiece model; for a tokenizer.json set kind: tokenizers"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int | None = self._special("bos", self._model.bos_id())
        self.eos_id = self._special("eos", self._model.eos_id())
        # Llama's models have no pad piece. The tokens of dummy documents have no effect, so use eos.
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self.image_id = -1
        if config.image_token is not None:
            image_id = self._model.piece_to_id(config.image_token)
            self.image_id = self._special(config.image_token, -1 if image_id == self._model.unk_id() else image_id)
        # Published models have user-defined pieces, which match in text. Models that ``mmscale data tokenizer`` trains
        # have control pieces instead, which do not match.
        matched = {i: name for i, name in user_defined_pieces(content).items() if i != self.image_id}
        control = control_tokens(matched, config.text_tokens, config.path)
        self._spelled_out = dict(control)
        if config.image_token is not None:
            self._spelled_out[self.image_id] = config.image_token
        self._names = any_of(self._spelled_out.values())
        self.fingerprint = _fingerprint(content, (config.image_token or "",), config.text_tokens)

    def special_id(self, name: str, field: str) -> int:
        """See ``Tokenizer.special_id``."""
        piece_id: int = self._model.piece_to_id(name)
        if piece_id == self._model.unk_id():
            raise DataConfigError(
                f"{field}: tokenizer {self._config.path} has no piece {name!r}; train one that has it with: "
                f"mmscale data tokenizer --special '{name}'"
            )
        return piece_id

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``."""
        ids: list[int] = self._model.encode(text)
        if self._spelled_out.keys().isdisjoint(ids):
            return ids
        spelled = {i: self._spelled(name) for i, name in self._spelled_out.items() if i in ids}
        return [other for i in ids for other in spelled.get(i, (i,))]

    def names_token(self, text: str) -> bool:
        """See ``Tokenizer.names_token``."""
        return self._names is not None and self._names.search(text) is not None

    def name_of(self, token_id: int) -> str:
        """See ``Tokenizer.name_of``."""
        return str(self._model.id_to_piece(int(token_id)))

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        skipped = (self.image_id, self.pad_id)
        text: str = self._model.decode([int(i) for i in ids if i < self.vocab_size and i not in skipped])
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return (load_tokenizer, (self._config,))

    def _spelled(self, token: str) -> list[int]:
        """Encode the name of a token letter by letter, and a letter without a piece as bytes."""
        ids: list[int] = []
        for letter in token:
            names = [letter]
            if self._model.piece_to_id(letter) == self._model.unk_id():
                names = [f"<0x{byte:02X}>" for byte in letter.encode()]
            ids += (self._model.piece_to_id(name) for name in names)
        if self._model.unk_id() in ids:
            raise SampleError(
                f"the text contains {token}, which this tokenizer cannot spell out; remove it from the text",
                kind=FaultKind.TEXT,
            )
        return ids

    def _special(self, name: str, piece_id: int) -> int:
        if piece_id < 0:
            raise DataConfigError(
                f"tokenizer {self._config.path}: has no piece {name}; train a tokenizer with: mmscale data tokenizer"
            )
        return piece_id


class HuggingFaceTokenizer:
    """``Tokenizer`` of a ``tokenizer.json``."""

    def __init__(self, config: HuggingFaceTokenizerConfig) -> None:
        self._config = config
        content = _read(config.path)
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # The library raises ``Exception`` itself.
            raise DataConfigError(f"tokenizer {config.path}: not a valid tokenizer.json: {error}") from error
        self._model.encode_special_tokens = True
        self.vocab_size: int = self._model.get_vocab_size(with_added_tokens=True)
        bos = config.bos_token
        self.bos_id: int | None = None if bos is None else self.special_id(bos, "bos_token")
        self.eos_id = self.special_id(config.eos_token, "eos_token")
        self.pad_id = self.special_id(config.pad_token, "pad_token")
        image = config.image_token
        self.image_id = -1 if image is None else self.special_id(image, "image_token")
        names = (bos or "", config.eos_token, config.pad_token, image or "")
        self.fingerprint = _fingerprint(content, names, config.text_tokens)
        self._word_end: str = getattr(self._model.model, "end_of_word_suffix", None) or ""
        self._reserved = {self.eos_id, self.pad_id, self.image_id} | (
            {self.bos_id} if self.bos_id is not None else set()
        )
        added = self._model.get_added_tokens_decoder()
        unmarked = {i: token.content for i, token in added.items() if not token.special and i not in self._reserved}
        control = control_tokens(unmarked, config.text_tokens, config.path)
        self._forbidden = self._reserved | control.keys()
        self._names = sorted({name for name in (*names, *control.values()) if name})
        self._spelled_names = any_of({*self._names, *(token.content for token in added.values() if token.special)})

    def special_id(self, name: str, field: str) -> int:
        """See ``Tokenizer.special_id``."""
        token_id = self._model.token_to_id(name)
        if token_id is None:
            raise DataConfigError(
                f"{field}: tokenizer {self._config.path} has no token {name!r}; name one of its tokens, or add it "
                "to the file with add_special_tokens of the tokenizers library"
            )
        return int(token_id)

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``."""
        ids = self._raw(text)
        if self._forbidden.isdisjoint(ids):
            return ids
        return _encode_split(text, self._names, self._forbidden, self._raw)

    def names_token(self, text: str) -> bool:
        """See ``Tokenizer.names_token``."""
        return self._spelled_names is not None and self._spelled_names.search(text) is not None

    def name_of(self, token_id: int) -> str:
        """See ``Tokenizer.name_of``."""
        return self._model.id_to_token(int(token_id)) or ""

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer.decode``."""
        text: str = self._model.decode([int(i) for i in ids if i not in self._reserved], skip_special_tokens=True)
        # CLIP's vocabulary marks the ends of words.
        return text.replace(self._word_end, " ").rstrip() if self._word_end else text

    def __reduce__(self) -> tuple[object, ...]:
        return (load_tokenizer, (self._config,))

    def _raw(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, most_bytes=_MAX_FILE_BYTES)
    except UntrustedError as error:
        raise DataConfigError(f"tokenizer {path}: {error}") from error
    except FileNotFoundError as error:
        raise DataConfigError(f"tokenizer {path}: {no_such_file(path)}") from error
    except OSError as error:
        raise DataConfigError(f"tokenizer {path}: cannot be read: {error.strerror}") from error


def _fingerprint(content: bytes, names: Sequence[str], text_tokens: Sequence[str]) -> str:
    """Return the SHA-256 of the file and of its configuration."""
    # Without ``text_tokens``, the fingerprint equals that of earlier versions.
    allowed = ["", *text_tokens] if text_tokens else []
    return hashlib.sha256(content + "\0".join([*names, *allowed]).encode()).hexdigest()


def _encode_split(
    text: str,
    names: list[str],
    reserved: set[int],
    encode: Callable[[str], list[int]],
) -> list[int]:
    """Encode a text whose special names are each split in two, so that the tokenizer does not match them.

    Raises:
        SampleError: the ids still contain a reserved id.
    """
    parts = [text]
    for name in names:
        parts = [half for part in parts for half in _halves(part, name)]
    ids = [i for part in parts for i in encode(part)]
    if not reserved.isdisjoint(ids):
        found = ", ".join(name for name in names if name in text) or "a special token"
        raise SampleError(
            f"the text contains {found}, which this tokenizer cannot spell out; remove it from the text",
            kind=FaultKind.TEXT,
        )
    return ids


def _halves(text: str, name: str) -> list[str]:
    """Split a text after the first character of each occurrence of ``name``."""
    first, *others = text.split(name)
    parts = [first]
    for part in others:
        parts[-1] += name[:1]
        parts.append(name[1:] + part)
    return parts
