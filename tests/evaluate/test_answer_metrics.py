"""Metrics of generated answers equal their reference implementations.

Values of lmms-eval 0.7 are stored because it pins other packages than the tests need, and words of the COCO caption
evaluation because its tokenizer needs Java. lm-evaluation-harness, sacrebleu and pycocoevalcap are called.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import pytest

from mmscale.errors import ConfigError
from mmscale.evaluate import answer_metrics
from mmscale.evaluate.answer_metrics import (
    Ignored,
    anls,
    caption_words,
    exact_match,
    relaxed_accuracy,
    score_answers,
    vqa_accuracy,
    vqa_normalise,
)

CAPTIONS = (
    ("A man's dog isn't on the red-brick road.", "a man 's dog is n't on the red-brick road"),
    ('Two cats, one dog; and a "bird"!', "two cats one dog and a bird"),
    ("It cost $3.50 (about 1,000 yen).", "it cost $ 3.50 -lrb- about 1,000 yen -rrb-"),
    ("they're we've I'll you'd I'm can't won't", "they 're we 've i 'll you 'd i 'm ca n't wo n't"),
    ("a black & white cat @ home: 50% off", "a black & white cat @ home 50 % off"),
    ("the U.S. flag waves", "the u.s. flag waves"),
    ("Mr. Smith's car...  parked", "mr. smith 's car parked"),
    ("hello / world -- what? yes!", "hello / world what yes"),
    ("a 3-year-old's toy", "a 3-year-old 's toy"),
    ("café ñandú 猫", "café ñandú 猫"),
    ("the dogs' bowls", "the dogs bowls"),
    ("one's two-tone 12:30 pm", "one 's two-tone 12:30 pm"),
    ("4x4 truck no.2", "4x4 truck no. 2"),
    ("don't stop", "do n't stop"),
    ("", ""),
)
"""Captions and the words of the Penn Treebank tokenizer 3.4.1 with ``-lowerCase``, without punctuation."""


@pytest.mark.parametrize("ignore", [(), ("case",), ("punctuation",), ("case", "punctuation")], ids=str)
def test_exact_match_is_that_of_lm_evaluation_harness(ignore: tuple[Ignored, ...]) -> None:
    harness = pytest.importorskip("lm_eval.api.metrics").exact_match_hf_evaluate
    rng = random.Random(3)
    words = ["A cat", "a cat", "a cat.", "a, cat", "A CAT!", "cat", "Ünï", "ünï", "it's"]
    pairs = [(rng.choice(words), rng.choice(words)) for _ in range(200)]
    for answer, right in pairs:
        expected = harness(
            predictions=[answer],
            references=[right],
            ignore_case="case" in ignore,
            ignore_punctuation="punctuation" in ignore,
        )["exact_match"]
        assert exact_match(answer, [right], ignore) == expected, (answer, right)


def test_exact_match_with_all_rules_is_that_of_squad() -> None:
    every: tuple[Ignored, ...] = ("case", "punctuation", "articles")
    assert exact_match("The  Eiffel-Tower.", ["an eiffeltower"], every) == 1
    assert exact_match("theatre", ["atre"], every) == 0
    assert exact_match("the", [""], every) == 1
    assert exact_match(" a\tb\n", ["x", "a b"]) == 1  # White space never matters.


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("two dogs", {"2 dogs": 3, "two dogs.": 2, "dogs": 5}, 1),
        ("The Red-Car!", {"red car": 2, "red": 8}, 0.6),
        ("yes", {"yes": 10}, 1),
        ("dont know", {"don't know": 1, "no": 9}, 0.3),
        ("1,000", {"1000": 4, "1,000": 1, "none": 5}, 1),
        ("none", {"0": 2, "zero": 1, "none": 1, "3": 6}, 1),
        ("it's\ta cat\n", {"its cat": 1, "it's cat": 2, "cat": 7}, 0.6),
        ("", {"no": 10}, 0),
        ("a/b", {"a b": 6, "b": 4}, 1),
        ("3.5.", {"3.5": 3, "35": 7}, 0.9),
    ],
)
def test_vqa_accuracy_is_that_of_lmms_eval(answer: str, references: dict[str, int], expected: float) -> None:
    listed = [text for text, count in references.items() for _ in range(count)]
    assert vqa_accuracy(answer, listed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("somebody'd yall'll", "somebodyd y'all'll"),
        ("couldnt've an apple", "couldn't've apple"),
        ("ow's'at twas its", "'ow's'at 'twas its"),
        ("well-known; e.g. (two) $4", "well known eg 2 $4"),
        ("Ten, 1,000.50 @home", "10 1000.50 home"),
        ("let's she's isnt hed shed", "let's she's isn't he'd shed"),
    ],
)
def test_vqa_answers_are_normalised_as_in_lmms_eval(text: str, expected: str) -> None:
    assert vqa_normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("the  Coca Cola Company", ["coca cola company"], 0.8181818181818181),
        ("Coca-Cola", ["coca cola", "the coca cola company"], 0.8888888888888888),
        ("1998", ["1989"], 0.5),
        ("yes", ["no"], 0),
        ("abc", ["abxyz"], 0),
        (" a", ["a"], 1),
        ("Ünïcode ß", ["unicode ss", "ÜNÏCODE ß"], 1),
        ("x" * 30, ["x" * 14], 0),
        ("x" * 30, ["x" * 16], 0.5333333333333333),
        ("", [""], 1),
    ],
)
def test_anls_is_that_of_lmms_eval(answer: str, references: list[str], expected: float) -> None:
    assert anls(answer, references) == pytest.approx(expected)


def _fewest_edits(said: Sequence[str], right: Sequence[str]) -> int:
    """Return the edit distance by its definition: the best of all alignments."""
    if not said or not right:
        return len(said) + len(right)
    changed = _fewest_edits(said[1:], right[1:]) + (said[0] != right[0])
    return min(changed, 1 + _fewest_edits(said[1:], right), 1 + _fewest_edits(said, right[1:]))


def test_word_accuracy_counts_edits_of_the_whole_set() -> None:
    answers = ["Two red ants.", "", "nine nine", "one fly the of", "a b c"]
    references = [["two ants"], ["seven whale"], ["nine"], ["one two fly of"], ["x", "a b d"]]
    chosen = [texts[-1] for texts in references]
    edits = [
        _fewest_edits(said.lower().replace(".", "").split(), right.split())
        for said, right in zip(answers, chosen, strict=True)
    ]
    words = [len(text.split()) for text in chosen]
    assert edits == [1, 2, 1, 2, 1]
    found = score_answers("wer", answers, references, ())
    assert found.score == pytest.approx(1 - sum(edits) / sum(words))
    assert found.each == pytest.approx([1 - edit / count for edit, count in zip(edits, words, strict=True)])
    residuals = [edit - sum(edits) / sum(words) * count for edit, count in zip(edits, words, strict=True)]
    assert found.error == pytest.approx((5 / 4 * sum(one**2 for one in residuals)) ** 0.5 / sum(words))
    assert score_answers("wer", ["a b c d"], [["x"]], ()).score == 0


def test_anls_of_a_hostile_length_takes_no_time() -> None:
    assert anls("a" * 2_000, ["b" * 5_000_000]) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("10", "10.5", 1), ("10", "10.6", 0), ("12%", "0.12", 1), ("0.125", "12%", 1), ("0.127", "12%", 0),
        ("0", "0", 1), ("0.0", "0", 0), ("Yes", "yes", 1), ("yes.", "yes", 0), ("-5", "5", 0), ("1e3", "1000", 1),
        ("nan", "1", 0), ("inf", "1", 0), ("5%%", "0.05", 1), ("3,000", "3000", 0), ("%", "1", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy_is_that_of_lmms_eval(answer: str, reference: str, expected: float) -> None:
    assert relaxed_accuracy(answer, [reference]) == expected
    assert relaxed_accuracy(f" {answer} ", ["x", reference]) == expected


def test_chrf_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["a red cat", "the dog barks", "no", "it is raining"]
    references = [["a red cat"], ["the dogs bark", "a dog barks"], ["yes"], ["it rains", "rain", "it is raining now"]]
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(3)]
    found = score_answers("chrf", answers, references, ())
    assert found.score == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score / 100)
    each = [sacrebleu.sentence_chrf(a, r).score / 100 for a, r in zip(answers, references, strict=True)]
    assert found.each == pytest.approx(each)
    assert score_answers("chrf", answers, references, ()) == found
    assert score_answers("chrf", ["", ""], [["a"], ["b"]], ()).score == pytest.approx(0, abs=1e-9)


def test_the_error_of_chrf_is_the_spread_over_samples_drawn_again() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(1)
    right = ["".join(rng.choices("abc ", k=12)) for _ in range(24)]
    answers = ["".join(rng.choices("abc ", k=12)) if rng.random() < 0.5 else text for text in right]
    drawn = [rng.choices(range(24), k=24) for _ in range(150)]
    scores = [sacrebleu.corpus_chrf([answers[i] for i in row], [[right[i] for i in row]]).score / 100 for row in drawn]
    found = score_answers("chrf", answers, [[text] for text in right], ())
    assert found.error == pytest.approx(statistics.stdev(scores), rel=0.25)


@pytest.mark.parametrize(("caption", "words"), CAPTIONS)
def test_words_of_captions_are_those_of_the_treebank_tokenizer(caption: str, words: str) -> None:
    assert caption_words(caption) == words


def test_cider_is_that_of_the_coco_evaluation() -> None:
    """The expected values come from the package with its own Java tokenizer."""
    pytest.importorskip("pycocoevalcap")
    answers = [
        "A man's dog isn't on the red-brick road.", "a black & white cat", "the U.S. flag (waving) at 12:30",
        'two cats, one dog; and a "bird"!', "",
    ]  # fmt: skip
    references = [
        ["A dog on the red-brick road.", "a man's dog stands on a road"],
        ["a black and white cat sits", "the black & white cat"],
        ["a flag of the U.S. (waving)"],
        ["two cats and one dog", "Two cats, a dog, one bird."],
        ["it costs $3.50", "It's cheap..."],
    ]
    expected = [3.526638784, 5.069554416, 3.4224983, 2.959342577, 0.0]
    found = score_answers("cider", answers, references, ())
    assert found.each == pytest.approx(expected)
    assert found.score == pytest.approx(sum(expected) / 5)
    assert found.error == pytest.approx(statistics.stdev(expected) / 5**0.5)


def test_a_metric_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(answer_metrics._PACKAGES, "chrf", "no_such_package")
    with pytest.raises(ConfigError, match=r"metric=chrf: needs the package .*pip install 'mmscale\[eval\]'"):
        score_answers("chrf", ["a"], [["a"]], ())
