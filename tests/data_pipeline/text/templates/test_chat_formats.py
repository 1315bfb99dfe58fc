"""Chat formats, compared with the models' own templates as rendered and tokenised by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken
from tokenizers import Tokenizer as Model

from data_pipeline.config import DatasetConfig
from data_pipeline.document import IGNORE
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import Provenance, Sample
from data_pipeline.text.templates import DialogueTemplate
from data_pipeline.text.templates.chat_formats import CHAT_FORMATS
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer

JINJA = {
    # Qwen2 and others, without Qwen's default system turn.
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Meta-Llama-3-8B-Instruct.
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # The text branches of Mistral-Small-3.1-24B-Instruct-2503, without its default system turn.
    "mistral": "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '[INST]' + message['content'] + '[/INST]' }}{%- elif message['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}{%- elif message['role'] == 'assistant' %}"
    "{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}",
    # gemma-2-9b-it.
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    # phi-4.
    "phi4": "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
    "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
    "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
}
TURNS = (
    ("user", " Hello there\n"),
    ("assistant", "Hi! <|im_end|> is a word here"),
    ("user", "More?"),
    ("assistant", "  No.  "),
)


def _messages(name: str, *, plain: bool) -> list[dict[str, str]]:
    """Return a dialogue; with ``plain``, without names of special tokens, which transformers would encode as such."""
    turns = TURNS if name == "gemma" else (("system", "Be kind."), *TURNS)
    return [{"role": role, "content": words.replace("<|im_end|>", "it") if plain else words} for role, words in turns]


def _builder(name: str, tokenizer_path: Path, folder: Path) -> DocumentBuilder:
    model = Model.from_file(str(tokenizer_path))
    model.add_special_tokens([AddedToken(token, special=True) for token in CHAT_FORMATS[name]["special_tokens"]])
    model.save(str(folder / "chat.json"))
    tokenizer = load_tokenizer(HuggingFaceTokenizerConfig(path=folder / "chat.json"))
    dataset = {"name": "x", "manifest": "x", "template": {"kind": "dialogue", "format": name}}
    return DocumentBuilder(DatasetConfig.model_validate(dataset), tokenizer, MediaSpec())


def _sample(messages: list[dict[str, str]]) -> Sample:
    return Sample((), {"messages": messages}, Provenance("d", "s", "k", 0))


def _reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "chat.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", JINJA)
def test_the_tokens_are_those_of_the_models_own_template(name: str, tokenizer_path: Path, tmp_path: Path) -> None:
    builder, messages = _builder(name, tokenizer_path, tmp_path), _messages(name, plain=True)
    theirs = _reference(tmp_path)
    document = builder(_sample(messages))
    expected = theirs.apply_chat_template(messages, chat_template=JINJA[name], return_dict=False)
    # Every document begins with <s>. Some of the templates leave it to the tokenizer.
    assert document.token_ids.tolist() == [1] * (expected[0] != 1) + expected
    asked = theirs.apply_chat_template(
        messages[:-1], chat_template=JINJA[name], add_generation_prompt=True, return_dict=False
    )
    assert builder.build_prompt(_sample(messages)).token_ids.tolist() == [1] * (asked[0] != 1) + asked


@pytest.mark.parity
@pytest.mark.parametrize("name", JINJA)
def test_the_answers_alone_are_learned_up_to_what_closes_them(name: str, tokenizer_path: Path, tmp_path: Path) -> None:
    builder, messages = _builder(name, tokenizer_path, tmp_path), _messages(name, plain=True)
    template = builder.dataset.template
    assert isinstance(template, DialogueTemplate)
    document = builder(_sample(messages))
    learned = document.labels[document.labels != IGNORE].tolist()
    strip = template.strip
    answers = [
        words["content"].strip() if strip else words["content"] for words in messages if words["role"] == "assistant"
    ]
    suffix = template.roles["assistant"].suffix + ("</s>" if template.end == "turn" else "")
    spelled = Model.from_file(str(tmp_path / "chat.json"))
    assert learned == [i for words in answers for i in spelled.encode(words + suffix, add_special_tokens=False).ids]
    if template.closing:
        assert builder.tokenizer.special_id(template.closing[0], "") in learned


@pytest.mark.parametrize("name", JINJA)
def test_what_is_said_gives_no_token_of_the_format(name: str, tokenizer_path: Path, tmp_path: Path) -> None:
    builder = _builder(name, tokenizer_path, tmp_path)
    forged = "".join(CHAT_FORMATS[name]["special_tokens"])
    harmless, evil = (
        builder(_sample([{"role": "user", "content": words}, {"role": "assistant", "content": words}]))
        for words in ("yes", forged)
    )
    reserved = {builder.tokenizer.special_id(token, "") for token in CHAT_FORMATS[name]["special_tokens"]}
    assert [i for i in evil.token_ids.tolist() if i in reserved] == [
        i for i in harmless.token_ids.tolist() if i in reserved
    ]


def test_vicunas_format_is_the_default() -> None:
    assert DialogueTemplate(format="vicuna").model_dump(exclude={"format"}) == DialogueTemplate().model_dump(
        exclude={"format"}
    )


def test_a_format_is_written_out_and_may_be_changed_in_part() -> None:
    whole = DialogueTemplate(format="llama3")
    assert DialogueTemplate.model_validate(whole.model_dump()) == whole
    changed = DialogueTemplate(format="chatml", end="dialogue", learn="last")
    assert (changed.end, changed.roles) == ("dialogue", DialogueTemplate(format="chatml").roles)
    own = DialogueTemplate(format="llama3", roles={"assistant": {"weight": 1}})
    assert (own.special_tokens, own.strip) == ((), True)
    with pytest.raises(ValidationError, match="format"):
        DialogueTemplate.model_validate({"kind": "dialogue", "format": "chatlm"})
    with pytest.raises(ValidationError, match="no role 'system' for this turn"):
        DialogueTemplate(format="gemma", system="Be kind.")
