"""The user's Python code that a configuration names: webdataset pipelines and stages.

    module:attr --load--> pipeline, stages, iterable or factory --one_epoch--> samples --members_of--> bytes

Not for: which lane gets which sample (``user_pipeline``).
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.errors import DataConfigError, FaultKind, PipelineError, SampleError, out_of_memory
from data_pipeline.io.trusted_code import import_attribute
from data_pipeline.shards.media_kind import media_kind
from data_pipeline.shards.token_grid import is_grid

_TEXT_EXTENSIONS = ("txt", "json")


@dataclass(frozen=True)
class LaneEpoch:
    """One epoch of one lane.

    A factory is called with the fields that its signature names. If it names ``lane`` or ``num_lanes``, it must build
    the pipeline of that lane only.
    """

    epoch: int
    lane: int
    num_lanes: int
    seed: int


def load(path: str, dataset: str) -> Any:
    """Import ``module:attr``. Appends the working directory to ``sys.path``.

    Also patches webdataset for the whole process, so that it does not split shards by rank and worker.

    Raises:
        DataConfigError: the module or attribute does not exist, the import raises, or the object is an iterator or
            something else that is no pipeline.
    """
    from webdataset import utils

    # Splits by rank and worker would make the order depend on the number of ranks and workers.
    utils.pytorch_worker_info = _one_process
    try:
        found = import_attribute(path)
    except Exception as error:
        raise DataConfigError(f"data set {dataset}: cannot import {path}: {type(error).__name__}: {error}") from error
    if isinstance(found, Iterator):
        raise DataConfigError(
            f"data set {dataset}: {path} is a {type(found).__name__}, which can be read only once; name a function "
            "that returns it"
        )
    if not callable(found) and not isinstance(found, Iterable) and not _is_of_webdataset(found):
        raise DataConfigError(
            f"data set {dataset}: {path} is a {type(found).__name__}; expected a webdataset pipeline, its stages, an "
            "iterable of samples, or a function that returns one of these"
        )
    return found


def _one_process(group: object = None) -> tuple[int, int, int, int]:
    """Return (rank, number of ranks, worker, number of workers) of a single process."""
    return 0, 1, 0, 1


def is_split(target: Any) -> bool:
    """Return whether the pipeline selects the samples of a lane itself.

    It does if its factory takes ``lane`` or ``num_lanes``, or if it contains ``wds.split_by_node``.
    """
    if _is_factory(target):
        if {"lane", "num_lanes"} & set(inspect.signature(target).parameters):
            return True
        target = _call(target, LaneEpoch(0, 0, 1, 0))
    return _splits(target)


def one_epoch(
    target: Any, stages: Sequence[Any], lane_epoch: LaneEpoch, skip: Callable[[SampleError], None]
) -> Iterator[Any]:
    """Return an iterator over the samples of an epoch.

    Args:
        target: A webdataset pipeline, a list of its stages, another iterable, or a factory of one of these.
        stages: Further stages, or lists of stages.
        lane_epoch: The epoch and lane. ``wds.split_by_node`` selects the shards of the lane.
        skip: Called with the error if a per-sample stage (``map``, ``decode``, ...) fails on a sample.
    """
    from webdataset.pipeline import DataPipeline

    made = _is_factory(target)
    pipeline = _as_pipeline(_call(target, lane_epoch) if made else target)
    samples = iter(_adapted(pipeline, lane_epoch, skip, copies=not made))
    for stage in itertools.chain.from_iterable(each if isinstance(each, list) else [each] for each in stages):
        samples = iter(DataPipeline().invoke(_adapted(stage, lane_epoch, skip, copies=True), samples))
    return samples


def _is_factory(target: Any) -> bool:
    return callable(target) and not isinstance(target, Iterable)


def _call(factory: Any, lane_epoch: LaneEpoch) -> Any:
    names = inspect.signature(factory).parameters
    return factory(**{name: value for name, value in asdict(lane_epoch).items() if name in names})


def _as_pipeline(target: Any) -> Any:
    """Return a list of stages as a pipeline; return anything else, also a list of samples, unchanged."""
    from webdataset.pipeline import DataPipeline

    is_stages = isinstance(target, list) and not any(isinstance(item, Mapping) for item in target)
    return DataPipeline(*target) if is_stages else target


def _is_of_webdataset(stage: Any) -> bool:
    return type(stage).__module__.partition(".")[0] == "webdataset"


def _splits(target: Any) -> bool:
    from webdataset.pipeline import DataPipeline
    from webdataset.shardlists import split_by_node

    target = _as_pipeline(target)
    if isinstance(target, DataPipeline):
        return any(map(_splits, target.pipeline))
    return getattr(target, "f", target) is split_by_node


def _adapted(stage: Any, lane_epoch: LaneEpoch, skip: Callable[[SampleError], None], *, copies: bool) -> Any:
    """Return a stage for one lane: the lane's part of ``split_by_node``, and errors of single samples to ``skip``.

    Args:
        stage: A stage, or a pipeline of stages.
        lane_epoch: As in ``one_epoch``.
        skip: As in ``one_epoch``.
        copies: Copy webdataset's own stages. Some count epochs or hold a random generator, so reuse would give a
            resumed run other samples.
    """
    from webdataset.filters import FilterFunction, _decode, _map, _map_dict, _rename, _xdecode, reraise_exception
    from webdataset.pipeline import DataPipeline
    from webdataset.shardlists import split_by_node

    if isinstance(stage, DataPipeline):
        adapted = copy.copy(stage)
        adapted.pipeline = [_adapted(each, lane_epoch, skip, copies=copies) for each in stage.pipeline]
        return adapted
    function = getattr(stage, "f", stage)
    if function is split_by_node:
        return _EveryNth(lane_epoch.lane, lane_epoch.num_lanes)
    if copies and _is_of_webdataset(stage):
        try:
            stage = copy.deepcopy(stage)
        except Exception as error:
            raise DataConfigError(
                f"the pipeline's stage {type(stage).__name__} cannot be copied for each lane and epoch ({error}); name "
                "a function that returns the pipeline"
            ) from error
    is_per_sample = isinstance(stage, FilterFunction) and function in (_decode, _map, _map_dict, _rename, _xdecode)
    if is_per_sample and stage.kw.get("handler", reraise_exception) is reraise_exception:
        return _SampleBySample(stage, skip)
    return stage


@dataclass(frozen=True)
class _EveryNth:
    """A stage that passes every ``step``-th item, from item ``first`` on."""

    first: int
    step: int

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        return itertools.islice(items, self.first, None, self.step)


@dataclass(frozen=True)
class _SampleBySample:
    """A stateless stage, applied to one sample at a time, so that an error makes only that sample a bad one."""

    stage: Callable[[Iterator[Any]], Iterable[Any]]
    skip: Callable[[SampleError], None]

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        for number, sample in enumerate(samples):
            try:
                made = list(self.stage(iter([sample])))
            except Exception as error:
                if out_of_memory(error) is not None:
                    raise
                key, shard = key_and_shard(sample, number)
                reason = f"{type(error).__name__}: {error}"
                self.skip(SampleError(reason, kind=FaultKind.UNEXPECTED, shard=shard, key=key))
                continue
            yield from made


def key_and_shard(sample: Any, number: int) -> tuple[str, str]:
    """Return key and shard of a webdataset sample; the key is ``#number`` if the sample has none."""
    if not isinstance(sample, Mapping):
        return f"#{number}", "?"
    return str(sample.get("__key__", f"#{number}")), str(sample.get("__url__", "?"))


