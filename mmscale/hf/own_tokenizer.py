"""Write a tokenizer of mmscale as files that ``transformers`` loads: ``tokenizer.json`` and ``tokenizer_config.json``.

A SentencePiece model becomes a ``tokenizer.json`` with equal ids. This is possible for models without normalisation and
without a space before the text, as ``mmscale data tokenizer`` trains them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from data_pipeline.text.templates import DialogueTemplate
from data_pipeline.text.templates.base import TemplateBase
from data_pipeline.text.tokenizer import (
    HuggingFaceTokenizerConfig,
    SentencePieceTokenizerConfig,
    Tokenizer,
    load_tokenizer,
)
from mmscale.errors import CheckpointError
from mmscale.hf.tokenizer_files import TOKENIZER_CONFIG, TOKENIZER_JSON

_PROBES = ("Hello, world!", " two  spaces and\ttabs\n\n", "ÄÖü ß 漢字 🙂", "a_b(c) = 3.14;", "the quick brown fox " * 3)


def write_tokenizer(
    config: SentencePieceTokenizerConfig | HuggingFaceTokenizerConfig, template: TemplateBase, folder: Path
) -> list[Path]:
    """Write the tokenizer, and the chat template if ``template`` is a dialogue of text, into a folder.

    Returns:
        The files.

    Raises:
        CheckpointError: a SentencePiece model cannot be converted to equal ids.
        DataConfigError: the tokenizer cannot be loaded.
    """
    ours = load_tokenizer(config)
    if isinstance(config, SentencePieceTokenizerConfig):
        model = _converted(config.path, ours)
    else:
        model = tokenizers.Tokenizer.from_file(str(config.path))
    names = {"eos_token": ours.name_of(ours.eos_id), "pad_token": ours.name_of(ours.pad_id)}
    if ours.bos_id is not None:
        names["bos_token"] = ours.name_of(ours.bos_id)
        model.post_processor = processors.TemplateProcessing(
            single=f"{names['bos_token']}:0 $A:0", special_tokens=[(names["bos_token"], ours.bos_id)]
        )
    image = [] if config.image_token is None else [config.image_token]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "extra_special_tokens": image}
    files = [folder / TOKENIZER_JSON, folder / TOKENIZER_CONFIG]
    model.save(str(files[0]))
    files[1].write_text(json.dumps({**settings, "clean_up_tokenization_spaces": False}, indent=2) + "\n")
    if isinstance(template, DialogueTemplate):
        files.append(folder / "chat_template.jinja")
        files[2].write_text(_jinja(template, names), encoding="utf-8")
    return files


def _converted(path: Path, ours: Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer with the pieces and the ids of a SentencePiece model, whose algorithm is found by trying both.

    Raises:
        CheckpointError: neither algorithm gives equal ids.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(number): number for number in range(pieces.vocab_size())}
    special = [name for name, i in vocab.items() if pieces.is_control(i)]
    plain = [n for n, i in vocab.items() if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]
    unigram = [(name, pieces.get_score(number)) for name, number in vocab.items()]
    unknown = pieces.unk_id()
    algorithms = (
        models.BPE(
            vocab,
            _merges({name: pieces.get_score(vocab[name]) for name in plain}, vocab),
            unk_token=pieces.id_to_piece(unknown),
            fuse_unk=True,
            byte_fallback=True,
        ),
        models.Unigram(unigram, unknown, byte_fallback=True),
    )
    words = "".join(plain).replace("▁", " ")
    for algorithm in algorithms:
        model = tokenizers.Tokenizer(algorithm)
        model.normalizer = normalizers.Replace(" ", "▁")
        model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        model.add_special_tokens(special)
        if all(model.encode(text, add_special_tokens=False).ids == ours.encode(text) for text in (*_PROBES, words)):
            return model
    raise CheckpointError(
        f"{path}: transformers has no tokenizer with equal ids for this SentencePiece model; give a folder with its "
        "tokenizer to --like"
    )


def _merges(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges of a BPE from its pieces and their scores.

    Source: ``transformers`` 5.24, ``convert_slow_tokenizer.py``, ``generate_merges``.
    """
    merges = []
    for name, score in scores.items():
        halves = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        found = [pair for pair in halves if pair[0] in scores and pair[1] in scores]
        merges += [(score, pair) for pair in sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda one: (one[0], len(one[1][0]), len(one[1][1])), reverse=True)
    return [pair for _, pair in merges]


def _jinja(template: DialogueTemplate, names: Mapping[str, str]) -> str:
    """Return a chat template that writes conversations of text as the dialogue template does."""

    def text(words: str) -> str:
        escaped = words.encode("unicode_escape").decode().replace("'", "\\'")
        return f"'{escaped}'"

    begin = "{{- bos_token }}" if "bos_token" in names else ""
    system = ""
    if template.system is not None and template.system_for == "all" and "system" in template.roles:
        role = template.roles["system"]
        written = text(role.prefix + template.system + role.suffix)
        system = "{%- if messages[0]['role'] != 'system' %}{{- " + written + " }}{%- endif %}"
    content = "message['content'] | trim" if template.strip else "message['content']"
    turns = []
    for number, (name, role) in enumerate(template.roles.items()):
        end = " + eos_token" if template.end == "turn" and role.weight else ""
        written = f"{text(role.prefix + role.lead)} + ({content}) + {text(role.suffix)}{end}"
        turns.append(f"{{%- {'el' * (number > 0)}if message['role'] == {text(name)} %}}{{{{- {written} }}}}")
    unknown = "{%- else %}{{- raise_exception('unknown role ' + message['role']) }}{%- endif %}"
    answering = next(role for role in template.roles.values() if role.weight)
    prompt = f"{{%- if add_generation_prompt %}}{{{{- {text(answering.prefix)} }}}}{{%- endif %}}"
    return "".join([begin, system, "{%- for message in messages %}", *turns, unknown, "{%- endfor %}", prompt, "\n"])
