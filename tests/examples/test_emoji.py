"""The bundled data set: two builds give equal bytes, and held-out concepts and styles are not in training data."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from data_pipeline.io.checksums import sha256_of
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.templates.base import images_of

EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji"
SHARDS = EMOJI / "shards"
TRAINED = ("train", "train-quick", "train-text", "train-interleaved", "train-dialogues")
LANGUAGES = ("de", "es", "fr", "it", "ja", "pt", "ru", "zh")


def unseen(code: str) -> bool:
    """Apply the hold-out rule of the README."""
    return int(hashlib.sha256(code.encode()).hexdigest()[:16], 16) < 0.1 * 2**64


def records(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (key, JSON) of each sample; the JSON of a text-only sample is empty."""
    manifest, found = Manifest.open(SHARDS / f"{name}.manifest"), []
    for number in range(manifest.num_shards):
        index = manifest.open_index(number)
        data = index.tar_path.read_bytes()
        for i in range(len(index)):
            texts = [data[m.offset : m.offset + m.size] for m in index.row(i).members if m.ext == "json"]
            found.append((index.row(i).key, json.loads(texts[0]) if texts else {}))
    return found


def test_what_is_committed_is_what_was_built() -> None:
    recorded = dict(reversed(line.split("  ")) for line in (EMOJI / "SHA256SUMS").read_text().splitlines())
    found = {f"shards/{path.name}": sha256_of(path) for path in SHARDS.iterdir()}
    found["tokenizer.model"] = sha256_of(EMOJI / "tokenizer.model")
    assert found == recorded
    assert sum(path.stat().st_size for path in SHARDS.iterdir()) < 24e6


def test_styles_and_concepts_are_held_out() -> None:
    trained = [fields for name in ("train", "train-quick") for _, fields in records(name)]
    assert {fields["style"] for fields in trained} == {"twitter", "fluent-3d", "fluent-flat", "openmoji"}
    assert not any(unseen(fields["concept"]) for fields in trained)
    for name in ("train-interleaved", "train-dialogues"):
        codes = {code for _, fields in records(name) for code in fields["concepts"]}
        assert codes
        assert not any(unseen(code) for code in codes)
    for name, styles, hidden in [
        ("heldout-style", {"google"}, False),
        ("heldout-style-quick", {"google"}, False),
        ("heldout-concept", {"twitter", "fluent-3d", "fluent-flat", "openmoji"}, True),
        ("heldout-both", {"google"}, True),
    ]:
        fields = [fields for _, fields in records(name)]
        assert {entry["style"] for entry in fields} == styles
        assert {unseen(entry["concept"]) for entry in fields} == {hidden}


def test_no_text_document_defines_an_unseen_concept() -> None:
    names = {fields["name"] for _, fields in records("heldout-concept")}
    manifest = Manifest.open(SHARDS / "train-text.manifest")
    lines = manifest.shard_path(0).read_bytes().decode(errors="replace").splitlines()
    defined = {line.split(":")[0].removeprefix("a ").removeprefix("an ") for line in lines if ": " in line}
    assert len(defined) > 1000
    assert not defined & names


def test_quick_concepts_come_in_every_style_and_are_the_held_out_ones() -> None:
    styles: dict[str, set[str]] = defaultdict(set)
    for _, fields in records("train-quick"):
        styles[fields["concept"]].add(fields["style"])
    assert len(styles) == 256
    assert all(len(found) == 4 for found in styles.values())
    assert {fields["concept"] for _, fields in records("heldout-style-quick")} == set(styles)


def test_dialogues_name_the_pictures_they_show() -> None:
    pictures = {sample.provenance.key: sample for sample in read_samples(SHARDS / "train-quick.manifest")}
    several = []
    for sample in read_samples(SHARDS / "train-dialogues.manifest"):
        codes, style = sample.fields["concepts"], sample.fields["style"]
        shown = [pictures[f"{code.lower()}-{style}"] for code in codes]
        assert [part.data for part in images_of(sample)] == [part.data for one in shown for part in images_of(one)]
        said = [turn["content"] for turn in sample.fields["messages"]]
        named = [said[number + 1] for number, words in enumerate(said) if words.startswith("<image>\n")]
        assert [re.sub("^an? ", "", name) for name in named] == [one.fields["name"] for one in shown]
        alone = [entry["messages"][1]["content"] for entry in sample.fields["annotations"]]
        assert {(" and ".join(named), one.fields["group"], one.fields["subgroup"]) for one in shown} == {tuple(alone)}
        several.append(len(shown))
    assert (len(several), set(several)) == (40, {1, 2})


