"""Enumerations of the offline tools. The command line imports them for its help, so this module loads no library."""

from __future__ import annotations

from enum import Enum


class SourceKind(str, Enum):
    """The format of a source."""

    AUTO = "auto"
    """Detected from file names and, for tars, from the first sample."""
    FOLDER = "folder"
    """Images with .txt or .json files of the same stem."""
    CLASSES = "classes"
    """One folder of images per class. The folder's name becomes the caption."""
    CSV = "csv"
    """Columns path and caption."""
    TSV = "tsv"
    """The same columns, separated by tabs."""
    JSONL = "jsonl"
    """One JSON object per line: path, caption, captions, parts, or an OBELICS or MMC4 document."""
    JSON = "json"
    """One JSON array of such objects, for example LLaVA's or ShareGPT's dialogues."""
    PARQUET = "parquet"
    """Parquet with the same columns; images in the file or in files next to it."""
    ARROW = "arrow"
    """Arrow files, or a folder that ``datasets.Dataset.save_to_disk`` wrote."""
    WEBDATASET = "webdataset"
    """Tars whose members are stored unchanged."""
    IMG2DATASET = "img2dataset"
    """Tars of img2dataset (LAION, DataComp): .jpg, .txt and a .json with a status."""
    ENERGON = "energon"
    """A folder with .nv-meta (Megatron-Energon)."""
    OBELICS = "obelics"
    """Tars with numbered images and a .json with images and texts, or Parquet or JSONL with these columns."""
    MMC4 = "mmc4"
    """Tars with text_list and image_info in a .json, images in it or in members; or Parquet or JSONL."""


class OnError(str, Enum):
    """How an ingest treats an unusable row."""

    FAIL = "fail"
    """End the ingest with an error; finished shards stay."""
    SKIP = "skip"
    """Skip the row and record it in ``NAME.skipped.jsonl``."""


class SampleKeys(str, Enum):
    """Keys of the samples in the new shards."""

    KEEP = "keep"
    """The old keys. Two equal keys in one shard are an error."""
    ORIGIN = "origin"
    """Old shard name and old key, after the data set's name if there are several: ``photos/train-00003/cat``."""
    NUMBER = "number"
    """The sample's number in the new order, from 1: ``000000001``."""


class TarNaming(str, Enum):
    """Names of exported tars, samples and members."""

    KEEP = "keep"
    """The old names: tars are copied byte for byte."""
    IMG2DATASET = "img2dataset"
    """``00012.tar`` with ``000120345.jpg``, ``.txt`` and ``.json``: one image and one caption per sample."""


class ExportTarget(str, Enum):
    """The program that will read the exported tars."""

    WEBDATASET = "webdataset"
    """Any reader of tars."""
    ENERGON = "energon"
    """Megatron-Energon, which needs metadata files next to the tars."""


class KeepRule(str, Enum):
    """Which of several duplicates to keep."""

    FIRST = "first"
    """The first in the order of data sets and samples."""
    LARGEST = "largest"
    """The one with the most pixels; the first of them on a tie."""


class Split(str, Enum):
    """Split names of Megatron-Energon."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class ModelType(str, Enum):
    """SentencePiece algorithms."""

    BPE = "bpe"
    UNIGRAM = "unigram"