def members_of(sample: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the members of a sample as a tar would contain them: encoded bytes by extension.

    Decoded images are encoded as PNG, which is lossless; text and JSON are encoded too. Keeps images, videos,
    sounds, token grids, ``txt``, ``json`` and compressed members; other members are dropped.

    Raises:
        SampleError: a value has a type that does not fit its extension.
    """
    members: dict[str, bytes] = {}
    for name, value in sample.items():
        ext = str(name).lower()
        last, kind = ext.rpartition(".")[2], media_kind(ext)
        if ext.startswith("__") or not (
            kind is not None or is_grid(ext) or ext in _TEXT_EXTENSIONS or last in ("gz", "zst")
        ):
            continue
        if isinstance(value, bytes | bytearray | memoryview):
            members[ext] = bytes(value)
        elif kind == "image":
            members[ext] = _png(value, ext)
        elif kind is not None:
            noun = "a video" if kind == "video" else "a sound"
            raise SampleError(
                f".{ext}: expected the encoded bytes of {noun}, got a {type(value).__name__}; do not decode it"
            )
        elif isinstance(value, str):
            members[ext] = value.encode()
        else:
            members[ext] = _json(value, ext)
    return members


def _json(value: Any, ext: str) -> bytes:
    try:
        if ext != "json":
            raise TypeError(f"expected a string, got a {type(value).__name__}")
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(f".{ext}: {error}", kind=FaultKind.TEXT) from error


def _png(value: Any, ext: str) -> bytes:
    """Encode a PIL image, an array (height, width[, channels]) or a tensor (channels, height, width) as PNG.

    Floating-point pixels must be in [0, 1].
    """
    try:
        image = value if isinstance(value, Image.Image) else Image.fromarray(_pixels(value))
        encoded = io.BytesIO()
        image.save(encoded, "PNG", compress_level=1)
    except Exception as error:
        reason = f".{ext}: a {type(value).__name__} cannot be stored as PNG: {error}"
        raise SampleError(reason, kind=FaultKind.DECODE) from error
    return encoded.getvalue()


def _pixels(value: Any) -> Any:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
        value = value.transpose(1, 2, 0) if value.ndim == 3 else value
    if not isinstance(value, np.ndarray):
        raise TypeError("expected bytes, a PIL image, an array or a tensor")
    if np.issubdtype(value.dtype, np.floating):
        if not (value.min() >= 0 and value.max() <= 1):
            raise ValueError("floating-point pixels must range from 0 to 1")
        value = np.rint(value * 255).astype(np.uint8)
    if value.dtype != np.uint8:
        raise TypeError(f"pixels are {value.dtype}, expected uint8 or floats from 0 to 1")
    return value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value


def user_error(dataset: str, path: str, progress: str, error: Exception) -> PipelineError:
    """Return the error that stops a run because the user's code raised ``error``.

    Args:
        dataset: Name of the data set.
        path: Import paths of the code.
        progress: Where it failed, for example ``after sample 'x'``.
        error: The exception of the user's code.
    """
    reason = f"{type(error).__name__}: {error}"
    return PipelineError(f"data set {dataset}: the pipeline {path} failed {progress}: {reason}")
