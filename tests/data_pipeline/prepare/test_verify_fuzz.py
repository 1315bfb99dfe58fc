"""Random damages of a random shard: verify finds each at its offset and reports no other sample.

The expected offsets come from Python's ``tarfile``, so they do not depend on the code under test.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.prepare.verify import verify_shard
from data_pipeline.shards.damage import Damage, Problem
from data_pipeline.shards.index import index_path
from data_pipeline.shards.writer import ShardWriter

pytestmark = pytest.mark.fault

BLOCK = 512


class MemberLocation(NamedTuple):
    """A member of the undamaged tar, and its offsets."""

    key: str
    ext: str
    header: int
    start: int
    size: int

    @property
    def following(self) -> int:
        return self.start + -(-self.size // BLOCK) * BLOCK


@dataclass(frozen=True, repr=False)
class Sound:
    """A shard without damage."""

    path: Path
    content: bytes
    members: list[MemberLocation]

    @property
    def end(self) -> int:
        return self.members[-1].following


def picture(number: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    with ShardWriter(folder, "part") as writer:
        for number in range(6):
            key = f"k{number}" if number != 3 else "a/folder/with/a/name/" + "that/is/long/" * 10 + "k3"
            kind, ext = [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")][number % 3]
            text = b"a text" * (number or 100)
            writer.write(key, {ext: picture(number, kind), "txt": text, "json": b'{"caption": "c"}'})
    (path,) = writer.shards
    members = []
    with tarfile.open(path) as tar:
        for info in tar:
            folder_name, _, base = info.name.rpartition("/")
            stem, _, ext = base.partition(".")
            key = f"{folder_name}/{stem}" if folder_name else stem
            members.append(MemberLocation(key, ext, info.offset, info.offset_data, info.size))
    assert len({member.key for member in members}) == 6
    return Sound(path, path.read_bytes(), members)


def found(sound: Sound, content: bytes, is_indexed: bool = True) -> list[Damage]:
    """Return the damages of other bytes with the old index, or without one."""
    folder = sound.path.parent / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / sound.path.name
    path.write_bytes(content)
    if is_indexed:
        index_path(path).write_bytes(index_path(sound.path).read_bytes())
    else:
        index_path(path).unlink(missing_ok=True)
    damages = verify_shard(path).damages
    assert all(damage.shard == str(path) for damage in damages)
    if not is_indexed:
        assert damages.pop(0).problem is Problem.INDEX, "the index is missed"
    return damages


def shows(damages: Sequence[Damage], problem: Problem, key: str, offset: int | None) -> bool:
    return any((d.problem, d.key, d.offset) == (problem, key, offset) for d in damages)


many = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
few = settings(many, max_examples=30)


@pytest.mark.parametrize("is_indexed", [True, False])
def test_no_damage_nothing_found(sound: Sound, is_indexed: bool) -> None:
    assert found(sound, sound.content, is_indexed) == []


@many
@given(data=st.data())
def test_a_flipped_bit_is_found_where_it_is(sound: Sound, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, len(sound.content) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(sound.content)
    damaged[at] ^= 1 << bit
    damages = found(sound, bytes(damaged))
    owner = next((member for member in sound.members if at < member.following), None)
    if owner is None:
        # The first block of the end mark is at the offset of a next header; later bytes are reported at their own.
        expected = (Problem.HEADER, sound.end) if at < sound.end + BLOCK else (Problem.TAIL, at)
        assert [(d.problem, d.key, d.offset) for d in damages] == [(expected[0], "", expected[1])]
        return
    assert {damage.key for damage in damages} == {owner.key}
    offsets = {damage.offset for damage in damages}
    if owner.start <= at < owner.start + owner.size:
        assert shows(damages, Problem.CHECKSUM, owner.key, owner.start)
    elif at >= owner.start:
        assert shows(damages, Problem.SLACK, owner.key, at)
    else:  # A header, or one of the blocks of a long name.
        assert any(owner.header <= offset <= owner.start for offset in offsets if offset is not None)
        assert {d.problem for d in damages} <= {Problem.HEADER, Problem.SLACK, Problem.INDEX, Problem.MISSING}


@few
@given(data=st.data())
def test_a_damaged_header_costs_one_sample_even_without_an_index(sound: Sound, data: st.DataObject) -> None:
    member = data.draw(st.sampled_from([m for m in sound.members if "/" not in m.key]))
    damaged = bytearray(sound.content)
    spoilt = data.draw(st.binary(min_size=8, max_size=8).filter(lambda b: b.strip(b" 01234567\0")))
    damaged[member.header + 148 : member.header + 156] = spoilt
    damages = found(sound, bytes(damaged), is_indexed=False)
    assert [(d.problem, d.key, d.offset) for d in damages] == [(Problem.HEADER, member.key, member.header)]


@few
@given(data=st.data())
def test_a_block_of_zeros_over_a_header_is_not_the_end(sound: Sound, data: st.DataObject) -> None:
    member = data.draw(st.sampled_from([m for m in sound.members[:-1] if "/" not in m.key]))
    damaged = bytearray(sound.content)
    damaged[member.header : member.header + BLOCK] = bytes(BLOCK)
    for is_indexed in (True, False):
        damages = found(sound, bytes(damaged), is_indexed)
        expected = (Problem.HEADER, member.key if is_indexed else "", member.header)
        assert [(d.problem, d.key, d.offset) for d in damages] == [expected]


@many
@given(data=st.data())
def test_a_truncation_is_found_where_it_is(sound: Sound, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(sound.content) - 1))
    damages = found(sound, sound.content[:length])
    cut = next((member for member in sound.members if length < member.start + member.size), None)
    if cut is not None:  # The first incomplete member.
        assert any(
            d.problem is Problem.TRUNCATED
            and d.key == cut.key
            and d.offset is not None
            and cut.header <= d.offset <= cut.start
            for d in damages
        )
        lost = {member.key for member in sound.members if length < member.start + member.size}
        assert f"of {len(lost)} samples are lost" in damages[-1].detail
    else:
        assert [d.problem for d in damages] == [Problem.TRUNCATED]
        assert damages[0].offset in (length, sound.end)


@few
@given(data=st.data(), is_indexed=st.booleans())
def test_bytes_after_the_end_are_found(sound: Sound, data: st.DataObject, is_indexed: bool) -> None:
    more = data.draw(st.binary(min_size=1, max_size=2000))
    damages = found(sound, sound.content + more, is_indexed)
    stray = len(more) - len(more.lstrip(b"\0"))
    if stray < len(more):
        assert [(d.problem, d.offset) for d in damages] == [(Problem.TAIL, len(sound.content) + stray)]
    elif is_indexed:
        assert [(d.problem, d.offset) for d in damages] == [(Problem.TAIL, len(sound.content))]
    else:
        assert damages == [], "more zeros at the end are legal"


Members = list[tuple[tarfile.TarInfo, bytes]]


def rewritten(sound: Sound, change: Callable[[Members], None]) -> tuple[bytes, dict[str, int]]:
    """Write the tar again after a change of its members; return it and the offset of each header by member name."""
    members: Members = []
    with tarfile.open(sound.path) as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            members.append((info, file.read()))
    change(members)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        # The last member of a name wins. The extra header before a long name is not the member's header.
        return out.getvalue(), {info.name: info.offset_data - BLOCK for info in tar}


@few
@given(number=st.integers(0, 17))
def test_a_missing_member_is_named_with_the_place_it_had(sound: Sound, number: int) -> None:
    content, _ = rewritten(sound, lambda members: members.__delitem__(number))
    gone = sound.members[number]
    damages = found(sound, content)
    assert shows(damages, Problem.MISSING, gone.key, gone.start)
    rest = [d for d in damages if d.problem is not Problem.MISSING]
    moved = sound.members[number + 1 :]
    assert [(d.problem, d.key) for d in rest] == ([(Problem.INDEX, moved[0].key)] if moved else [])


@few
@given(number=st.integers(0, 17), to=st.integers(0, 17), is_indexed=st.booleans())
def test_a_duplicate_is_found_at_the_second_one(sound: Sound, number: int, to: int, is_indexed: bool) -> None:
    first, second = min(number, to), max(number, to)

    def repeat(members: Members) -> None:
        members.insert(second + 1, members[first])

    content, headers = rewritten(sound, repeat)
    member = sound.members[first]
    damages = [d for d in found(sound, content, is_indexed) if d.problem is Problem.DUPLICATE]
    assert shows(damages, Problem.DUPLICATE, member.key, headers[f"{member.key}.{member.ext}"])
    assert {d.key for d in damages} <= {member.key, sound.members[second].key}, "the sample that was torn in two, too"


@few
@given(image=st.integers(0, 5), is_indexed=st.booleans())
def test_a_wrong_extension_is_found(sound: Sound, image: int, is_indexed: bool) -> None:
    number = [i for i, member in enumerate(sound.members) if member.ext not in ("txt", "json")][image]
    member = sound.members[number]
    wrong = {"jpg": "png", "png": "webp", "webp": "jpg"}[member.ext]

    def rename(members: Members) -> None:
        members[number][0].name = f"{member.key}.{wrong}"

    content, _ = rewritten(sound, rename)
    damages = found(sound, content, is_indexed)
    assert shows(damages, Problem.RENAMED, member.key, member.start)
    assert {d.key for d in damages} == {member.key}
    if is_indexed:
        assert shows(damages, Problem.MISSING, member.key, member.start)


HOSTILE = st.sampled_from(["../x.txt", "/etc/x.txt", "a/../../x.txt", "a\\x.txt"])
LINKS = st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])


@few
@given(number=st.integers(0, 17), name=HOSTILE, kind=LINKS, is_link=st.booleans(), is_indexed=st.booleans())
def test_names_outside_of_the_shard_are_found_and_other_members_are_read(
    sound: Sound, number: int, name: str, kind: bytes, is_link: bool, is_indexed: bool
) -> None:
    info = tarfile.TarInfo("x.txt" if is_link else name)
    if is_link:
        info.type, info.linkname = kind, "/etc/passwd"
    content, headers = rewritten(sound, lambda members: members.insert(number, (info, b"")))
    damages = found(sound, content, is_indexed)
    expected = Problem.LINK if is_link else Problem.PATH
    (damage,) = [d for d in damages if d.problem is not Problem.INDEX]  # Later members have moved.
    assert (damage.problem, damage.offset) == (expected, headers[info.name])
    assert info.name.startswith(damage.key)