def test_names_are_unique_and_a_fifth_speaks_other_languages() -> None:
    fields = [entry for name in ("heldout-style", "heldout-both") for _, entry in records(name)]
    names = [entry["name"] for entry in fields]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() == entry["captions"][0] for name, entry in zip(names, fields, strict=True))
    share = sum("names" in entry for entry in fields) / len(fields)
    assert 0.15 < share < 0.25
    assert all(len(entry["captions"]) == len(set(entry["captions"])) >= 3 for entry in fields)


def test_licences_are_whole() -> None:
    texts = {path.name: path.read_text() for path in (EMOJI / "LICENSES").iterdir()}
    attribution = (EMOJI / "ATTRIBUTION.md").read_text()
    assert all(f"LICENSES/{name}" in attribution for name in texts)
    assert "Attribution-ShareAlike 4.0 International" in texts["CC-BY-SA-4.0.txt"]
    assert "Attribution 4.0 International" in texts["CC-BY-4.0.txt"]
    assert "Apache License" in texts["Apache-2.0.txt"]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Write forty invented emoji in the layout of the six npm packages."""
    root, codes = tmp_path / "packages", [f"1F{i:03X}" for i in range(40)] + ["26F0-FE0F"]
    labels = {
        code: {
            "label": f"Thing {i} {'abcdefgh'[i % 8] * 3}",
            "hexcode": code,
            "group": 1,
            "subgroup": i % 3,
            "tags": ["t", "u"],
        }
        for i, code in enumerate(codes)
    }
    folders = {
        "emoji-datasource-twitter-16.0.0/img/twitter/64": "png",
        "emoji-datasource-google-16.0.0/img/google/64": "png",
        "lobehub-fluent-emoji-3d-1.1.0/assets": "webp",
        "lobehub-fluent-emoji-flat-1.1.0/assets": "svg",
        "openmoji-17.0.0/color/svg": "svg",
    }
    for number, (folder, ext) in enumerate(folders.items()):
        (root / folder).mkdir(parents=True)
        for i, code in enumerate(codes):
            draw_picture(root / folder / f"{code.lower()}.{ext}", i, number)
    listing = [{"unified": code, "category": "Objects"} for code in codes]
    (root / "emoji-datasource-twitter-16.0.0" / "emoji.json").write_text(json.dumps(listing))
    data = root / "emojibase-data-17.0.0"
    for language in ("en", *LANGUAGES):
        (data / language).mkdir(parents=True)
        (data / language / "data.json").write_text(json.dumps(list(labels.values())))
    messages = {
        "groups": [{"order": 1, "message": "objects"}],
        "subgroups": [{"order": i, "message": f"kind {i}"} for i in range(3)],
    }
    (data / "en" / "messages.json").write_text(json.dumps(messages))
    return root


def draw_picture(path: Path, shade: int, corner: int) -> None:
    if path.suffix == ".svg":
        circle = f'<circle cx="40" cy="{30 + corner}" r="{10 + shade % 20}" fill="#{shade * 6:02x}8040"/>'
        path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{circle}</svg>')
        return
    image = Image.new("RGBA", (64, 64) if path.suffix == ".png" else (256, 256))
    ImageDraw.Draw(image).ellipse((5, 5 + corner, 50, 30 + shade), fill=(shade * 6, 80, 90, 255))
    image.save(path)


def test_the_build_gives_equal_bytes_twice(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EMOJI))
    import build  # type: ignore[import-not-found]

    contents = []
    for run in ("one", "two"):
        folder = tmp_path / run
        build.build(packages, folder / "shards", folder / "tokenizer.model", num_quick=6, vocab_size=300)
        contents.append({path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    assert {f"{name}.manifest" for name in (*TRAINED, "heldout-style", "heldout-concept", "heldout-both")} <= set(
        contents[0]
    )
    quick = Manifest.open(tmp_path / "one" / "shards" / "train-quick.manifest")
    assert quick.num_samples == 24
    for name in ("build", "emoji_concepts", "emoji_pictures", "emoji_wording"):
        sys.modules.pop(name, None)
