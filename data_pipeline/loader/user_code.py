"""Python code that a configuration names: webdataset pipelines and stages of the user's own.

    module:attr --load--> pipeline, stages, iterable or factory --one_epoch--> samples --members_of--> bytes

Not for: which lane gets which sample (``user_pipeline``).
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import itertools
import json
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.errors import DataConfigError, FaultKind, PipelineError, SampleError, out_of_memory
from data_pipeline.shards.image_header import is_image

_TEXT_EXTENSIONS = ("txt", "json")


@dataclass(frozen=True)
class Epoch:
    """One epoch of one lane.

    A factory is called with those of these fields that its signature names. With ``lane`` or ``num_lanes`` among them
    it builds the pipeline of that lane only.
    """

    epoch: int
    lane: int
    num_lanes: int
    seed: int


def load(path: str, dataset: str) -> Any:
    """Import ``module:attr``; modules of the working directory are found too.

    From then on webdataset takes this process for the only one.

    Raises:
        DataConfigError: there is no such module or attribute, the module raises, or the object can be read only once.
    """
    from webdataset import utils

    # webdataset's own splits by rank and worker would change the order with the number of ranks and workers.
    utils.pytorch_worker_info = _one_process
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
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
    """Rank, ranks, worker and workers."""
    return 0, 1, 0, 1


def is_split(target: Any) -> bool:
    """Whether the pipeline deals samples to lanes itself: its factory takes a lane, or it has ``wds.split_by_node``."""
    if _is_factory(target):
        if {"lane", "num_lanes"} & set(inspect.signature(target).parameters):
            return True
        target = _call(target, Epoch(0, 0, 1, 0))
    return _splits(target)


def one_epoch(target: Any, stages: Sequence[Any], at: Epoch, skip: Callable[[SampleError], None]) -> Iterator[Any]:
    """Begin the samples of an epoch.

    Args:
        target: A webdataset pipeline, a list of its stages, another iterable, or a factory of one of these.
        stages: Stages that follow it, or lists of stages.
        at: The epoch. ``wds.split_by_node`` deals shards to lanes.
        skip: Called with the error of a sample that a stage such as ``map`` or ``decode`` raised.
    """
    from webdataset.pipeline import DataPipeline

    made = _is_factory(target)
    pipeline = _as_pipeline(_call(target, at) if made else target)
    samples = iter(_adapted(pipeline, at, skip, copies=not made))
    for stage in itertools.chain.from_iterable(each if isinstance(each, list) else [each] for each in stages):
        samples = iter(DataPipeline().invoke(_adapted(stage, at, skip, copies=True), samples))
    return samples


def _is_factory(target: Any) -> bool:
    return callable(target) and not isinstance(target, Iterable)


def _call(factory: Any, at: Epoch) -> Any:
    names = inspect.signature(factory).parameters
    return factory(**{name: value for name, value in asdict(at).items() if name in names})


def _as_pipeline(target: Any) -> Any:
    """The target; a list of stages as a pipeline, a list of samples as it is."""
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


def _adapted(stage: Any, at: Epoch, skip: Callable[[SampleError], None], *, copies: bool) -> Any:
    """A stage for one lane.

    Args:
        stage: A stage, or a pipeline of stages.
        at: As in ``one_epoch``.
        skip: As in ``one_epoch``.
        copies: Copy webdataset's own stages, since some count epochs or hold a random generator: a resumed run would
            find other counts.
    """
    from webdataset.filters import FilterFunction, _decode, _map, _map_dict, _rename, _xdecode, reraise_exception
    from webdataset.pipeline import DataPipeline
    from webdataset.shardlists import split_by_node

    if isinstance(stage, DataPipeline):
        adapted = copy.copy(stage)
        adapted.pipeline = [_adapted(each, at, skip, copies=copies) for each in stage.pipeline]
        return adapted
    function = getattr(stage, "f", stage)
    if function is split_by_node:
        return _Share(at.lane, at.num_lanes)
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
class _Share:
    """A stage that passes every ``num_shares``-th item."""

    share: int
    num_shares: int

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        return itertools.islice(items, self.share, None, self.num_shares)


@dataclass(frozen=True)
class _SampleBySample:
    """A stage without memory, applied to one sample at a time: its error concerns that sample alone."""

    stage: Callable[[Iterator[Any]], Iterable[Any]]
    skip: Callable[[SampleError], None]

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        for number, sample in enumerate(samples):
            try:
                made = list(self.stage(iter([sample])))
            except Exception as error:
                if out_of_memory(error) is not None:
                    raise
                key, shard = place_of(sample, number)
                reason = f"{type(error).__name__}: {error}"
                self.skip(SampleError(reason, kind=FaultKind.UNEXPECTED, shard=shard, key=key))
                continue
            yield from made


def place_of(sample: Any, number: int) -> tuple[str, str]:
    """Key and shard of a webdataset sample; ``number`` stands for a missing key."""
    if not isinstance(sample, Mapping):
        return f"#{number}", "?"
    return str(sample.get("__key__", f"#{number}")), str(sample.get("__url__", "?"))


def members_of(sample: Mapping[str, Any]) -> dict[str, bytes]:
    """The members that a tar would hold: encoded bytes of images, ``txt`` and ``json`` by extension.

    Decoded images are encoded as PNG, which loses nothing. Members of other extensions are left out.

    Raises:
        SampleError: the value of a member is none that its extension can have.
    """
    members: dict[str, bytes] = {}
    for name, value in sample.items():
        ext = str(name).lower()
        last = ext.rpartition(".")[2]
        if ext.startswith("__") or not (is_image(ext) or ext in _TEXT_EXTENSIONS or last in ("gz", "zst")):
            continue
        if isinstance(value, bytes | bytearray | memoryview):
            members[ext] = bytes(value)
        elif is_image(ext):
            members[ext] = _png(value, ext)
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
    """A PNG of a PIL image, of an array (height, width[, channels]), or of a tensor (channels, height, width).

    Floating-point pixels range from 0 to 1.
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
    """The error that stops a run because a pipeline raised it."""
    reason = f"{type(error).__name__}: {error}"
    return PipelineError(f"data set {dataset}: the pipeline {path} failed {progress}: {reason}")
