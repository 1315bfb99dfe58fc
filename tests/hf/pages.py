"""Documents of text and pictures, for both sides: ours come from the data path, theirs from their processors.

A page lists texts and sizes (height, width) of pictures. ``Seen`` holds what both sides make of some pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder, null_document
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.patch_embed import PatchEmbed
from tests.hf.twins import imported, loaded, tensors_of, their_gradients
from tests.models.twins import distance, rounding_ratio
from tests.parity_table import Recorder

Page = Sequence[str | tuple[int, int]]
PAGES: dict[str, Page] = {
    "picture first": [(50, 70), "first"],
    "in the middle": ["a b", (90, 31), "c"],
    "last": ["before it", (40, 44)],
    "several": [(31, 90), "one, ", (64, 64), (29, 45), "two and three.", (56, 100), "."],
    "none": ["text alone"],
}
AUTO = "AutoModelForImageTextToText"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def save_tokenizer(path: Path, special: Sequence[str]) -> Path:
    """A ``tokenizer.json`` of single bytes and special tokens; 0, 1, 2 are padding, beginning and end."""
    names = [PAD, BOS, EOS, *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(names + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def picture(size: tuple[int, int]) -> Image.Image:
    """Smooth colours that differ by size."""
    rng = np.random.default_rng(size)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    return coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def stored(image: Image.Image) -> bytes:
    """As a shard holds it."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def builder(tokenizer: Tokenizer, spec: MediaSpec, transforms: dict[str, Any]) -> DocumentBuilder:
    """Of pages, all of whose text is learned."""
    block = {"name": "x", "manifest": "x", "template": {"kind": "interleaved"}, "transforms": transforms}
    return DocumentBuilder(DatasetConfig.model_validate(block), tokenizer, spec)


def document(build: DocumentBuilder, page: Page) -> Document:
    parts = [TextPart(part) if isinstance(part, str) else ImagePart(stored(picture(part)), "png") for part in page]
    return build(Sample(tuple(parts), {}, Provenance("x", "shard", "key", 0)))


def written(page: Page, image: str) -> tuple[str, list[Image.Image]]:
    """A page as their processors take it: a text with ``image`` for each picture, and the pictures."""
    text = "".join(part if isinstance(part, str) else image for part in page)
    return f"{BOS}{text}{EOS}", [picture(part) for part in page if not isinstance(part, str)]


def load(path: Path, image_token: str) -> Tokenizer:
    return load_tokenizer(HuggingFaceTokenizerConfig(path=path, image_token=image_token))


@dataclass(frozen=True)
class Seen:
    """Pages on both sides.

    Attributes:
        documents: Ours.
        inputs: Arguments of their model, page by page.
        spec: What our model takes.
    """

    documents: list[Document]
    inputs: list[dict[str, Tensor]]
    spec: MediaSpec

    @classmethod
    def of(cls, build: DocumentBuilder, process: Callable[[Page], dict[str, Tensor]], pages: Sequence[Page]) -> Seen:
        """Of some pages; both sides must give the same ids."""
        documents = [document(build, page) for page in pages]
        inputs = [process(page) for page in pages]
        for ours, theirs in zip(documents, inputs, strict=True):
            assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
        return cls(documents, inputs, build.spec)

    def batch(self, number: int | None = None) -> MultimodalBatch:
        """All in one pack, or one alone; a text alone comes with a null document."""
        documents = self.documents if number is None else [self.documents[number]]
        if not any(document.num_images for document in documents):
            documents = [*documents, null_document(self.spec, pad_id=0)]
        return collate([Pack(tuple(documents), 0)], self.spec)

    def ours(self, model: MultimodalModel) -> Tensor:
        """Our logits."""
        return model.head(model(self.batch()).hidden)

    def theirs(self, model: Any) -> Tensor:
        """Their logits, one call a page."""
        return torch.cat([model(**inputs).logits[0] for inputs in self.inputs])


def compare(
    ours: MultimodalModel, theirs: Any, seen: Seen, folder: Path, parity: Recorder, bounds: tuple[float, float]
) -> None:
    """Logits, loss, the gradient of every parameter, and a packed document against it alone.

    Args:
        ours: Imported from ``theirs``.
        theirs: Of transformers.
        seen: On what.
        folder: For files in between.
        parity: Records the errors.
        bounds: Of values, and of gradients.
    """
    family = theirs.config.model_type
    batch = seen.batch()
    hidden = ours(batch).hidden
    logits, expected = ours.head(hidden), seen.theirs(theirs)
    parity(family, "logits", distance(logits, expected), bounds[0])
    weights = batch.loss_weights * torch.rand(len(batch.labels), generator=torch.Generator().manual_seed(3))
    loss = ours.head(hidden, labels=batch.labels, loss_weights=weights)
    reference = (F.cross_entropy(expected, batch.labels, reduction="none", ignore_index=-100) * weights).sum()
    parity(family, "loss", distance(loss, reference), bounds[0])
    loss.backward()
    reference.backward()
    gradients = their_gradients(theirs, folder)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        gradient = gradients.pop(name)
        # That of a key's bias nearly cancels: without rotations it would be zero.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = float((parameter.grad - gradient).abs().max()) / scale
        print(f"{error:.2e} {name}")
        parity(family, "gradients", error, bounds[1])
    assert not gradients
    for number, rows in enumerate(logits.split([document.num_tokens for document in seen.documents])):
        alone = ours.head(ours(seen.batch(number)).hidden)[: len(rows)]
        parity(family, "a packed document against it alone", distance(alone, rows), bounds[0])


