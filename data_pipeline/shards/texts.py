"""All text that shards hold, for training a tokenizer and for statistics."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.shards.json_member import all_texts, parse_json
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.open_shard import open_shard


def iterate_texts(manifest: Manifest) -> Iterator[list[str]]:
    """The texts of each sample in order; reads the text members only.

    Raises:
        ManifestError: a shard is missing or stale.
        ShardError: a shard is shorter than its index says.
        StorageError: a remote one cannot be read.
        SampleError: a text is no UTF-8 or a JSON is damaged; names shard and key.
    """
    for number in range(manifest.num_shards):
        shard = open_shard(manifest, number)
        try:
            for i in range(len(shard.index)):
                texts: list[str] = []
                for member in shard.index.members(i):
                    if member.ext in ("txt", "json"):
                        content = shard.read(member.offset, member.offset + member.size)
                        texts += _decoded(member.ext, content, str(shard.index.tar_path), shard.index.key(i))
                yield texts
        finally:
            shard.close()


def check_unicode(text: str) -> None:
    """Refuses half a pair of UTF-16, which JSON can write as ``\\ud800``: no tokenizer takes it, no file can hold it.

    Raises:
        SampleError: the text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"the text is no Unicode: {error}", kind=FaultKind.TEXT) from error


def _decoded(ext: str, content: bytes, shard: str, key: str) -> list[str]:
    try:
        if ext == "json":
            texts = all_texts(parse_json(content))
            for text in texts:
                check_unicode(text)
            return texts
        return [content.decode()]
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is no UTF-8: {error}", shard=shard, key=key, kind=FaultKind.TEXT) from error
    except SampleError as error:
        raise error.located(shard, key) from error
