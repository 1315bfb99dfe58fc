"""Pages of text and pictures: packed documents for mmscale, and rows padded to the longest for transformers."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from tokenizers import models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer

Page = Sequence[str | Image.Image]
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
IMAGE_ID = 3
_NAMES = (PAD, BOS, EOS, IMAGE)


def tokenizer(special: Sequence[str] = (), bos: str | None = BOS) -> Tokenizer:
    """Return a tokenizer with a token per byte. Ids 0 to 3 are padding, beginning, end and image; ``special`` follow.

    Documents begin with ``bos``, or with no special token if it is None.
    """
    names = [*_NAMES, *special]
    vocabulary = {token: number for number, token in enumerate(names + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.add_special_tokens(names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        words.save(str(path))
        return load_tokenizer(HuggingFaceTokenizerConfig(path=path, image_token=IMAGE, bos_token=bos))


def text_pages(lengths: Sequence[int], seed: int = 0) -> list[Page]:
    """Return pages of text with these numbers of letters."""
    rng = np.random.default_rng(seed)
    return [["".join(chr(97 + letter) for letter in rng.integers(0, 26, length))] for length in lengths]


def picture_pages(count: int, sides: tuple[int, int], words: tuple[int, int], seed: int = 0) -> list[Page]:
    """Return pages of one picture and its caption; every fourth page has two or three pictures with captions."""
    rng = np.random.default_rng(seed)
    pages: list[Page] = []
    for number in range(count):
        page: list[str | Image.Image] = []
        for _ in range(1 if number % 4 else int(rng.integers(2, 4))):
            width, height = (int(side) for side in rng.integers(*sides, 2))
            page.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
            page.append("".join(chr(97 + letter) for letter in rng.integers(0, 26, int(rng.integers(*words)))))
        pages.append(page)
    return pages


def pictures(page: Page) -> list[Image.Image]:
    return [part for part in page if not isinstance(part, str)]


@dataclass(frozen=True)
class Inputs:
    """The same pages as inputs of both implementations.

    Attributes:
        packed: Our batch.
        padded: ``input_ids`` and ``attention_mask`` for transformers, padded at the end.
        real: bool ``(rows, longest)``: which positions are tokens of a page.
    """

    packed: MultimodalBatch
    padded: dict[str, Tensor]
    real: Tensor

    @property
    def padding(self) -> dict[str, float]:
        """Share of the decoder's rows that are padding, for ours and theirs."""
        tokens = float(self.real.sum())
        return {"ours": 1 - tokens / self.packed.segments.total, "transformers": 1 - tokens / self.real.numel()}


def inputs(pages: Sequence[Page], words: Tokenizer, spec: MediaSpec, transforms: dict[str, Any] | None) -> Inputs:
    """Return our packed documents, and their ids padded at the end."""
    block: dict[str, Any] = {"name": "x", "manifest": "x", "template": {"kind": "interleaved"}}
    if transforms is not None:
        block["transforms"] = transforms
    if spec.placement is Placement.NONE:
        block["template"] = {"kind": "text"}
    build = DocumentBuilder(DatasetConfig.model_validate(block), words, spec)
    documents = [build(_sample(page)) for page in pages]
    rows = [torch.from_numpy(document.token_ids).long() for document in documents]
    padded = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=words.pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    return Inputs(_packed(documents, spec, words.pad_id), padded, padded["attention_mask"].bool())


def _sample(page: Page) -> Sample:
    parts: list[TextPart | ImagePart] = []
    for part in page:
        if isinstance(part, str):
            parts.append(TextPart(part))
            continue
        out = io.BytesIO()
        part.save(out, "PNG")
        parts.append(ImagePart(out.getvalue(), "png"))
    text = "".join(part for part in page if isinstance(part, str))
    return Sample(tuple(parts), {"caption": text}, Provenance("x", "shard", "key", 0))


def _packed(documents: list[Document], spec: MediaSpec, pad_id: int) -> MultimodalBatch:
    """Pack as the loader does, with a dummy document if no page has a picture."""
    if spec.placement is not Placement.NONE and not any(document.num_images for document in documents):
        documents = [*documents, dummy_document(spec, pad_id)]
    return collate([Pack(tuple(documents), 0)], spec)
