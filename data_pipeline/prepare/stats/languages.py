"""Detect the language of a text: by its script first, then, with the extra ``stats``, by py3langid.

    text --script_of--> "Hira" "Hang" "Thai" ... one language each --> "ja" "ko" "th"
                        "Latn" "Cyrl" "Arab" "Deva" ... several   --> py3langid, or "und-Latn" if it is unsure

Codes are BCP 47. ``und-Latn`` is an unknown language in Latin letters; ``und`` is a text without letters. Detection is
deterministic and offline: py3langid (BSD) is a naive Bayes model over bytes, contained in its package. Without it,
languages of one script cannot be distinguished and ``has_identifier`` is False; a caller that prints languages must say
so.

Not for: mixed texts. A text gets the script of most of its letters.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Protocol

import numpy as np

MIN_CONFIDENCE = 0.5
"""Least confidence of py3langid for its answer to be used."""

_MAX_CHARACTERS = 2000
"""Characters that are looked at; this is enough to detect a language."""

# First and last code point of the letters of each script (Unicode 15, Blocks.txt). Han is shared; Kana means Japanese.
_BLOCKS: tuple[tuple[int, int, str], ...] = (
    (0x0041, 0x005A, "Latn"),
    (0x0061, 0x007A, "Latn"),
    (0x00AA, 0x00AA, "Latn"),
    (0x00BA, 0x00BA, "Latn"),
    (0x00C0, 0x024F, "Latn"),
    (0x0370, 0x03FF, "Grek"),
    (0x0400, 0x052F, "Cyrl"),
    (0x0531, 0x058F, "Armn"),
    (0x0591, 0x05F4, "Hebr"),
    (0x0620, 0x06FF, "Arab"),
    (0x0750, 0x077F, "Arab"),
    (0x08A0, 0x08FF, "Arab"),
    (0x0900, 0x097F, "Deva"),
    (0x0980, 0x09FF, "Beng"),
    (0x0A00, 0x0A7F, "Guru"),
    (0x0A80, 0x0AFF, "Gujr"),
    (0x0B00, 0x0B7F, "Orya"),
    (0x0B80, 0x0BFF, "Taml"),
    (0x0C00, 0x0C7F, "Telu"),
    (0x0C80, 0x0CFF, "Knda"),
    (0x0D00, 0x0D7F, "Mlym"),
    (0x0D80, 0x0DFF, "Sinh"),
    (0x0E01, 0x0E5B, "Thai"),
    (0x0E80, 0x0EFF, "Laoo"),
    (0x0F00, 0x0FFF, "Tibt"),
    (0x1000, 0x109F, "Mymr"),
    (0x10A0, 0x10FF, "Geor"),
    (0x1100, 0x11FF, "Hang"),
    (0x1200, 0x139F, "Ethi"),
    (0x1780, 0x17FF, "Khmr"),
    (0x1800, 0x18AF, "Mong"),
    (0x1C80, 0x1C8F, "Cyrl"),
    (0x1E00, 0x1EFF, "Latn"),
    (0x1F00, 0x1FFF, "Grek"),
    (0x2DE0, 0x2DFF, "Cyrl"),
    (0x3041, 0x30FF, "Hira"),
    (0x3105, 0x312F, "Bopo"),
    (0x3131, 0x318E, "Hang"),
    (0x31F0, 0x31FF, "Hira"),
    (0x3400, 0x4DBF, "Hani"),
    (0x4E00, 0x9FFF, "Hani"),
    (0xA640, 0xA69F, "Cyrl"),
    (0xAC00, 0xD7AF, "Hang"),
    (0xF900, 0xFAFF, "Hani"),
    (0xFB50, 0xFDFF, "Arab"),
    (0xFE70, 0xFEFC, "Arab"),
    (0xFF21, 0xFF3A, "Latn"),
    (0xFF41, 0xFF5A, "Latn"),
    (0xFF66, 0xFF9D, "Hira"),
    (0x20000, 0x323AF, "Hani"),
)
_FIRST = np.array([first for first, _, _ in _BLOCKS], np.uint32)
_LAST = np.array([last for _, last, _ in _BLOCKS], np.uint32)
_SCRIPTS = sorted({script for _, _, script in _BLOCKS})
_SCRIPT_OF_BLOCK = np.array([_SCRIPTS.index(script) for _, _, script in _BLOCKS])

# Scripts that are used, to a good approximation, by one living language.
_LANGUAGE_OF_SCRIPT = {
    "Armn": "hy", "Geor": "ka", "Grek": "el", "Gujr": "gu", "Guru": "pa", "Hang": "ko", "Hani": "zh", "Hira": "ja",
    "Khmr": "km", "Knda": "kn", "Laoo": "lo", "Mlym": "ml", "Orya": "or", "Sinh": "si", "Taml": "ta", "Telu": "te",
    "Thai": "th", "Tibt": "bo",
}  # fmt: skip
_SPACELESS = frozenset({"bo", "ja", "km", "lo", "my", "th", "yue", "zh"})


class _Identifier(Protocol):
    def classify(self, instance: str) -> tuple[str, float]: ...


def has_identifier() -> bool:
    """Whether languages that share a script can be distinguished (``pip install 'mmscale[stats]'``)."""
    return importlib.util.find_spec("py3langid") is not None


def script_of(text: str) -> str:
    """Return the ISO 15924 code of the script of most letters (``Latn``); ``Zyyy`` for a text without letters.

    A mostly Han text with any Kana is ``Hira``, because Japanese is largely written in Han characters. On a tie the
    alphabetically first code is returned.
    """
    points = np.frombuffer(text[:_MAX_CHARACTERS].encode("utf-32-le", errors="replace"), "<u4")
    block = np.searchsorted(_FIRST, points, side="right") - 1
    inside = (block >= 0) & (points <= _LAST[block])
    counts = np.bincount(_SCRIPT_OF_BLOCK[block[inside]], minlength=len(_SCRIPTS))
    if not counts.any():
        return "Zyyy"
    found = _SCRIPTS[int(counts.argmax())]
    return "Hira" if found == "Hani" and counts[_SCRIPTS.index("Hira")] else found


def detect(text: str) -> str:
    """Return the BCP 47 code of a text's language: ``de``, or ``und-Latn`` if only the script is known, or ``und``."""
    script = script_of(text)
    if script == "Zyyy":
        return "und"
    if script in _LANGUAGE_OF_SCRIPT:
        return _LANGUAGE_OF_SCRIPT[script]
    identifier = _identifier()
    if identifier is not None:
        language, confidence = identifier.classify(text[:_MAX_CHARACTERS])
        if confidence >= MIN_CONFIDENCE:
            return language
    return f"und-{script}"


def writes_spaces(language: str) -> bool:
    """Whether the language separates words by spaces, so that words can be counted."""
    return language.lower().partition("-")[0] not in _SPACELESS


@cache
def _identifier() -> _Identifier | None:
    if not has_identifier():
        return None
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model: _Identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return model
