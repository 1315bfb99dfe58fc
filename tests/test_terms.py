"""The project's own terms: the glossary lists few, the code uses them, and retired names do not return."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess

import pytest

from tests.test_house import CODE, REPO

MAX_TERMS = 25
RETIRED = {
    "null[ _](document|pack)": "dummy document",
    "ledgers?": "sample log",
    "whereabouts|sightings?": "sample lookup, occurrence",
    "views?_(start|end)|ViewPlace|typical_view": "crop",
    "Parcel|Outbox|Inbox": "BatchMessage, BatchSender, BatchReceiver",
    "twins?": "reference model (tests), smoke-test run (shrink)",
    "Outline|outlines?": "document plan",
    "SampleDraws": "Rng, SampleRng",
    r"\b(agree|highest|sum_float|first_complaint)\(": "any_rank, all_reduce_max, all_reduce_sum, lowest_rank_error",
    "insertion_layers": "cross_attention_layers",
    "checkpoint[./]foreign": "checkpoint.imports",
    "RunTrace|StepTrace|TracePage": "SampleLookup, StepSamples, StepPage",
    "doomed|obey|nursery|crew": "a standard term",
}
"""Patterns of former names, and the present ones. A pattern matches whole words, also between underscores."""
EXEMPT = (
    "CHANGELOG.md",
    "data_pipeline/loader/fingerprint.py",
    "mmscale/config/validate.py",
    "tests/config/test_load.py",
    "tests/test_terms.py",
)
"""Files that map former names to present ones."""


def glossary() -> list[str]:
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("\n## Glossary\n")[1].split("\n## ")[0]
    return re.findall(r"^\| ([a-z ]+) \|", table, re.MULTILINE)[1:]


@functools.cache
def texts() -> dict[str, str]:
    """Return the files of text in the repository by name, without ``EXEMPT``."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return {
        name: (REPO / name).read_text(encoding="utf-8")
        for name in listed
        if name.endswith((".py", ".md", ".yaml", ".yml", ".toml", ".jinja", "Makefile")) and name not in EXEMPT
    }


def test_the_glossary_is_short_and_its_terms_are_used() -> None:
    terms = glossary()
    assert 10 <= len(terms) <= MAX_TERMS
    code = "\n".join(path.read_text(encoding="utf-8") for path in CODE).lower()
    for term in terms:
        first, *rest = term.split()
        pattern = rf"\b{first}{''.join(rf'[ _]?{word}' for word in rest)}"
        assert len([*itertools.islice(re.finditer(pattern, code), 3)]) == 3, term


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_name_does_not_return(pattern: str) -> None:
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for name, text in texts().items()
        for match in re.finditer(pattern, text)
        # Two letters mean that this end of the match is inside a word. Lookarounds in the pattern would be slower.
        if not any(text[end - 1 : end + 1].isalpha() for end in match.span())
    ]
    assert found == [], f"write {RETIRED[pattern]}"
