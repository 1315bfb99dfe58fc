"""Languages of sentences that name their language, and scripts compared with Unicode's names of characters."""

from __future__ import annotations

import unicodedata

import pytest

from data_pipeline.prepare.stats import languages
from data_pipeline.prepare.stats.languages import detect, has_identifier, script_of, writes_spaces

SENTENCES = {
    "de": "Ein roter Apfel liegt auf dem Tisch neben dem Fenster.",
    "en": "A man is riding a wave on top of a surfboard.",
    "es": "El perro corre por la calle mientras los niños miran.",
    "fr": "La maison est grande et belle, et le jardin est plein de fleurs.",
    "ru": "Маленькая девочка сидит на скамейке и читает книгу.",
    "uk": "Маленька дівчинка сидить на лавці та читає книжку.",
    "ja": "東京の空は青い",
    "zh": "东京的天空是蓝色的",
    "ko": "고양이가 의자 위에서 자고 있다",
    "th": "แมวกำลังนอนอยู่บนเก้าอี้",
    "el": "η γάτα κοιμάται στην καρέκλα",
    "hi": "बिल्ली कुर्सी पर सो रही है और बच्चा देख रहा है",
}


@pytest.mark.skipif(not has_identifier(), reason="py3langid is not installed")
@pytest.mark.parametrize(("language", "text"), SENTENCES.items())
def test_sentences_are_recognised(language: str, text: str) -> None:
    assert detect(text) == language


def test_without_the_identifier_only_scripts_are_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "_identifier", lambda: None)
    assert {detect(SENTENCES[name]) for name in ("de", "en", "es", "fr")} == {"und-Latn"}
    assert detect(SENTENCES["ru"]) == "und-Cyrl"
    assert detect(SENTENCES["ja"]) == "ja"


@pytest.mark.parametrize("text", ["", " ", "123 :-) 🍎", "\ud800", "\0"])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert (script_of(text), detect(text)) == ("Zyyy", "und")


def test_a_word_too_short_to_tell_is_left_open() -> None:
    assert detect("hm") == "und-Latn"


def test_scripts_are_those_of_unicodes_names() -> None:
    """Every named letter of the basic plane that the table assigns to a script has the script in its name."""
    names = {
        "LATIN": "Latn", "CYRILLIC": "Cyrl", "GREEK": "Grek", "HEBREW": "Hebr", "ARABIC": "Arab", "THAI": "Thai",
        "DEVANAGARI": "Deva", "BENGALI": "Beng", "TAMIL": "Taml", "GEORGIAN": "Geor", "ARMENIAN": "Armn",
        "HANGUL": "Hang", "HIRAGANA": "Hira", "KATAKANA": "Hira", "ETHIOPIC": "Ethi", "KHMER": "Khmr",
        "CJK": "Hani", "LAO": "Laoo", "MYANMAR": "Mymr", "TIBETAN": "Tibt", "TELUGU": "Telu", "KANNADA": "Knda",
    }  # fmt: skip
    checked = 0
    for point in range(0x41, 0xFFFF, 3):
        letter = chr(point)
        first = unicodedata.name(letter, "").partition(" ")[0]
        found = script_of(letter)
        if unicodedata.category(letter) == "Lo" and found != "Zyyy" and first in names:
            assert found == names[first], f"U+{point:04X}"
            checked += 1
    assert checked > 10_000


def test_words_are_counted_where_there_are_spaces() -> None:
    assert writes_spaces("de")
    assert writes_spaces("und-Latn")
    assert not writes_spaces("zh-Hant")
    assert not writes_spaces("ja")