def _rounded(source: Path, ours: MultimodalModel, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in bfloat16, ours and theirs, and in float32.

    Args:
        source: Weights in bfloat16.
        ours: The same, imported; becomes bfloat16.
        seen: On what.
    """
    import transformers

    auto = transformers.AutoModelForImageTextToText
    with torch.no_grad():
        truth = seen.theirs(auto.from_pretrained(source, dtype=torch.float32).eval())
        theirs = seen.theirs(auto.from_pretrained(source, dtype=torch.bfloat16).eval())
        return seen.ours(ours.bfloat16()), theirs, truth


def bfloat16_ratio(
    twin: Callable[[int], Any], seen: Callable[[Path, MultimodalModel, list[Page]], Seen], folder: Path
) -> float:
    """Our errors of bfloat16 over theirs, summed over four twins.

    Args:
        twin: A model of transformers, by seed.
        seen: Pages as both sides see them.
        folder: For files in between.
    """

    def one(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        place = folder / str(seed)
        twin(seed).bfloat16().save_pretrained(place / "theirs")
        ours, _ = imported(place / "theirs", place / "run")
        return _rounded(place / "theirs", ours, seen(place, ours, [PAGES["several"], PAGES["picture first"]]))

    return rounding_ratio(one(seed) for seed in range(4))


def assert_back_as_it_came(theirs: Any, seen: Callable[[MultimodalModel], Seen], folder: Path) -> None:
    """Bit for bit through import and export, like the folder and without one; transformers finds each key.

    Args:
        theirs: Of transformers.
        seen: What to compute on.
        folder: For what is written.
    """
    theirs.save_pretrained(folder / "theirs", max_shard_size="50KB")
    ours, checkpoint = imported(folder / "theirs", folder / "run")
    save_tokenizer(folder / "theirs" / "tokenizer.json", ["beside"])
    before = tensors_of(folder / "theirs")
    source = loaded(folder / "theirs", AUTO)
    inputs = seen(ours).inputs
    with torch.no_grad():
        expected = [source(**one).logits for one in inputs]
    for name, like in (("back", HuggingFace(folder / "theirs")), ("alone", HuggingFace())):
        report = export_weights(checkpoint, folder / name, to=like, shard_bytes=100_000)
        assert report.family == theirs.config.model_type
        after = tensors_of(folder / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        again = loaded(folder / name, AUTO)
        if like.like is None:  # Token ids are those of the published model.
            again.config.image_token_id = theirs.config.image_token_id
        else:
            assert again.config.to_dict() == {**source.config.to_dict(), "_name_or_path": str(folder / name)}
            assert (folder / name / "tokenizer.json").read_bytes() == (folder / "theirs/tokenizer.json").read_bytes()
        with torch.no_grad():
            assert all(torch.equal(again(**one).logits, logits) for one, logits in zip(inputs, expected, strict=True))


def normalised(vision: VisionConfig, patches: Tensor) -> Tensor:
    """The pixels that the tower multiplies: its patch projection, with the identity for weights of the first frame."""
    embed = PatchEmbed(
        vision.channels,
        vision.patch_size,
        patches.shape[1],
        vision.mean,
        vision.std,
        bias=False,
        frames=vision.temporal_patch,
    )
    pixels = vision.patch_size**2
    weight = torch.zeros(patches.shape[1], vision.channels, vision.temporal_patch, pixels)
    weight[:, :, 0] = torch.eye(patches.shape[1]).view(-1, vision.channels, pixels)
    with torch.no_grad():
        embed.projection.weight.copy_(weight.flatten(1))
        return embed(patches)


def odd_pages(count: int, smallest: int, largest: int) -> list[Page]:
    """Pages of one to four pictures of random sizes, so many pictures in all, with text between most of them."""
    rng = np.random.default_rng(0)
    pages: list[Page] = []
    while count > 0:
        pictures = min(count, int(rng.integers(1, 5)))
        count -= pictures
        page: list[str | tuple[int, int]] = []
        for _ in range(pictures):
            page.append("x" * int(rng.integers(0, 9)))
            height, width = (int(side) for side in rng.integers(smallest, largest, 2))
            page.append((height, width))
        pages.append([part for part in [*page, "end"] if part])
    return pages
