"""Compare generated answers with reference answers.

    answers, references of each sample --metric--> a value per sample, their mean or corpus value, its standard error

Values are between 0 and 1, except those of CIDEr, which are between 0 and 10. ``chrf`` and ``cider`` need the packages
of the extra ``eval``; the other formulas are short and written here. Every metric is deterministic.
"""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from mmscale.errors import ConfigError

MetricName = Literal["exact_match", "vqa", "anls", "relaxed_accuracy", "wer", "chrf", "cider"]
Ignored = Literal["case", "punctuation", "articles"]

TITLES: dict[str, str] = {
    "exact_match": "exact match",
    "vqa": "VQA accuracy",
    "anls": "ANLS",
    "relaxed_accuracy": "relaxed accuracy",
    "wer": "word accuracy (1 - WER)",
    "chrf": "chrF",
    "cider": "CIDEr",
}
LEAST_REFERENCES = {"vqa": 4}
"""Fewest reference answers of a sample, where a metric needs more than one."""

_PACKAGES = {"chrf": "sacrebleu", "cider": "pycocoevalcap"}
_BOOTSTRAP_SAMPLES = 200


@dataclass(frozen=True)
class MetricValues:
    """Value of the whole set, its standard error, and the value of each sample."""

    score: float
    error: float
    each: tuple[float, ...]


