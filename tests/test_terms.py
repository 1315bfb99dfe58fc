"""The project's own terms: the glossary lists few, the code uses them, and retired names do not return."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.test_house import CODE, REPO

MAX_TERMS = 25
RETIRED = {
    r"null[ _](document|pack)": "dummy document",
    r"\bledger": "sample log",
    r"\b(whereabouts|sighting)": "sample lookup, occurrence",
    r"\bviews?_(start|end)\b|\bViewPlace\b|\btypical_view\b": "crop",
    r"\b(Parcel|Outbox|Inbox)\b": "BatchMessage, BatchSender, BatchReceiver",
    r"\b(twin|twins)\b": "reference model (tests), smoke-test run (shrink)",
    r"\b(Outline|read_outline|outlines?)\b": "document plan",
    r"\bSampleDraws\b": "Rng, SampleRng",
    r"\b(agree|highest|sum_float|first_complaint)\(": "any_rank, all_reduce_max, all_reduce_sum, lowest_rank_error",
    r"\binsertion_layers\b": "cross_attention_layers",
    r"\bcheckpoint[./]foreign\b": "checkpoint.imports",
    r"\b(RunTrace|StepTrace|TracePage)\b": "SampleLookup, StepSamples, StepPage",
    r"\b(doomed|obey|nursery|crew)\b": "a standard term",
}
"""Patterns of former names, and the present ones."""
EXEMPT = ("CHANGELOG.md", "mmscale/config/validate.py", "data_pipeline/loader/fingerprint.py", "tests/test_terms.py")
"""The changelog; two tables that map former names for users; this list."""
SAYS_A_FORMER_KEY = ("tests/config/test_load.py",)


def glossary() -> list[str]:
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("\n## Glossary\n")[1].split("\n## ")[0]
    return re.findall(r"^\| ([a-z ]+) \|", table, re.MULTILINE)[1:]


def text_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [name for name in listed if name.endswith((".py", ".md", ".yaml", ".yml", ".toml", ".jinja", "Makefile"))]


def test_the_glossary_is_short_and_its_terms_are_used() -> None:
    terms = glossary()
    assert 10 <= len(terms) <= MAX_TERMS
    code = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    for term in terms:
        first, *rest = term.split()
        pattern = rf"\b{first}{''.join(rf'[ _]?{word}' for word in rest)}"
        assert len(re.findall(pattern, code, re.IGNORECASE)) >= 3, term


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_name_does_not_return(pattern: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in text_files()
        if name not in EXEMPT + SAYS_A_FORMER_KEY
        for number, line in enumerate((REPO / name).read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == [], f"write {RETIRED[pattern]}"
