"""Import checkpoints of other formats: DeepSpeed (any ZeRO stage, or universal) and Hugging Face folders."""

from mmscale.checkpoint.imports.convert import ImportReport, ImportTarget, import_checkpoint
from mmscale.checkpoint.imports.hf import DescribedFolder, HfImportReport, import_folder, import_weights
from mmscale.checkpoint.imports.write import IMPORTED

__all__ = [
    "IMPORTED",
    "DescribedFolder",
    "HfImportReport",
    "ImportReport",
    "ImportTarget",
    "import_checkpoint",
    "import_folder",
    "import_weights",
]