def require_metric(metric: MetricName) -> None:
    """Check that the package of a metric is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    package = _PACKAGES.get(metric)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"metric={metric}: needs the package {package}; install it with: pip install 'mmscale[eval]'")


def score_answers(
    metric: MetricName, answers: Sequence[str], references: Sequence[Sequence[str]], ignore: Collection[Ignored]
) -> MetricValues:
    """Score the answers of a set.

    Args:
        metric: The metric.
        answers: One answer per sample.
        references: The reference answers of each sample, at least one (``LEAST_REFERENCES``).
        ignore: Differences that ``exact_match`` ignores; other metrics do not use it.

    Raises:
        ConfigError: the package of the metric is not installed.
    """
    require_metric(metric)
    if metric == "chrf":
        return _chrf(answers, references)
    if metric == "wer":
        return word_accuracy(answers, references)
    if metric == "cider":
        return _mean(_cider(answers, references))
    functions: dict[str, Callable[[str, Sequence[str]], float]] = {
        "exact_match": lambda answer, right: exact_match(answer, right, ignore),
        "vqa": vqa_accuracy,
        "anls": anls,
        "relaxed_accuracy": relaxed_accuracy,
    }
    return _mean([functions[metric](answer, right) for answer, right in zip(answers, references, strict=True)])


def _mean(values: Sequence[float]) -> MetricValues:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return MetricValues(statistics.fmean(values), error, tuple(values))


def exact_match(answer: str, references: Sequence[str], ignore: Collection[Ignored] = ()) -> float:
    """Return 1 if the answer equals a reference, else 0. The amount and the kind of white space never matter.

    ``ignore`` with ``case`` and ``punctuation`` ignores what lm-evaluation-harness calls ``ignore_case`` and
    ``ignore_punctuation``. All three together are the normalisation of SQuAD.
    """
    return float(any(_plain(answer, ignore) == _plain(reference, ignore) for reference in references))


def _plain(text: str, ignore: Collection[Ignored]) -> str:
    if "case" in ignore:
        text = text.lower()
    if "punctuation" in ignore:
        text = text.translate(_NO_PUNCTUATION)
    if "articles" in ignore:
        text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy of VQAv2: the mean, over the references, of min(1, equal *other* references / 3).

    Answer and references are normalised first, as in lmms-eval. The official script leaves them as they are if all
    references are equal.

    Source: Antol et al. 2015, "VQA: Visual question answering"; evaluation code of visualqa.org.
    """
    wanted = vqa_normalise(answer)
    equal = sum(vqa_normalise(reference) == wanted for reference in references)
    others = len(references) - equal
    return (equal * min(1.0, (equal - 1) / 3) + others * min(1.0, equal / 3)) / len(references)


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_VQA_WORDS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
}
"""Replacements of words. The official table has contractions with one apostrophe missing."""
_VQA_WORDS |= {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_VQA_WORDS["somebody'd"] = "somebodyd"  # As in the official table, in which this entry is the wrong way round.


def vqa_normalise(text: str) -> str:
    """Return an answer in lower case without punctuation and articles, numbers up to ten as digits."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma = re.search(r"(?<=\d),+(?=\d)", text) is not None
    out = text
    for mark in _VQA_PUNCTUATION:
        joins = not (f"{mark} " in text or f" {mark}" in text or has_comma)
        out = out.replace(mark, " " if joins else "")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # 32 as in the official code, which passes a flag as the count.
    words = [_VQA_WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def anls(answer: str, references: Sequence[str]) -> float:
    """Return the largest normalised Levenshtein similarity to a reference, or 0 if it is below 0.5.

    Case and the amount of white space do not matter. As in the official script, the similarity is divided by the length
    before white space is normalised.

    Source: Biten et al. 2019, "Scene text visual question answering", equation 1 (threshold 0.5).
    """
    best = max(_similarity(answer, reference) for reference in references)
    return best if best >= 0.5 else 0.0


def _similarity(answer: str, reference: str) -> float:
    length = max(len(answer.upper()), len(reference.upper()))
    if not length:
        return 1.0
    a, b = (" ".join(text.lower().split()) for text in (answer, reference))
    # The distance is at least the difference of the lengths: do not compute it for texts that cannot be similar.
    return 0.0 if abs(len(a) - len(b)) > length / 2 else 1 - _levenshtein(a, b) / length


def _levenshtein(a: Sequence[str], b: Sequence[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer is within 5 % of a reference number, or equals a reference text apart from case; else 0.

    Source: ChartQA (arXiv 2203.10244), section 5.1; code of Qwen-VL, where ``12%`` is 0.12 and a reference of zero is
    compared as text.
    """
    return float(any(_relaxed(answer.strip(), reference.strip()) for reference in references))


def _relaxed(answer: str, reference: str) -> bool:
    found, expected = _number(answer), _number(reference)
    if found is not None and expected:
        return abs(found - expected) / abs(expected) <= 0.05
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def word_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> MetricValues:
    """Return 1 minus the word error rate of a set of transcripts, and 0 if more than every word is wrong.

    The word error rate is the sum over the samples of substituted, deleted and inserted words, over the number of words
    of the references. A sample with several references counts the one with the lowest rate. Case and punctuation do not
    matter. The value of a sample is 1 minus its own rate, at least 0.

    Source: NIST's sclite, as in Whisper (arXiv 2212.04356), section 3.2; the standard error is that of a ratio estimate
    (Cochran 1977, "Sampling techniques", section 2.11).
    """
    edits, words = list[int](), list[int]()
    for answer, right in zip(answers, references, strict=True):
        said = _plain(answer, ("case", "punctuation")).split()
        texts = [_plain(text, ("case", "punctuation")).split() for text in right]
        counts = [(_levenshtein(said, text), max(1, len(text))) for text in texts]
        least = min(counts, key=lambda count: count[0] / count[1])
        edits.append(least[0])
        words.append(least[1])
    rate, n = sum(edits) / sum(words), len(edits)
    squares = sum((edit - rate * count) ** 2 for edit, count in zip(edits, words, strict=True))
    error = (squares * n / max(1, n - 1)) ** 0.5 / sum(words)
    each = tuple(max(0.0, 1 - edit / count) for edit, count in zip(edits, words, strict=True))
    return MetricValues(max(0.0, 1 - rate), error, each)


def _chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> MetricValues:
    """Return chrF2 (character 6-grams) of the corpus, with the standard error of sacrebleu's bootstrap.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation"; sacrebleu's defaults.
    """
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    corpus = metric.corpus_score(list(answers), cast(list[list[str]], streams), n_bootstrap=_BOOTSTRAP_SAMPLES)
    printed = json.loads(corpus.format(width=12, is_json=True, signature=str(metric.get_signature())))
    each = [
        metric.sentence_score(answer, list(right)).score / 100
        for answer, right in zip(answers, references, strict=True)
    ]
    half = printed.get("confidence_var", 0.0) / 100  # Half of the 95 % interval; missing if all samples have 0.
    return MetricValues(corpus.score / 100, half / 1.96, tuple(each))


def _cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D of each answer; document frequencies come from the references.

    Source: Vedantam et al. 2015 (arXiv 1411.5726).
    """
    from pycocoevalcap.cider.cider import Cider

    right = {number: [caption_words(text) for text in texts] for number, texts in enumerate(references)}
    found = {number: [caption_words(answer)] for number, answer in enumerate(answers)}
    _, values = Cider().compute_score(right, found)
    return [float(value) for value in values]


_CAPTION_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "–", "—", "...", "…", ";", '"'])
_CAPTION_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CAPTION_WORD = re.compile(
    r"""
    (?:[a-z]\.){2,}                                      # u.s.
    | (?:mr|mrs|ms|dr|st|no)\.(?=\s*\w)                  # an abbreviation before a word
    | \d+(?:[.,:/]\d+)*(?:[-\w]*\w)?                     # 1,000  3.50  12:30  3-year-old
    | o'[a-z]+                                           # o'clock
    | \w+?(?=n't\b)                                      # is + n't
    | n't\b
    | '(?:s|re|ve|ll|d|m)\b
    | (?:(?!n't\b)\w)+(?:[-/&](?:(?!n't\b)\w)+)*         # red-brick  b/w
    | \.{2,} | -{2,} | [^\w\s]
    """,
    re.VERBOSE,
)


def caption_words(text: str) -> str:
    """Return the words of a caption, separated by spaces, in lower case and without punctuation.

    Follows the Penn Treebank tokenizer of the COCO caption evaluation in what occurs in captions, without its Java
    program: contractions are split, and hyphenated words, decimal numbers and initials are kept. 98 % of 4,000 bundled
    texts give the same words.
    """
    words = _CAPTION_WORD.findall(text.lower().replace("’", "'"))
    return " ".join(_CAPTION_BRACKETS.get(word, word) for word in words if word not in _CAPTION_DROPPED)
