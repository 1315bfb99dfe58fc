"""Chat formats of published models, as values of the keys of a dialogue template.

Each format reproduces the model's own template for turns of text, without a default system turn, the date or tools.
``tests/data_pipeline/text/templates/test_chat_formats.py`` compares them with the models' templates.
"""

from __future__ import annotations

from typing import Any


def _delimited(before: str, between: str, after: str, answers_as: str = "assistant") -> dict[str, Any]:
    """Return roles whose turns have the form ``before ROLE between TEXT after``."""
    names = {"system": "system", "user": "user", "assistant": answers_as}
    roles = {role: {"prefix": f"{before}{name}{between}", "suffix": after} for role, name in names.items()}
    return {**roles, "assistant": {**roles["assistant"], "weight": 1.0}}


CHAT_FORMATS: dict[str, dict[str, Any]] = {
    "vicuna": {
        "roles": {
            "system": {"suffix": " "},
            "user": {"prefix": "USER: ", "suffix": " "},
            "assistant": {"prefix": "ASSISTANT: ", "weight": 1.0},
        },
    },
    "chatml": {
        "roles": _delimited("<|im_start|>", "\n", "<|im_end|>\n"),
        "special_tokens": ("<|im_start|>", "<|im_end|>"),
        "end": "none",
    },
    "llama3": {
        "roles": _delimited("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
        "special_tokens": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "end": "none",
        "strip": True,
    },
    "mistral": {
        "roles": {
            "system": {"prefix": "[SYSTEM_PROMPT]", "suffix": "[/SYSTEM_PROMPT]"},
            "user": {"prefix": "[INST]", "suffix": "[/INST]"},
            "assistant": {"weight": 1.0},
        },
        "special_tokens": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    },
    "gemma": {
        "roles": {
            role: turn
            for role, turn in _delimited("<start_of_turn>", "\n", "<end_of_turn>\n", answers_as="model").items()
            if role != "system"
        },
        "special_tokens": ("<start_of_turn>", "<end_of_turn>"),
        "end": "none",
        "strip": True,
    },
    "phi4": {
        "roles": _delimited("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "special_tokens": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "end": "none",
    },
}
"""Chat formats by name.

Sources: Vicuna 1.1 as in LLaVA-1.5 (arXiv 2310.03744); ChatML as in Qwen2; Llama 3 Instruct; Mistral's V7-Tekken
(Mistral Small 3.1); Gemma 2, which has no system turn; Phi-4.
"""
