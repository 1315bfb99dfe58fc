"""Pages in three JSON formats give the same parts; malformed pages raise."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.json_member import all_texts, text_bytes_of
from data_pipeline.prepare.verify import verify_shard
from data_pipeline.sample import ImagePart, Part, Provenance, TextPart
from data_pipeline.shards.damage import Problem
from data_pipeline.shards.index import build_index
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.sample_reader import assemble, read_samples
from data_pipeline.text.templates import EndPiece, InterleavedTemplate, TextPiece
from tests.data_pipeline.conftest import picture

A, B, C = (picture(number) for number in range(3))
MEMBERS = {"0.png": A, "1.png": B, "2.png": C}


def parts(fields: dict[str, Any], members: dict[str, bytes] | None = None, key: str = "000007") -> tuple[Part, ...]:
    members = MEMBERS if members is None else members
    origin = Provenance("x", "shard.tar", key, 0)
    return assemble({**members, "json": json.dumps(fields).encode()}, origin).parts


def plain_parts(found: tuple[Part, ...]) -> list[object]:
    """Return texts as strings and images as their bytes."""
    return [part.data if isinstance(part, ImagePart) else part.text for part in found]


OBELICS = {
    "images": ["https://a/x.jpg", None, "https://a/y.jpg", "https://a/z.jpg", None],
    "texts": [None, "s", None, None, "t"],
}
MMC4 = {
    "text_list": ["one.", "two.", "three."],
    "image_info": [
        {"image_name": "n1.jpg", "matched_text_index": 2},
        {"image_name": "n2.jpg", "matched_text_index": 0},
        {"image_name": "n3.jpg", "matched_text_index": 2},
    ],
}


def test_a_page_of_obelics_takes_its_images_in_their_order() -> None:
    assert plain_parts(parts(OBELICS)) == [A, "s", B, C, "t"]


def test_a_page_of_mmc4_puts_images_before_the_text_they_were_matched_with() -> None:
    # No reference names a member, so members are matched to images in order.
    assert plain_parts(parts(MMC4)) == [A, "one.", "two.", B, C, "three."]
    named = {"n1.jpg": A, "n2.jpg": B, "n3.jpg": C}
    assert plain_parts(parts(MMC4, named)) == [B, "one.", "two.", A, C, "three."]


def test_members_may_be_numbered_by_their_places_on_the_page() -> None:
    members = {"0.png": A, "2.png": B, "3.png": C}
    assert plain_parts(parts(OBELICS, members)) == [A, "s", B, C, "t"]
    turned = {"images": [None, "u", None, "v", "w"], "texts": ["r", None, "s", None, None]}
    assert plain_parts(parts(turned, {"4.png": A, "1.png": B, "3.png": C})) == ["r", B, "s", C, A]


@pytest.mark.fault
@pytest.mark.parametrize(
    "names", [("a.png", "b.png", "c.png"), ("0.png", "1.png", "3.png"), ("0.png", "00.png", "2.png")]
)
def test_members_whose_order_would_be_a_guess_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(SampleError, match="expected one each"):
        parts({"images": ["u", "v", "w"], "texts": [None] * 3}, dict(zip(names, (A, B, C), strict=True)))


def test_an_only_image_needs_no_number() -> None:
    assert plain_parts(parts({"images": ["u", None], "texts": [None, "t"]}, {"jpg": A})) == [A, "t"]


def test_a_url_is_no_name_of_a_member_whatever_it_ends_in() -> None:
    urls = ["https://a.org/1.png", "https://a.org/0.png", "https://b.org/7.png"]
    assert plain_parts(parts({"images": urls, "texts": [None] * 3})) == [A, B, C]


def test_images_may_lie_in_the_json_of_mmc4() -> None:
    info = [{"image_base64": base64.b64encode(B).decode(), "matched_text_index": 0}]
    assert plain_parts(parts({"text_list": ["x"], "image_info": info}, {})) == [B, "x"]


@pytest.mark.parametrize("name", ["1.png", "1.PNG", "000007.1.png", "some/folder/000007.1.png", "other/1.png"])
def test_an_image_is_named_as_its_member_is(name: str) -> None:
    assert plain_parts(parts({"parts": [{"image": name}, {"text": "x"}]})) == [B, "x"]
    assert plain_parts(parts({"images": [name, None], "texts": [None, "x"]})) == [B, "x"]


def test_ten_images_come_by_number_not_by_letter() -> None:
    members = {f"{i}.png": picture(i) for i in reversed(range(11))}
    urls = [f"https://a/{i}" for i in range(11)]
    assert plain_parts(parts({"images": urls, "texts": [None] * 11}, members)) == [picture(i) for i in range(11)]


def test_other_fields_stay_and_the_page_itself_is_no_field() -> None:
    sample = assemble({**MEMBERS, "json": json.dumps({**OBELICS, "url": "u"}).encode()}, Provenance("x", "s", "k", 0))
    assert sample.fields == {"url": "u"}


def test_a_dialogue_with_a_list_of_images_is_no_page() -> None:
    fields = {"images": ["a.jpg"], "messages": []}
    assert plain_parts(parts(fields, {"0.png": A})) == [A]


def test_weights_of_texts() -> None:
    page = {"parts": [{"text": "a", "weight": 0.25}, {"image": "0.png"}, {"text": "b"}, {"text": "c", "weight": 0}]}
    assert [part.weight for part in parts(page) if isinstance(part, TextPart)] == [0.25, 1.0, 0.0]
    sample = assemble({**MEMBERS, "json": json.dumps(page).encode()}, Provenance("x", "s", "k", 0))
    pieces = InterleavedTemplate(separator=" ").pieces(sample, None)
    assert [(p.text, p.weight) for p in pieces if isinstance(p, TextPiece)] == [("a ", 0.25), ("b ", 1.0), ("c", 0.0)]
    assert pieces[-1] == EndPiece(0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parts": [{"image": "9.png"}]}, "parts name the image '9.png'; its members are 0.png, 1.png"),
        ({"parts": [{"image": "json"}]}, "parts name the image 'json'"),
        ({"parts": [{"text": "x", "weight": -1}]}, "a loss weight is -1"),
        ({"parts": [{"text": "x", "weight": True}]}, "a loss weight is True"),
        ({"parts": [{"text": "x", "weight": float("nan")}]}, "a loss weight is nan"),
        ({"parts": [{"text": "x", "weight": 10**400}]}, "a loss weight is 1000"),
        ({"parts": {"text": "x"}}, "parts is a dict, expected a list"),
        ({"images": ["u", None], "texts": [None]}, "lists of equal length"),
        ({"images": ["u"], "texts": ["x"]}, "holds both"),
        ({"images": [None], "texts": [None]}, "holds neither"),
        ({"images": ["u", "v"], "texts": [None, None]}, "names 2 images, none of them by a member.s name.* has 3"),
        ({"images": ["u", "v", "w", "x"], "texts": [None] * 4}, r"sample has 3 \(0.png, 1.png, 2.png\)"),
        ({"images": ["0.png", "v"], "texts": [None, None]}, "names the image 'v'"),
        ({"images": ["0.png", None], "texts": [None, 7]}, "is 7, expected a string"),
        ({"text_list": ["x"], "image_info": [{"matched_text_index": 1}]}, "matched_text_index=1 of an image, with 1"),
        ({"text_list": ["x"], "image_info": [{"image_base64": "?", "matched_text_index": 0}]}, "base64"),
    ],
)
@pytest.mark.fault
def test_what_does_not_fit_is_refused_as_a_fault_of_the_text(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        parts(fields)
    assert caught.value.kind is FaultKind.TEXT
    assert (caught.value.shard, caught.value.key) == ("shard.tar", "000007")


def test_a_tar_written_by_webdataset_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pages-000000.tar"
    with webdataset.TarWriter(str(path)) as writer:  # type: ignore[attr-defined]
        writer.write({"__key__": "p/0001", "0.png": A, "1.png": B, "2.png": C, "json": OBELICS})
        writer.write({"__key__": "p/0002", "0.png": A, "1.png": B, "2.png": C, "json": MMC4})
    build_index(path)
    write_manifest(tmp_path / "all.manifest", [path])
    first, second = read_samples(tmp_path / "all.manifest")
    assert plain_parts(first.parts) == [A, "s", B, C, "t"]
    assert plain_parts(second.parts) == [A, "one.", "two.", B, C, "three."]
    sizes = [part.size for part in second.parts if isinstance(part, ImagePart)]
    assert sizes == [(16, 20)] * 3
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        assert "p/0001.0.png" in tar.getnames()


def test_all_texts_finds_what_templates_show() -> None:
    assert all_texts(OBELICS) == ["s", "t"]
    assert all_texts(MMC4) == ["one.", "two.", "three."]
    assert all_texts(
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]}
    ) == ["q"]
    assert all_texts({"conversations": [{"from": "gpt", "value": "v"}], "caption": "c"}) == ["c", "v"]
    annotations = ["a", {"question": "q", "answer": "r", "id": 3}, {"messages": [{"role": "user", "content": "m"}]}]
    assert all_texts({"annotations": annotations}) == ["a", "q", "r", "m"]
    for odd in ({"messages": 3}, {"conversations": [4]}, {"annotations": "x"}, {"annotations": [5]}):
        assert all_texts(odd) == []


def test_verify_finds_pages_whose_images_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "pages-000000.tar"
    lost = {"images": ["u", None, "v"], "texts": [None, "s", None]}
    with webdataset.TarWriter(str(path)) as writer:  # type: ignore[attr-defined]
        writer.write({"__key__": "good", "0.png": A, "1.png": B, "2.png": C, "json": OBELICS})
        writer.write({"__key__": "lost", "0.png": A, "json": lost})
        writer.write({"__key__": "named", "0.png": A, "json": {"parts": [{"image": "named.0.png"}, {"text": "x"}]}})
        writer.write({"__key__": "other", "0.png": A, "json": {"parts": [{"image": "named.0.png"}, {"text": "x"}]}})
    build_index(path)
    found = [(damage.key, damage.problem, damage.detail) for damage in verify_shard(path).damages]
    assert [(key, problem) for key, problem, _ in found] == [("lost", Problem.PARTNER), ("other", Problem.PARTNER)]
    assert "names 2 images" in found[0][2]


def test_the_index_counts_the_text_of_pages_and_dialogues() -> None:
    said = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]}
    cases: list[tuple[Any, int]] = [
        (OBELICS, 2),
        (MMC4, 4 + 4 + 6),
        (said, 5),
        ({"annotations": ["ab", {"q": "c"}]}, 3),
    ]
    for fields, expected in cases:
        assert text_bytes_of({"json": json.dumps(fields).encode()}) == expected
