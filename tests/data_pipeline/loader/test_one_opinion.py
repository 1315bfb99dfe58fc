"""The loader skips exactly the samples that ``mmscale data verify`` lists as damaged."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.errors import FaultKind
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.prepare.verify import jobs_of, verify, verify_shard
from data_pipeline.shards.damage import Problem
from data_pipeline.text.templates import DialogueTemplate
from mmscale.cli.main import main
from tests.data_pipeline.conftest import Members, WriteSet, captioned, picture


def text(fields: object) -> Members:
    return {"json": json.dumps(fields).encode()}


def turns(*changes: dict[str, Any]) -> dict[str, Any]:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return {"messages": [turn | change for turn, change in zip(said, changes or ({}, {}), strict=True)]}


LLAVA = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
WEIGHTS = [float("nan"), -1.0, float("inf"), 1e300, True, "1", None]
GOOD: dict[str, list[Members]] = {
    "caption": [
        captioned(0),
        {"png": picture(1), "json": b'{"caption": null}', "txt": b"the text stands beside a null"},
        {"png": picture(2), "json": b'{"captions": null, "caption": "one"}'},
        {"png": picture(3), "json": b"\xef\xbb\xbf" + json.dumps({"caption": "marked as UTF-8"}).encode()},
        {"png": picture(4), "txt": b"x", "npy": b"\0"},
        {"png": picture(0, encoding="JPEG"), "txt": b"its extension names another format"},
        {"png": picture(4), **text({"caption": "x", "annotations": {"boxes": []}, "weight": "5 kg"})},
    ],
    "interleaved": [text({"parts": [{"text": "a", "weight": 0.5}, {"text": "b", "weight": 0}]})],
    "dialogue": [text(turns()), text(turns({}, {"weight": 0.25})), text({"messages": None, "conversations": LLAVA})],
    "annotations": [{"png": picture(5), **text({"annotations": [{"question": "q", "answer": "a", "weight": 2}] * 2})}],
}
BAD: dict[str, list[Members]] = {
    "caption": [
        {"png": picture(1), "json": b'{"caption": null}'},
        {"png": picture(1), "json": json.dumps({"caption": "sixteen"}).encode("utf-16")},
        {"png": picture(1), "json": json.dumps({"caption": "thirty-two"}).encode("utf-32")},
        {"png": picture(1), "json": b'{"caption": 3}'},
        {"png": picture(1), "json": b'{"caption": ""}'},
        {"png": picture(1), "json": b'{"caption": " \\n"}'},
        {"png": picture(1), "json": b'{"captions": [""]}'},
        {"png": picture(1), "json": b'{"captions": [], "caption": "x"}'},
        {"png": picture(1), "txt": b" "},
        {"png": picture(1), "json": b'{"captions": ["", " "]}'},
        {"png": picture(1), "txt": "sixteen".encode("utf-16")},
        {"png": picture(1), "json": b'["caption"]'},
        {"png.gz": picture(1), "txt": b"its picture is packed"},
        {"png": picture(1), "json.gz": b"\x1f\x8b"},
    ],
    "interleaved": [text({"parts": [{"text": "a", "weight": weight}]}) for weight in WEIGHTS],
    "dialogue": [
        *(text(turns({}, {"weight": weight})) for weight in WEIGHTS),
        text(turns({"content": [{"type": "text", "text": "q", "weight": -1}]}, {})),
        text(turns({"content": "<image> q"}, {})),
        text(turns({"content": None}, {})),
        text(turns({}, {"weight": 0})),
        text({"messages": turns()["messages"][:1]}),
        text({"messages": ["q", "a"]}),
    ],
    "annotations": [
        {"png": picture(1), **text({"annotations": [{"question": "q", "answer": "a", "weight": weight}]})}
        for weight in WEIGHTS
    ],
}


def shards_of(folder: Path, samples: Sequence[Members]) -> Path:
    """Write a plain tar as other tools do, without an index that would reject the sample."""
    path = folder / "plain.tar"
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for ext, content in members.items():
                member = folder / "member"
                member.write_bytes(content)
                tar.add(member, f"{number:06d}.{ext}")
    return path


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["caption", "interleaved", "dialogue", "annotations"])
def test_what_verify_lists_is_what_the_loader_skips(
    tmp_path: Path, mixture_config: DataConfig, hybrid_spec: MediaSpec, kind: str
) -> None:
    samples = [*GOOD[kind], *BAD[kind]]
    tar = shards_of(tmp_path, samples)
    block = {"name": "only", "shards": (str(tar),), "max_epochs": 1, "template": {"kind": kind}}
    faults = {"max_share": 1.0, "max_consecutive": 100}
    changes = {"datasets": [block], "lanes": 1, "packing": {"max_tokens": 90}, "faults": faults}
    skipped: dict[str, FaultKind] = {}
    with Loader(DataConfig.model_validate(mixture_config.model_dump() | changes), hybrid_spec, seed=1) as loader:
        for step in loader:
            skipped |= {skip.key: skip.kind for skip in step.skipped}
            if step.exhausted:
                break
    damages = [damage for damage in verify_shard(tar).damages if not damage.problem.is_warning]
    listed = {damage.key: damage.problem for damage in damages if damage.key}
    bad = {f"{number:06d}" for number in range(len(GOOD[kind]), len(samples))}
    assert set(skipped) == bad
    assert set(skipped.values()) <= {FaultKind.TEXT, FaultKind.DECODE}
    assert set(listed) == bad
    assert set(listed.values()) <= {Problem.TEXT, Problem.EXTENSION, Problem.IMAGE}


@pytest.mark.fault
def test_a_damaged_image_does_not_hide_a_damaged_weight(write_set: WriteSet) -> None:
    members = {"0.png": b"no picture", **text({"parts": [{"image": "0.png"}, {"text": "a", "weight": -1}]})}
    (report,) = verify(jobs_of(write_set("only", [members]))[1])
    assert {damage.problem for damage in report.damages} == {Problem.EXTENSION, Problem.TEXT}


def test_a_wrong_extension_is_a_warning(write_set: WriteSet, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_set("only", [{"png": picture(0, encoding="JPEG"), "txt": b"a"}])
    assert main(["data", "verify", str(manifest), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kinds"], said["damages"][0]["detail"]) == ({"renamed": 1}, ".png holds a jpeg, not a png")


@pytest.mark.parametrize("weight", [float("nan"), -1, float("inf"), 1e7])
def test_a_role_has_the_same_bounds(weight: float) -> None:
    with pytest.raises(ValidationError, match=r"equal to|finite"):
        DialogueTemplate.model_validate({"roles": {"user": {}, "assistant": {"weight": weight}}})
