"""Import checkpoints of other formats: DeepSpeed (any ZeRO stage, or universal) and Hugging Face folders."""

from mmscale.checkpoint.imports.convert import ImportReport, ImportTarget, import_checkpoint
from mmscale.checkpoint.imports.hf import HfImportReport, import_folder
from mmscale.checkpoint.imports.write import IMPORTED

__all__ = ["IMPORTED", "HfImportReport", "ImportReport", "ImportTarget", "import_checkpoint", "import_folder"]
