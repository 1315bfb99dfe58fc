"""Checkpoints of DeepSpeed, of any ZeRO stage and in the universal format, turned into ours."""

from mmscale.checkpoint.foreign.convert import IMPORTED, ImportReport, import_checkpoint
from mmscale.checkpoint.foreign.match import Recipient

__all__ = ["IMPORTED", "ImportReport", "Recipient", "import_checkpoint"]
