"""Choices of the offline tools. The command line offers the same values, so this module imports no library."""

from __future__ import annotations

from enum import Enum


class SourceKind(str, Enum):
    """What a source is."""

    AUTO = "auto"
    """Told by its name and what lies in it."""
    FOLDER = "folder"
    """Images with same-stem .txt or .json."""
    CLASSES = "classes"
    """A folder of images for each class, whose name becomes the caption."""
    CSV = "csv"
    """Columns path and caption."""
    TSV = "tsv"
    """The same, separated by tabs."""
    JSONL = "jsonl"
    """An object a line: path, caption, captions, parts, or a document of OBELICS or MMC4."""
    PARQUET = "parquet"
    """The same in Parquet, images inside or beside."""
    WEBDATASET = "webdataset"
    """Tars, their members as they are."""
    IMG2DATASET = "img2dataset"
    """Tars of img2dataset (LAION, DataComp): .jpg, .txt and a .json with a status."""
    ENERGON = "energon"
    """A folder with .nv-meta."""
    OBELICS = "obelics"
    """Tars with numbered images and a .json with images and texts, or Parquet and JSONL with such columns."""
    MMC4 = "mmc4"
    """Tars with a .json with text_list and image_info, images beside or inside it; or Parquet and JSONL."""


class OnError(str, Enum):
    """What a row that cannot be used does."""

    FAIL = "fail"
    """It ends the ingest; finished shards stay."""
    SKIP = "skip"
    """It is left out and noted in ``NAME.skipped.jsonl``."""


class Keys(str, Enum):
    """What samples are called in the new shards."""

    KEEP = "keep"
    """As they were; two of one name in one shard are an error."""
    ORIGIN = "origin"
    """The name of their shard, and of their set if there are several, before it: ``photos/train-00003/cat``."""
    NUMBER = "number"
    """Their number in the new order, from 1: ``000000001``."""


class Naming(str, Enum):
    """What tars, samples and members are called."""

    KEEP = "keep"
    """As they were: tars are copied byte for byte."""
    IMG2DATASET = "img2dataset"
    """``00012.tar`` with ``000120345.jpg``, ``.txt`` and ``.json``, one image and one caption each."""


class Reader(str, Enum):
    """Who is going to read the tars."""

    WEBDATASET = "webdataset"
    """Anything that reads tars."""
    ENERGON = "energon"
    """Megatron-Energon, which wants files beside them."""


class Keep(str, Enum):
    """Which of several duplicates stays."""

    FIRST = "first"
    """The first in the order of sets and samples."""
    LARGEST = "largest"
    """The one with the most pixels; of equal ones the first."""


class Split(str, Enum):
    """Splits of Megatron-Energon."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class ModelType(str, Enum):
    """SentencePiece algorithms."""

    BPE = "bpe"
    UNIGRAM = "unigram"
