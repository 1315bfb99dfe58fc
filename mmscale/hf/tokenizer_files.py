"""Read the tokenizer of a Hugging Face folder: its file, its special tokens and its chat template.

    tokenizer.json, else tokenizer.model            the vocabulary
    tokenizer_config.json, special_tokens_map.json  names of the special tokens
    chat_template.jinja, chat_template.json, processor_config.json, tokenizer_config.json   the chat template

The folder is untrusted: files are bounded, and nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from data_pipeline.errors import DataConfigError
from data_pipeline.io.untrusted import UntrustedError, read_bytes, read_json
from data_pipeline.text.tokenizer import (
    HuggingFaceTokenizerConfig,
    SentencePieceTokenizerConfig,
    load_tokenizer,
)
from mmscale.errors import CheckpointError

TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_MOST_BYTES = 256 << 20
_MOST_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a folder.

    Attributes:
        path: ``tokenizer.json`` or ``tokenizer.model``.
        names: Special tokens by their keys in the files: ``bos_token``, ``eos_token``, ``pad_token`` and others.
        added_tokens: Names that the tokenizer finds in any text and encodes as one token.
        adds_begin: Whether the tokenizer itself puts its begin token before a text.
        chat_template: The chat template, a Jinja program; None if the folder has none.
        id_of: Returns the id of a token; None if the vocabulary has no such token.
        name_of: Returns the name of an id; None if the vocabulary has no such id.
    """

    path: Path
    names: dict[str, str]
    added_tokens: tuple[str, ...]
    adds_begin: bool
    chat_template: str | None
    id_of: Callable[[str], int | None]
    name_of: Callable[[int], str | None]

    def image_token(self, token_ids: Mapping[str, Any], names: Sequence[str]) -> str:
        """Return the name of the placeholder of an image feature.

        Args:
            token_ids: Values of ``config.json``; ``image_token_id`` or ``image_token_index`` names it.
            names: Usual names, tried if there is no such id.

        Raises:
            CheckpointError: the vocabulary has none of them.
        """
        for key in ("image_token_id", "image_token_index"):
            token_id = token_ids.get(key)
            if type(token_id) is int and token_id >= 0 and (name := self.name_of(token_id)) is not None:
                return name
        if found := [name for name in names if self.id_of(name) is not None]:
            return found[0]
        raise CheckpointError(
            f"{self.path} has no token for images, such as {', '.join(names)}; add it to the tokenizer"
        )

    def block(self, *, begin: bool, image_token: str | None) -> dict[str, Any]:
        """Return the ``data.tokenizer`` block with the path in this folder.

        Args:
            begin: Whether documents begin with the begin token.
            image_token: Name of the placeholder of an image feature; None for none.

        Raises:
            CheckpointError: a special token is missing from the vocabulary.
        """
        text_block: dict[str, Any] = {"path": str(self.path), "image_token": image_token}
        config: HuggingFaceTokenizerConfig | SentencePieceTokenizerConfig
        try:
            if self.path.name == SENTENCEPIECE:
                config = SentencePieceTokenizerConfig(**text_block)
            else:
                end = self.names.get("eos_token")
                if end is None:
                    raise CheckpointError(
                        f"{self.path.parent}: neither eos_token in {TOKENIZER_CONFIG} nor eos_token_id in config.json"
                    )
                config = HuggingFaceTokenizerConfig(
                    **text_block,
                    bos_token=self.names.get("bos_token") if begin else None,
                    eos_token=end,
                    pad_token=self.names.get("pad_token", end),
                )
            load_tokenizer(config)
        except DataConfigError as error:
            raise CheckpointError(str(error)) from error
        return config.model_dump(mode="json", exclude={"text_tokens"})


def read_tokenizer(folder: Path, token_ids: Mapping[str, Any]) -> TokenizerFiles:
    """Read the tokenizer of a folder.

    Args:
        folder: A Hugging Face folder.
        token_ids: Values of ``config.json``, whose ``bos_token_id`` and so on replace names that the tokenizer's files
            do not contain.

    Raises:
        CheckpointError: there is no tokenizer that can be read, or a file is damaged. The message says what to do.
    """
    id_of: Callable[[str], int | None]
    name_of: Callable[[int], str | None]
    settings = _json(folder / TOKENIZER_CONFIG)
    names = _names({**_json(folder / SPECIAL_TOKENS), **settings})
    if (folder / TOKENIZER_JSON).is_file():
        path = folder / TOKENIZER_JSON
        model = _model(path)
        id_of, name_of = model.token_to_id, model.id_to_token
        for key in ("bos", "eos", "pad"):
            ids = token_ids.get(f"{key}_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            if f"{key}_token" not in names and type(first) is int and first >= 0:
                name = model.id_to_token(first)
                names |= {} if name is None else {f"{key}_token": name}
        added = tuple(token.content for token in model.get_added_tokens_decoder().values())
        begin = names.get("bos_token")
        adds_begin = settings.get("add_bos_token")
        if not isinstance(adds_begin, bool):
            adds_begin = begin is not None and begin in model.encode("a").tokens[:1]
    elif (folder / SENTENCEPIECE).is_file():
        path, added = folder / SENTENCEPIECE, tuple(dict.fromkeys((*names.values(), *_added(settings))))
        pieces = _pieces(path)
        by_number = {number: name for name, number in pieces.items()}
        id_of, name_of = lambda name: pieces.get(name), lambda number: by_number.get(number)
        adds_begin = settings.get("add_bos_token") is not False
    else:
        raise CheckpointError(
            f"{folder} has neither {TOKENIZER_JSON} nor {SENTENCEPIECE}. If it has other files of a tokenizer, convert "
            f'them: python -c "from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({str(folder)!r})'
            f'.save_pretrained({str(folder)!r})"'
        )
    return TokenizerFiles(
        path, names, added, adds_begin and "bos_token" in names, _chat_template(folder, settings), id_of, name_of
    )


def _model(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(read_bytes(path, most_bytes=_MOST_BYTES).decode())
    except UntrustedError as error:
        raise CheckpointError(f"{path} is {error}") from error
    except Exception as error:  # The library raises ``Exception`` itself.
        raise CheckpointError(f"{path}: not a valid tokenizer.json: {error}") from error


def _pieces(path: Path) -> dict[str, int]:
    """Return the ids of a SentencePiece model by name."""
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(read_bytes(path, most_bytes=_MOST_BYTES))
    except (UntrustedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error})") from error
    return {model.id_to_piece(number): number for number in range(model.vocab_size())}


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by key; a token is a name, or an object with its name as ``content``."""
    found = {}
    for key, value in settings.items():
        name = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(name, str):
            found[key] = name
    return found


def _added(settings: Mapping[str, Any]) -> list[str]:
    table = settings.get("added_tokens_decoder")
    tokens = table.values() if isinstance(table, Mapping) else ()
    return [one["content"] for one in tokens if isinstance(one, Mapping) and isinstance(one.get("content"), str)]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        try:
            return read_bytes(folder / "chat_template.jinja", most_bytes=_MOST_TEMPLATE_BYTES).decode()
        except (UntrustedError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder / 'chat_template.jinja'} is {error}") from error
    for file in ("chat_template.json", "processor_config.json"):
        if isinstance(found := _json(folder / file).get("chat_template"), str):
            return found
    found = settings.get("chat_template")
    if isinstance(found, list):  # Several templates by name.
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = read_json(file, most_bytes=_MOST_BYTES)
    except UntrustedError as error:
        raise CheckpointError(f"{file} is {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is no JSON object")
    return values
