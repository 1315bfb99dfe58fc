"""Checkpoints of others, turned into ours: DeepSpeed's of any ZeRO stage and universal, and folders of Hugging Face."""

from mmscale.checkpoint.foreign.convert import ImportReport, Recipient, import_checkpoint
from mmscale.checkpoint.foreign.hf import HfImportReport, import_folder
from mmscale.checkpoint.foreign.write import IMPORTED

__all__ = ["IMPORTED", "HfImportReport", "ImportReport", "Recipient", "import_checkpoint", "import_folder"]
