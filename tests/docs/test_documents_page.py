"""The samples and templates of docs/documents.md fit each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from data_pipeline.sample import Provenance
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.text.templates import EndPiece, TemplateConfig, TextPiece

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "documents.md").read_text()
_BLOCK = re.compile(r"^```(json|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples() -> list[object]:
    """Each template with the samples that stand before it."""
    found, samples = [], ""
    for language, block in _BLOCK.findall(PAGE):
        if language == "json":
            samples = block
        else:
            line = PAGE.count("\n", 0, PAGE.index(block)) + 1
            found += [pytest.param(row, block, id=f"{line}-{i}") for i, row in enumerate(samples.splitlines())]
    return found


@pytest.mark.parametrize(("row", "block"), examples())
def test_a_template_takes_the_samples_above_it(row: str, block: str) -> None:
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
