"""A caption without an image is a bad sample; the commands that read a data set count such samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.loader.fingerprint import _dataset_parts
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import fingerprint_of
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.orphans import Orphans, orphans_of
from data_pipeline.text.templates import AnnotationsTemplate, CaptionTemplate
from tests.data_pipeline.conftest import Members, WriteSet, captioned

ORPHANS = (3, 8)


def samples() -> list[Members]:
    """Return twelve pairs, two of which lack their image."""
    found = [captioned(number) for number in range(12)]
    for number in ORPHANS:
        del found[number]["png"]
    return found


def loaded(
    base: DataConfig, spec: MediaSpec, dataset: dict[str, object], **faults: object
) -> tuple[set[str], list[Skipped]]:
    """Return the keys of the samples of one epoch, and the skipped samples."""
    block = {"name": "only", "max_epochs": 1, "transforms": {"kind": "fixed"}, **dataset}
    packing = {"max_tokens": 90}
    changed = {"datasets": [block], "lanes": 1, "packing": packing, "faults": {"max_share": 1.0, **faults}}
    config = DataConfig.model_validate(base.model_dump() | changed)
    keys, skipped = set[str](), list[Skipped]()
    with Loader(config, spec, seed=1) as loader:
        for step in loader:
            keys |= {origin.key for m in step.microbatches for origin in m.provenance if origin is not None}
            skipped += step.skipped
            if step.exhausted:
                break
    return keys, skipped


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.fault
def test_a_caption_without_its_image_is_a_bad_sample_unless_images_are_optional(
    write_set: WriteSet, mixture_config: DataConfig, hybrid_spec: MediaSpec
) -> None:
    manifest = write_set("only", samples())
    keys, skipped = loaded(mixture_config, hybrid_spec, {"manifest": manifest})
    orphans = {f"{number:06d}" for number in ORPHANS}
    assert keys == {f"{number:06d}" for number in range(12)} - orphans
    assert {(skip.key, skip.kind) for skip in skipped} == {(key, FaultKind.NO_IMAGE) for key in orphans}
    assert "template.images" in skipped[0].reason
    with pytest.raises(SampleError, match=r"00000[38]: no image"):
        loaded(mixture_config, hybrid_spec, {"manifest": manifest}, no_image="fail")
    optional = {"manifest": manifest, "template": {"kind": "caption", "images": "optional"}}
    assert len(loaded(mixture_config, hybrid_spec, optional)[0]) == 12
    pages = {"manifest": manifest, "template": {"kind": "interleaved", "images": "required"}}
    assert loaded(mixture_config, hybrid_spec, pages)[0] == keys
    assert len(loaded(mixture_config, hybrid_spec, pages | {"template": {"kind": "interleaved"}})[0]) == 12


@pytest.mark.fault
def test_a_streamed_caption_whose_image_was_renamed_is_not_trained(
    tmp_path: Path, mixture_config: DataConfig, hybrid_spec: MediaSpec
) -> None:
    members = [(f"{n:03d}.{ext}", data) for n in range(6) for ext, data in captioned(n).items()]
    renamed = [("0x2.png" if name == "002.png" else name, data) for name, data in members]
    keys, skipped = loaded(mixture_config, hybrid_spec, {"shards": (tar_of(tmp_path / "a.tar", renamed),)})
    assert keys == {"000", "001", "003", "004", "005"}
    assert {(skip.key, skip.kind) for skip in skipped} == {("0x2", FaultKind.TEXT), ("002", FaultKind.NO_IMAGE)}

    # Two headers are swapped, so 003 gets the image of 001. The repeated key reveals it.
    exchange = {"001.png": "003.png", "003.png": "001.png"}
    swapped = tar_of(tmp_path / "b.tar", [(exchange.get(name, name), data) for name, data in members])
    _, skipped = loaded(mixture_config, hybrid_spec, {"shards": (swapped,)})
    assert any("'003' comes a second time" in skip.reason for skip in skipped)


def test_orphans_are_counted_from_the_index_and_by_verify(write_set: WriteSet) -> None:
    mixed = samples()
    mixed[5]["json"] = json.dumps({"name": "no caption here"}).encode()
    manifest = Manifest.open(write_set("only", mixed))
    index = ShardIndex.open(manifest.shard_path(0))
    assert orphans_of(index) == Orphans(samples=12, no_image=2, no_text=1)
    assert [report.orphans for report in verify(jobs_of(manifest.file)[1])] == [Orphans(12, 2, 1)]
    said = list(Orphans(12, 2, 1).warnings())
    assert said[0].startswith("1 of 12 samples have an image and no text")
    assert said[1].startswith("2 of 12 samples have a text and no image")
    assert list(Orphans(12, 12, 0).warnings()) == []  # A data set of texts.


def test_the_rule_is_part_of_the_fingerprint_only_where_it_is_not_the_default() -> None:
    """A checkpoint from before the rule still fits its data set."""

    def parts(**template: object) -> str:
        dataset = DatasetConfig.model_validate({"name": "d", "manifest": "d.manifest", "template": template})
        return fingerprint_of(_dataset_parts(dataset, "m"))

    # Hashes in checkpoints of earlier versions.
    assert "d.template:2644b005647c4e97" in parts(kind="caption")
    assert parts(kind="caption") == parts(kind="caption", images="required")
    assert parts(kind="caption") != parts(kind="caption", images="optional")
    nested = {"kind": "annotations", "each": {"kind": "caption", "prompts": ["q "]}}
    assert "d.template:5bc34ecd73448c1f" in parts(**nested)
    assert parts(**nested) != parts(**nested, images="required")


def test_annotations_have_one_rule_for_all() -> None:
    dumped = AnnotationsTemplate().model_dump()
    assert AnnotationsTemplate.model_validate(dumped) == AnnotationsTemplate()
    each = CaptionTemplate(prompts=("q ",), images="optional")
    with pytest.raises(ValueError, match=r"each\.images=optional.*template\.images"):
        AnnotationsTemplate(each=each)
