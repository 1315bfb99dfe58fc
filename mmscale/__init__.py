"""Train multimodal LLMs with DeepSpeed. The names below are the interface for Python programs: ``docs/python.md``.

Importing this package imports neither torch nor DeepSpeed: a name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.text.templates.base import LearnedText
    from mmscale.cli.trained import open_trained as load
    from mmscale.metrics.sample_images import pictures
    from mmscale.models.build import build_model
    from mmscale.models.connectors.projector import ProjectorBase
    from mmscale.objectives.base import ObjectiveBase, ObjectiveOutput
    from mmscale.objectives.next_token import NextToken
    from mmscale.run.session import load_config, open_engine, open_loader, train

__all__ = [
    "LearnedText",
    "NextToken",
    "ObjectiveBase",
    "ObjectiveOutput",
    "ProjectorBase",
    "__version__",
    "build_model",
    "load",
    "load_config",
    "open_engine",
    "open_loader",
    "pictures",
    "train",
]

_PLACES = {
    "LearnedText": "data_pipeline.text.templates.base:LearnedText",
    "NextToken": "mmscale.objectives.next_token:NextToken",
    "ObjectiveBase": "mmscale.objectives.base:ObjectiveBase",
    "ObjectiveOutput": "mmscale.objectives.base:ObjectiveOutput",
    "ProjectorBase": "mmscale.models.connectors.projector:ProjectorBase",
    "build_model": "mmscale.models.build:build_model",
    "load": "mmscale.cli.trained:open_trained",
    "load_config": "mmscale.run.session:load_config",
    "open_engine": "mmscale.run.session:open_engine",
    "open_loader": "mmscale.run.session:open_loader",
    "pictures": "mmscale.metrics.sample_images:pictures",
    "train": "mmscale.run.session:train",
}

try:
    __version__ = version("mmscale")
except PackageNotFoundError:  # A checkout on PYTHONPATH that is not installed.
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mmscale' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
