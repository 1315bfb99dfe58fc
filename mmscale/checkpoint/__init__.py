"""Elastic checkpoints: saved atomically, and resumed at any number of ranks and any ZeRO stage.

``resume`` restores the exact state within a stage. ``warm_start`` copies only the weights that fit. ``load_weights``
fills a plain module and needs no engine.
"""

from mmscale.checkpoint.background import Saver
from mmscale.checkpoint.load import choose, load_weights, resume
from mmscale.checkpoint.manifest import TrainState, find_latest, list_checkpoints, read_manifest, read_state
from mmscale.checkpoint.reshard import verify
from mmscale.checkpoint.save import save
from mmscale.checkpoint.warm_start import LoadReport, warm_start

__all__ = [
    "LoadReport",
    "Saver",
    "TrainState",
    "choose",
    "find_latest",
    "list_checkpoints",
    "load_weights",
    "read_manifest",
    "read_state",
    "resume",
    "save",
    "verify",
    "warm_start",
]
