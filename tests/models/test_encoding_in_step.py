"""Images that the model encodes in each step give the batches, losses and gradients of stored codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MultimodalBatch
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.transforms import TilesTransform
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.truncation import split
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from mmscale.models.build import build_model, media_spec
from mmscale.models.multimodal import MultimodalModel
from mmscale.objectives.next_token import NextToken
from tests.data_pipeline.conftest import tokenizer_path as tokenizer_path
from tests.engine.ranks import run_ranks
from tests.models.encoders import CODES, SEED, TOKENS, batch, dataset, documents, samples, settings


def net_of(kind: str) -> MultimodalModel:
    net = build_model(settings(kind), seed=SEED)
    assert isinstance(net, MultimodalModel)
    return net


def both(kind: str, path: Path, count: int = 6) -> tuple[MultimodalModel, Any, Any]:
    """Return the model and (documents, spec), encoded in the step and stored."""
    net = net_of(kind)
    assert net.image_tokenizer is not None
    made = samples(net.image_tokenizer, count)
    return net, documents(kind, path, "in_step", made), documents(kind, path, "stored", made)


def loss_and_gradients(net: MultimodalModel, found: Any) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    output = NextToken()(net, net.with_codes(found))
    output.loss_sum.backward()
    return output.loss_sum.detach(), {
        name: each.grad.clone() for name, each in net.named_parameters() if each.grad is not None
    }


def by_modality(net: MultimodalModel, coded: MultimodalBatch) -> list[float]:
    """Return the weighted mean cross-entropy of text and of codes, written out from the logits."""
    ids, hidden = net.config.decoder.image_ids, net(coded).hidden
    is_code = (coded.labels >= ids.start) & (coded.labels < ids.stop)
    if net.head.image is None:
        losses = F.cross_entropy(net.head(hidden), coded.labels, reduction="none")
    else:
        text = F.cross_entropy(net.head(hidden), coded.labels.masked_fill(is_code, -100), reduction="none")
        codes = (coded.labels - ids.start).masked_fill(~is_code, -100)
        losses = text + F.cross_entropy(net.head.image(hidden), codes, reduction="none")
    means = []
    for chosen in (~is_code, is_code):
        weights = coded.loss_weights * chosen
        means.append(float((losses.detach() * weights).sum() / weights.sum()))
    return means


@pytest.mark.parametrize("kind", TOKENS)
def test_the_metrics_have_the_cross_entropy_of_each_modality(kind: str, tokenizer_path: Path) -> None:
    net, (pixels, spec), _ = both(kind, tokenizer_path)
    coded = net.with_codes(batch(pixels, spec))
    parts = NextToken()(net, coded).parts
    found = [float(parts[f"cross_entropy_{name}"][0] / parts[f"cross_entropy_{name}"][1]) for name in ("text", "image")]
    assert found == pytest.approx(by_modality(net, coded), rel=1e-5)
    texts = NextToken()(net, replace(coded, drawn=None)).parts["cross_entropy_image"]
    assert [float(each) for each in texts] == [0, 0]


@pytest.mark.parametrize("kind", TOKENS)
def test_batch_loss_and_gradients_are_those_of_stored_codes(kind: str, tokenizer_path: Path) -> None:
    net, (pixels, spec), (grids, stored_spec) = both(kind, tokenizer_path)
    assert all(
        a.num_tokens == b.num_tokens and a.drawn.tolist() == b.drawn.tolist()
        for a, b in zip(pixels, grids, strict=True)
    )
    ours, theirs = batch(pixels, spec), batch(grids, stored_spec)
    length = theirs.segments.total  # The batches differ in the dummy document at their end.
    coded = net.with_codes(ours)
    assert ours.uncoded is not None
    assert len(ours.uncoded.learned) > 20
    for name in ("token_ids", "labels", "loss_weights"):
        torch.testing.assert_close(
            getattr(coded, name)[: length - 1], getattr(theirs, name)[: length - 1], rtol=0, atol=0
        )
    assert len(set(coded.token_ids[coded.drawn].tolist())) > 4
    (loss, gradients), (expected, expected_gradients) = loss_and_gradients(net, ours), loss_and_gradients(net, theirs)
    assert loss == expected
    assert gradients.keys() == expected_gradients.keys()
    assert not any(name.startswith("image_tokenizer") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", TOKENS)
def test_joined_packs_and_cut_documents_keep_whole_images(kind: str, tokenizer_path: Path) -> None:
    net, (pixels, spec), (grids, _) = both(kind, tokenizer_path)
    packs = [batch([each], spec, lane) for lane, each in enumerate(pixels)]
    joined, whole = concatenate(packs, spec), [net.with_codes(each) for each in packs]
    torch.testing.assert_close(net.with_codes(joined).token_ids, torch.cat([each.token_ids for each in whole]))
    torch.testing.assert_close(net.with_codes(joined).labels, torch.cat([each.labels for each in whole]))
    for ours, theirs in zip(pixels, grids, strict=True):
        for most in (17, 21, ours.num_tokens - 1):
            parts, expected = (list(split(each, lambda part, m=most: part.num_tokens <= m)) for each in (ours, theirs))
            assert sum(len(part.uncoded) for part in parts) == sum(len(part.images) for part in parts)
            for part, other in zip(parts, expected, strict=True):
                coded = net.with_codes(collate([Pack((part,), 0)], spec))
                assert coded.token_ids.tolist() == other.token_ids.tolist()
                followed = theirs.drawn[len(part.token_ids)] if part is parts[0] and len(parts) > 1 else False
                unknown = -1 if followed else len(other.labels)
                assert coded.labels.tolist()[:unknown] == other.labels.tolist()[:unknown]


@pytest.mark.fault
def test_settings_and_images_that_do_not_fit_are_refused(tokenizer_path: Path) -> None:
    net = net_of("vocabulary")
    assert net.image_tokenizer is not None
    (sample,) = samples(net.image_tokenizer, 1)
    text, spec = load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path)), media_spec(net.config, encodes=True)
    one = dataset("vocabulary", encoded="in_step")
    grid = dataset("vocabulary", encoded="in_step", grid=[4, 4])
    with pytest.raises(SampleError, match=r"image png is a grid of 3x4 codes, but the model draws 4x4"):
        DocumentBuilder(grid, text, spec)(sample)
    with pytest.raises(DataConfigError, match="the model has no image tokenizer"):
        DocumentBuilder(one, text, media_spec(net.config))
    tiles = one.model_copy(update={"transforms": TilesTransform(size=8)})
    with pytest.raises(DataConfigError, match=r"transforms\.kind=tiles: cuts an image into several crops"):
        DocumentBuilder(tiles, text, spec)
    for wrong in ({"tokenizer": "ab" * 32}, {"first_id": None, "ids": list(range(CODES))}):
        with pytest.raises(ValidationError, match="encoded=in_step: the model's own tokenizer encodes"):
            dataset("vocabulary", encoded="in_step", **wrong)


def test_a_batch_with_images_needs_a_tokenizer(tokenizer_path: Path) -> None:
    net, (pixels, spec), _ = both("vocabulary", tokenizer_path, 1)
    net.image_tokenizer = None
    with pytest.raises(ValueError, match="no image_tokenizer to encode them"):
        net(batch(pixels, spec))


@pytest.mark.parametrize("kind", TOKENS)
def test_the_operations_of_a_step_include_those_of_the_encoder(kind: str, tokenizer_path: Path) -> None:
    net, (pixels, spec), _ = both(kind, tokenizer_path, 3)
    tokenizer = net.image_tokenizer
    assert tokenizer is not None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tokenizer.encode(torch.zeros(1, 3, 64, 64))
    rows, search = 32 * 32, 2 * tokenizer.codebook_size * 4  # Distances to codes of 4 channels.
    ours = batch(pixels, spec)
    found = (
        net.training_flops(ours, ["decoder"]).forward - net.training_flops(net.with_codes(ours), ["decoder"]).forward
    )
    assert ours.uncoded is not None
    expected = len(ours.uncoded.slots) * (counter.get_total_flops() / rows - search)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("kind", ["vocabulary", "separate"])
def test_two_sharded_ranks_train_as_one_process_with_stored_codes(kind: str, tokenizer_path: Path) -> None:
    """The second rank has a pack without images, and ranks have grids of different sizes."""
    results = run_ranks("tests.models.encoders:run", 2, {"kind": kind, "tokenizer_path": str(tokenizer_path)})
    assert results[0] == results[1]
    first, second = results[0]
    net, _, (grids, spec) = both(kind, tokenizer_path, 3)
    stored = batch(grids, spec)
    loss, gradients = loss_and_gradients(net, stored)
    learned = [each for name, each in gradients.items() if not name.startswith("image_tokenizer")]
    norm = torch.stack([each.square().sum() for each in learned]).sum().sqrt()
    text, image = by_modality(net, stored)
    expected = {"loss": float(loss) / stored.weight, "norm": float(norm) / stored.weight}
    expected |= {"cross_entropy_text": text, "cross_entropy_image": image}
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert second["loss"] < first["loss"]
