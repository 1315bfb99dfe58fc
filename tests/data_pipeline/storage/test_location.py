from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import DataConfigError
from data_pipeline.storage.location import Url, parse_location


def test_urls_keep_their_form_and_paths_stay_paths() -> None:
    url = parse_location("s3://bucket/run/train.manifest")
    assert isinstance(url, Url)
    assert (url.root, url.path, url.name, url.suffix) == (
        "s3://bucket", "run/train.manifest", "train.manifest", ".manifest"
    )  # fmt: skip
    assert url.parent.child("a/b.tar") == "s3://bucket/run/a/b.tar"
    assert parse_location("shards/train.manifest") == Path("shards/train.manifest")
    assert parse_location("file:///data/train.manifest") == Path("/data/train.manifest")


def test_web_addresses_spell_what_object_names_do_not() -> None:
    web = Url("http://host/a%20folder").child("x y.tar")
    assert (web, web.key) == ("http://host/a%20folder/x%20y.tar", "a folder/x y.tar")
    bucket = Url("s3://bucket/a%20folder").child("x y.tar")
    assert bucket.key == "a%20folder/x y.tar"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ftp://host/x", "unknown scheme ftp"),
        ("s3://bucket", "expected s3://BUCKET/PATH"),
        ("http://host/x?token=secret", "without"),
        ("s3://bucket/a/../b", "without"),
        ("https://me:secret@host/x", "no name or password"),
    ],
)
def test_what_is_no_plain_place_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(DataConfigError, match=complaint) as caught:
        parse_location(text)
    assert "me:secret" not in str(caught.value)


def test_a_configuration_survives_its_own_dump() -> None:
    config = DatasetConfig.model_validate({"name": "a", "manifest": "s3://bucket/a.manifest"})
    assert isinstance(config.manifest, Url)
    for mode in ("python", "json"):
        assert DatasetConfig.model_validate(config.model_dump(mode=mode)).manifest == config.manifest
    local = DatasetConfig.model_validate({"name": "a", "manifest": "x/a.manifest"})
    assert local.model_dump(mode="json")["manifest"] == "x/a.manifest"
