"""Dialogue templates that are derived from the chat templates of published models, against transformers' rendering."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.errors import SampleError
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.text.templates import DialogueTemplate, EndPiece, TextPiece, TokenPiece
from mmscale.hf import chat_template
from mmscale.hf.chat_template import derive_format
from tests.hf import chat_templates

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
CHATML = {"eos_token": "<|im_end|>"}
ADDED = (
    *("<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<think>"),
    *("<IMG_CONTEXT>", "<end_of_utterance>", "<image>"),
    *("[INST]", "[/INST]", "[IMG]", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>"),
)
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATES: dict[str, tuple[dict[str, str], str | None, tuple[str, ...]]] = {
    "LLAMA2": (NAMES, None, ("system",)),
    "LLAMA3": (LLAMA3, None, ()),
    "LLAMA3_VISION": (LLAMA3, "<|image|>", ()),
    "QWEN2_5": (CHATML, None, ()),
    "QWEN2_VL": (CHATML, VISION, ()),
    "ARIA": (CHATML, "<fim_prefix><|img|><fim_suffix>", ()),
    "MISTRAL": (NAMES, None, ()),
    "PIXTRAL": (NAMES, "[IMG]", ()),
    "GEMMA": (NAMES, None, ()),
    "ZEPHYR": (NAMES, None, ()),
    "OLMO2": ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, None, ("end",)),
    "VICUNA": (NAMES, None, ()),
    "INTERNVL": (CHATML, "<IMG_CONTEXT>", ()),
    "IDEFICS3": ({"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}, "<image>", ()),
}
"""Names of the special tokens, the text of an image, and what the template is known not to express."""
IMAGE = {"type": "image"}


def turns(*contents: Any, system: str | None = None) -> list[dict[str, Any]]:
    roles = [*(["system"] if system else []), *["user", "assistant"] * len(contents)]
    return [
        {"role": r, "content": c} for r, c in zip(roles, ([system] if system else []) + list(contents), strict=False)
    ]


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "a question": (turns("Why?"), True),
    "five turns": (turns("Why? {a}", "So: </x>", "And\n\nthen?", "No.", "Oh"), True),
    "a document": (turns("Why?", "Because.", "Really?", "Yes"), False),
    "white space": (turns("  Why?\n", "\n Because. ", "And?"), True),
    "a system turn": (turns("Why?", "So.", "And?", system="Be brief."), True),
    "an image": (turns([IMAGE, {"type": "text", "text": "What?"}], "A cat.", "Why?"), True),
    "a late image": (turns("Hello", "Hi.", [IMAGE, IMAGE, {"type": "text", "text": "What?"}]), True),
}


def theirs(source: str, messages: list[dict[str, Any]], prompt: bool, names: dict[str, str], listed: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    if listed:
        as_list = lambda c: c if isinstance(c, list) else [{"type": "text", "text": c}]  # noqa: E731
        messages = [{**turn, "content": as_list(turn["content"])} for turn in messages]
    return render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **names)[0][0]


def ours(template: DialogueTemplate, messages: list[dict[str, Any]], prompt: bool, end: str, image: str | None) -> str:
    count = sum(item["type"] == "image" for t in messages if isinstance(t["content"], list) for item in t["content"])
    sample = Sample(tuple(ImagePart(b"", f"{n}.png") for n in range(count)), {"messages": messages})
    text = ""
    for piece in template.prompt(sample) if prompt else template.pieces(sample, None):
        match piece:
            case TextPiece():
                text += piece.text
            case TokenPiece():
                text += piece.name
            case EndPiece():
                text += end
            case ImagePart():
                text += image or "none"
    return text


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_derived_template_writes_what_the_program_writes(name: str) -> None:
    names, image, lacking = TEMPLATES[name]
    source = getattr(chat_templates, name)
    found = derive_format(source, names, ADDED, image)
    assert found.template is not None
    assert [about for about, note in chat_template._NOTES.items() if note in found.notes] == list(lacking)
    template = DialogueTemplate.model_validate(found.template)
    assert all(token in ADDED for token in template.special_tokens)
    compared = 0
    for kind, (messages, prompt) in CONVERSATIONS.items():
        if ("image" in kind and image is None) or ("system" in kind and "system" in lacking):
            continue
        if not prompt and "end" in lacking:
            continue
        try:
            expected = theirs(source, messages, prompt, names, listed=image is not None)
        except Exception:  # Gemma has no system turns.
            with pytest.raises(SampleError):
                ours(template, messages, prompt, names["eos_token"], image)
            continue
        begin = names.get("bos_token", "") if found.begins else ""
        assert begin + ours(template, messages, prompt, names["eos_token"], image) == expected, kind
        compared += 1
    assert compared >= 3


def test_a_known_format_keeps_its_name() -> None:
    qwen = derive_format(chat_templates.QWEN2_5, CHATML, ADDED)
    assert qwen.template is not None
    assert (qwen.template["format"], qwen.template["system"][:12]) == ("chatml", "You are Qwen")
    qwen3 = derive_format(chat_templates.QWEN3, CHATML, ADDED)
    assert qwen3.template == {"kind": "dialogue", "format": "chatml", "joined": True}
    assert [note.partition(" has ")[0] for note in qwen3.notes] == ["a conversation that ends with an answer"]
    gemma = derive_format(chat_templates.GEMMA, NAMES, ADDED)
    assert gemma.template == {"kind": "dialogue", "format": "gemma", "joined": True}
    # If the tokenizer has no such tokens, the names are plain text.
    plain = derive_format(chat_templates.QWEN2_5, CHATML, ("<|im_end|>",))
    assert plain.template is not None
    assert plain.template["special_tokens"] == ["<|im_end|>"]


def test_what_cannot_be_expressed_is_said() -> None:
    dated = derive_format(chat_templates.LLAMA3_DATED, LLAMA3, ADDED)
    assert dated.template is not None
    assert "writes the current date" in dated.notes[0]
    thinking = derive_format(chat_templates.THINKING, CHATML, ADDED)
    assert thinking.template is None
    assert "what it writes before an answer differs from the prompt" in thinking.notes[0]
    llava = derive_format(chat_templates.LLAVA, NAMES, ADDED, "<image>")
    assert llava.notes == (chat_template._NOTES["order"],)
    around = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
    assert not derive_format(chat_templates.QWEN2_VL, CHATML, ADDED, *around).notes
    counted = chat_templates.QWEN2_VL.replace("+ 1 %}<|vision_start|>", "+ 1 %}{{ video_count.value }}<|vision_start|>")
    assert derive_format(counted, CHATML, ADDED, *around).notes == (chat_template._NOTES["video"],)
    below = chat_templates.INTERNVL.replace("'<IMG_CONTEXT>", "'Picture ' ~ loop.index ~ ': <IMG_CONTEXT>")
    numbered = derive_format(below, CHATML, ADDED, "<IMG_CONTEXT>")
    assert chat_template._NOTES["image"] in numbered.notes


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}{{ messages | length }}",
        "{% if %}",
        "no turn at all",
    ],
)
def test_a_hostile_template_ends_and_writes_nothing(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 3)
    found = derive_format(source, NAMES, ADDED)
    assert found.template is None
    assert found.notes[0].startswith("the chat template cannot be expressed")
