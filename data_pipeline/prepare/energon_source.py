"""Read the metadata of a Megatron-Energon folder, so that ingest can use its tars.

    .nv-meta/split.yaml    shards of train, val, test
    .nv-meta/dataset.yaml  type of sample, and the member or JSON field of each of its fields

Not for: writing these files (``energon_export``).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from braceexpand import braceexpand

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.json_member import parse_member
from data_pipeline.io.untrusted import UntrustedError, read_yaml
from data_pipeline.prepare.records import check_utf8, dump_json, validated_members
from data_pipeline.prepare.rows import Members
from data_pipeline.shards.media_kind import media_kind

META = ".nv-meta"
_CRUDE = "CrudeWebdataset"
_MAX_TARS = 1_000_000
_ACCESS = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
Access = tuple[tuple[str, ...], ...]
"""Alternatives in order. Each is a member's extension, followed by keys into that member's JSON."""


@dataclass(frozen=True)
class FieldMap:
    """``field_map`` of a dataset.yaml: the member or JSON field of each field of a sample."""

    fields: tuple[tuple[str, Access], ...]

    def __call__(self, members: Members) -> Members:
        """Return members as training reads them: the mapped images, and a JSON of all other mapped fields.

        Raises:
            SampleError: a mapped member or field is absent or damaged.
        """
        result: Members = {}
        fields: dict[str, Any] = {}
        for name, access in self.fields:
            ext, value = _access(members, access, name)
            if media_kind(ext) is not None:
                result[ext] = members[ext]
            elif name == "text" and isinstance(value, str):  # TextSample and OCRSample: this text is learned.
                fields["caption"] = value
            else:
                fields[name] = value
        if fields:
            result["json"] = dump_json(fields)
        return validated_members(result)


def _access(members: Members, access: Access, name: str) -> tuple[str, Any]:
    for ext, *keys in access:
        if ext not in members:
            continue
        value: Any = None if media_kind(ext) is not None else _decoded(ext, members[ext])
        try:
            for key in keys:
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            continue
        return ext, value
    wanted = ",".join(ext + "".join(f"[{key}]" for key in keys) for ext, *keys in access)
    raise SampleError(f"field_map: {name} is {wanted}, which the sample does not have: {sorted(members)}")


def _decoded(ext: str, content: bytes) -> Any:
    kind = ext.rpartition(".")[2]
    if kind == "json":
        return parse_member(content)
    text = check_utf8(content)
    return int(text) if kind in ("cls", "idx", "index") and text.strip().lstrip("-").isdecimal() else text


@dataclass(frozen=True)
class EnergonFolder:
    """One split of a folder with ``.nv-meta``.

    Attributes:
        tars: The split's tars, in order.
        convert: Converts a sample's members to members as training reads them.
        description: Split, sample type and field map in a few words.
    """

    tars: tuple[Path, ...]
    convert: Any
    description: str

    @classmethod
    def open(cls, folder: Path, split: str) -> EnergonFolder:
        """Read split.yaml and dataset.yaml.

        Raises:
            DataConfigError: one of them is missing or damaged, the split has no shard or an absent one, or the sample
                type needs code to be run.
        """
        meta = folder / META
        stored = _load(meta, "split")
        splits = stored.get("split_parts")
        if not isinstance(splits, dict) or not splits.get(split):
            known = sorted(splits) if isinstance(splits, dict) else []
            raise DataConfigError(f"{meta}: no shards in the split {split!r}; it has {known} (--split)")
        excluded = set(_expand(stored.get("exclude") or []))
        inner = sorted(name for name in excluded if "/" in name and name.rpartition("/")[2].isdecimal())
        if inner:
            raise DataConfigError(
                f"{meta}: excludes single samples ({inner[0]}), which ingest does not support; remove the entry"
            )
        names = [name for name in _expand(splits[split]) if name not in excluded]
        tars = tuple(_inside(folder, name) for name in names)
        absent = [str(tar) for tar in tars if not tar.is_file()]
        if absent or not tars:
            problem = f"names {absent[0]}, which does not exist" if absent else "has no shard"
            raise DataConfigError(f"{meta}: the split {split!r} {problem}")
        convert, sample_type = _conversion(meta)
        others = sorted(name for name in splits if name != split and splits[name])
        left_out = f"; not the splits {', '.join(others)}" if others else ""
        return cls(tars, convert, f"split {split} of {len(tars)} tars, {sample_type}{left_out}")


def _conversion(meta: Path) -> tuple[Any, str]:
    dataset = _load(meta, "dataset")
    sample_type = dataset.get("sample_type")
    named = sample_type if isinstance(sample_type, dict) else dataset
    name = str(named.get("__class__"))
    field_map = dataset.get("field_map")
    if isinstance(field_map, dict) and field_map:
        pairs = tuple((str(key), _parse_access(str(value), meta)) for key, value in sorted(field_map.items()))
        return FieldMap(pairs), f"{name} with {', '.join(f'{k}={v}' for k, v in sorted(field_map.items()))}"
    if name == _CRUDE:
        return validated_members, f"{name}, members unchanged"
    raise DataConfigError(
        f"{meta / 'dataset.yaml'}: {name} has no field_map (a sample_loader is code, which ingest does not run); "
        "ingest the members unchanged with --from webdataset"
    )


def _parse_access(text: str, meta: Path) -> Access:
    options = []
    for option in text.split(","):
        match = _ACCESS.fullmatch(option.strip())
        if match is None:
            raise DataConfigError(f"{meta / 'dataset.yaml'}: field_map: cannot read {text!r}")
        options.append((match[1].lower(), *re.findall(r"\[([^\[\]]+)\]", match[2])))
    return tuple(options)


def _load(meta: Path, stem: str) -> Mapping[str, Any]:
    for path in (meta / f"{stem}.yaml", meta / f"{stem}.json"):
        if path.is_file():
            try:
                loaded = read_yaml(path)
            except (UntrustedError, OSError) as error:
                raise DataConfigError(f"{path}: cannot be read: {error}") from error
            if not isinstance(loaded, dict):
                raise DataConfigError(f"{path}: expected a mapping")
            return loaded
    raise DataConfigError(
        f"{meta / stem}.yaml: no such file; create it with `energon prepare`, or use --from webdataset"
    )


def _expand(names: Any) -> list[str]:
    try:
        every = (name for pattern in names for name in braceexpand(str(pattern)))
        found = list(itertools.islice(every, _MAX_TARS + 1))
        if len(found) > _MAX_TARS:
            raise DataConfigError(f"a list of more than {_MAX_TARS} shards: {names!r:.80}")
        return found
    except (ValueError, TypeError) as error:
        raise DataConfigError(f"a list of shards that cannot be read: {names!r:.80}: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise DataConfigError(f"{folder / META}: the shard {name!r} is outside of the folder")
    return folder / relative
