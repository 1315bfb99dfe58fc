"""The samples and templates of docs/data.md and docs/configuration.md fit each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from data_pipeline.config import DatasetConfig
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.text.templates import EndPiece, TemplateConfig, TextPiece

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```(json|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples() -> list[object]:
    """Return each block with a template, paired with each sample of the nearest JSON block above it."""
    found: list[object] = []
    for name in ("data.md", "configuration.md"):
        page, samples = (DOCS / name).read_text(), ""
        for language, block in _BLOCK.findall(page):
            if language == "json":
                samples = block
            elif block.startswith("template:"):
                line = page.count("\n", 0, page.index(block)) + 1
                found += [
                    pytest.param(row, block, id=f"{name}:{line}-{number}")
                    for number, row in enumerate(samples.splitlines())
                ]
    return found


@pytest.mark.parametrize(("row", "block"), examples())
def test_a_template_reads_the_samples_above_it(row: str, block: str) -> None:
    template = TypeAdapter(TemplateConfig).validate_python(yaml.safe_load(block)["template"])
    fields = json.loads(row)
    shown = [part for part in fields.get("parts", []) if "image" in part]
    count = (
        len(shown) or sum(image is not None for image in fields.get("images", [])) or len(fields.get("image_info", []))
    )
    count = count or json.dumps(fields).count("image")
    members = {f"{number}.png": b"" for number in range(count)}
    sample = assemble({**members, "json": row.encode()}, Provenance("d", "s", "k", 0))
    pieces = template.pieces(sample, None)
    assert any(isinstance(piece, TextPiece | EndPiece) and piece.weight for piece in pieces)
    assert sum(type(piece).__name__ == "ImagePart" for piece in pieces) == count


def test_the_drawings_of_the_page_are_valid() -> None:
    blocks = [block for _, block in _BLOCK.findall((DOCS / "data.md").read_text()) if block.startswith("image_tokens:")]
    read = [DatasetConfig.model_validate({"name": "a", "manifest": "a", **yaml.safe_load(block)}) for block in blocks]
    assert [dataset.template.kind for dataset in read] == ["drawing", "drawing"]
    sample = Sample((ImagePart(b"", "png"),), {"caption": "a fox"})
    assert read[1].template.pieces(sample, None)[0] == TextPiece("User: a fox\n\nAssistant:", 0.0)
