"""Documents of text and pictures: ours come from the data pipeline, theirs from the processors of transformers.

A page lists texts and sizes (height, width) of pictures. ``Seen`` holds the inputs that both sides build from pages.
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
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, Tokenizer, load_tokenizer
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.patch_embed import PatchEmbed
from tests.hf.reference_models import import_reference, imported, loaded, tensors_of, their_gradients
from tests.models.reference_models import distance, rounding_ratio
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
    """Write a ``tokenizer.json`` of single bytes and special tokens; 0, 1, 2 are padding, beginning and end."""
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
    """Return an image with smooth colours that depend on its size."""
    rng = np.random.default_rng(size)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    return coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def stored(image: Image.Image) -> bytes:
    """Return the image as a shard stores it."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def builder(tokenizer: Tokenizer, spec: MediaSpec, transforms: dict[str, Any]) -> DocumentBuilder:
    """Return a builder of pages whose text is learned completely."""
    block = {"name": "x", "manifest": "x", "template": {"kind": "interleaved"}, "transforms": transforms}
    return DocumentBuilder(DatasetConfig.model_validate(block), tokenizer, spec)


def document(build: DocumentBuilder, page: Page) -> Document:
    parts = [TextPart(part) if isinstance(part, str) else ImagePart(stored(picture(part)), "png") for part in page]
    return build(Sample(tuple(parts), {}, Provenance("x", "shard", "key", 0)))


def written(page: Page, image: str) -> tuple[str, list[Image.Image]]:
    """Return a page for their processors: a text with ``image`` for each picture, and the pictures."""
    text = "".join(part if isinstance(part, str) else image for part in page)
    return f"{BOS}{text}{EOS}", [picture(part) for part in page if not isinstance(part, str)]


def load(path: Path, image_token: str) -> Tokenizer:
    return load_tokenizer(HuggingFaceTokenizerConfig(path=path, image_token=image_token))


@dataclass(frozen=True)
class Seen:
    """Pages as inputs of both implementations.

    Attributes:
        documents: Our documents.
        inputs: Arguments of their model, page by page.
        spec: Media that our model accepts.
    """

    documents: list[Document]
    inputs: list[dict[str, Tensor]]
    spec: MediaSpec

    @classmethod
    def of(cls, build: DocumentBuilder, process: Callable[[Page], dict[str, Tensor]], pages: Sequence[Page]) -> Seen:
        """Build the inputs of pages; asserts that both sides give the same token ids."""
        documents = [document(build, page) for page in pages]
        inputs = [process(page) for page in pages]
        for ours, theirs in zip(documents, inputs, strict=True):
            assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
        return cls(documents, inputs, build.spec)

    def batch(self, number: int | None = None) -> MultimodalBatch:
        """Return all documents in one pack, or a single one. A text without images gets a dummy document."""
        documents = self.documents if number is None else [self.documents[number]]
        if not any(document.num_images for document in documents):
            documents = [*documents, dummy_document(self.spec, pad_id=0)]
        return collate([Pack(tuple(documents), 0)], self.spec)

    def ours(self, model: MultimodalModel) -> Tensor:
        """Return our logits."""
        return model.head(model(self.batch()).hidden)

    def theirs(self, model: Any) -> Tensor:
        """Return their logits, with one call per page."""
        logits = []
        for inputs in self.inputs:
            if "pixel_values" in inputs:  # Not every class casts them.
                inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
            logits.append(model(**inputs).logits[0])
        return torch.cat(logits)


def compare(
    ours: MultimodalModel, theirs: Any, seen: Seen, folder: Path, parity: Recorder, bounds: tuple[float, float]
) -> None:
    """Compare logits, loss, the gradient of every parameter, and a packed document with the same document alone.

    Args:
        ours: Our model, imported from ``theirs``.
        theirs: Model of transformers.
        seen: Inputs.
        folder: Folder for temporary files.
        parity: Records the errors.
        bounds: Bounds of the errors of values and of gradients.
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
        if not parameter.requires_grad:  # Stored sinusoids.
            assert not gradient.any()
            continue
        # The gradient of a key's bias nearly cancels: without RoPE it would be zero.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = float((parameter.grad - gradient).abs().max()) / scale
        print(f"{error:.2e} {name}")
        parity(family, "gradients", error, bounds[1])
    assert not gradients
    for number, rows in enumerate(logits.split([document.num_tokens for document in seen.documents])):
        alone = ours.head(ours(seen.batch(number)).hidden)[: len(rows)]
        parity(family, "a packed document against it alone", distance(alone, rows), bounds[0])


def bfloat16_ratio(
    make_reference: Callable[[int], Any],
    seen: Callable[[Path, MultimodalModel, list[Any]], Seen],
    folder: Path,
    pages: Sequence[Any] = (PAGES["several"], PAGES["picture first"]),
    auto: str = AUTO,
) -> float:
    """Return the ratio of our errors in bfloat16 to theirs, summed over four models.

    Args:
        make_reference: Returns a model of transformers for a seed.
        seen: Returns the inputs of both sides.
        folder: Folder for temporary files.
        pages: Pages whose logits are compared.
        auto: Class of transformers that loads the models.
    """
    import transformers

    @torch.no_grad()
    def one(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        place = folder / str(seed)
        ours = import_reference(make_reference(seed).bfloat16(), place)
        inputs = seen(place, ours, [*pages])
        truth, rounded = (
            getattr(transformers, auto).from_pretrained(place / "theirs", dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
        return inputs.ours(ours.bfloat16()), inputs.theirs(rounded), inputs.theirs(truth)

    return rounding_ratio(one(seed) for seed in range(4))


def assert_round_trip(theirs: Any, seen: Callable[[MultimodalModel], Seen], folder: Path) -> None:
    """Assert that import and export, with and without ``--like``, give back the same bits and load in transformers.

    Args:
        theirs: Model of transformers.
        seen: Returns the inputs.
        folder: Folder for temporary files.
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
        if like.like is None:  # Without --like the token ids are those of the published model.
            again.config.image_token_id = theirs.config.image_token_id
        else:
            assert again.config.to_dict() == {**source.config.to_dict(), "_name_or_path": str(folder / name)}
            assert (folder / name / "tokenizer.json").read_bytes() == (folder / "theirs/tokenizer.json").read_bytes()
        with torch.no_grad():
            assert all(torch.equal(again(**one).logits, logits) for one, logits in zip(inputs, expected, strict=True))


def normalised(vision: VisionConfig, patches: Tensor) -> Tensor:
    """Return the normalised pixels: the output of a patch projection that is the identity for the first frame."""
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
    """Return pages of one to four pictures of random sizes, ``count`` in all, with text between most of them."""
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
