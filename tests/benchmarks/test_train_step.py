"""The step benchmark: both models are equal, padding keeps all data, and a tiny run gives every value."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks import train_step
from benchmarks.steps import reference_models
from benchmarks.steps.batches import DATA, make_batches
from benchmarks.steps.theirs import trainer_config
from mmscale.models.build import build_model
from mmscale.objectives.next_token import NextToken

CASES = [(model, data, tolerance) for model, tolerance in (("dense", 1e-5), ("mllama", 0.02)) for data in DATA]
CASES += [("olmoe", "equal", 1e-5), ("active", "mixed", 1e-5)]


@pytest.mark.parametrize(("model", "data", "tolerance"), CASES)
def test_both_sides_learn_the_same_from_the_same_documents(model: str, data: str, tolerance: float) -> None:
    pair = make_batches(model, data, rank=0, world_size=1, steps=1, max_tokens=512)[0]
    theirs = reference_models.their_model(model)
    ours = build_model(reference_models.our_config(model), seed=None)
    reference_models.fill_from(reference_models.weights_for_ours(theirs))(ours, gather=lambda _: torch.no_grad())
    with torch.no_grad():
        mine = NextToken()(ours, pair.packed).loss_sum / pair.weight
        loss = theirs(**pair.padded, num_items_in_batch=torch.tensor(pair.weight)).loss
    assert float(mine) == pytest.approx(float(loss), rel=tolerance)


def test_padding_keeps_every_document_and_picture() -> None:
    pair = make_batches("mllama", "mixed", rank=0, world_size=1, steps=1, max_tokens=256)[0]
    packed, padded = pair.packed, pair.padded
    lengths = padded["attention_mask"].sum(1).tolist()
    rows = [packed.token_ids[a:b] for a, b in pairwise(packed.segments.bounds)]
    kept = [row for row, origin in zip(rows, packed.provenance, strict=True) if origin is not None]
    assert lengths == [len(row) for row in kept]
    for row, ids in zip(kept, padded["input_ids"], strict=True):
        assert ids[: len(row)].equal(row)
    assert int((padded["labels"] != -100).sum()) == pair.weight
    media = packed.media["image"]
    shown = padded["pixel_values"][padded["aspect_ratio_ids"] == 1]  # (N, 1, 3, side, side)
    assert len(shown) == media.items.num
    first = (media.values[0].view(3, 8, 8).float() / 255 - 0.5) / 0.5  # The first patch is the upper left corner.
    torch.testing.assert_close(shown[0, 0, :, :8, :8], first)
    seen = sum(
        (t1 - t0) * (k1 - k0)
        for (t0, t1), (k0, k1) in zip(pairwise(media.span_tokens.bounds), pairwise(media.span_keys.bounds), strict=True)
    )
    assert int(padded["cross_attention_mask"].sum()) * 16 == seen
    assert pair.padding["hugging face"] == pytest.approx(1 - sum(lengths) / padded["input_ids"].numel())


def test_equal_documents_are_equally_long() -> None:
    for model, length in (("dense", 256), ("mllama", 32)):
        pair = make_batches(model, "equal", rank=0, world_size=1, steps=1, max_tokens=512)[0]
        assert pair.padded["input_ids"].shape == (512 // length, length)
        assert set(pair.padding.values()) == {0.0}


def test_automatic_values_are_those_that_transformers_documents() -> None:
    model = reference_models.their_model("dense")
    config = trainer_config(model, 3, "bf16", world_size=2)
    zero = config["zero_optimization"]
    width = reference_models.WIDTH
    assert zero["reduce_bucket_size"] == width * width
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * width * width)
    assert zero["stage3_param_persistence_threshold"] == 10 * width
    assert (config["gradient_clipping"], config["train_batch_size"], config["bf16"]["enabled"]) == (1.0, 2, True)
    assert trainer_config(model, 0, "fp32", world_size=1)["zero_optimization"] == {"stage": 0}


@pytest.mark.dist
@pytest.mark.slow
def test_a_tiny_run_gives_every_figure() -> None:
    words = ["--json", "--ranks", "2", "--models", "dense", "--data", "equal", "--stages", "3"]
    (row,) = train_step.measure(train_step.arguments([*words, "--steps", "2", "--tokens", "256"]))
    assert set(row.tokens_per_second) == set(row.step_ms) == set(row.cpu_ms) == {"ours", "hugging face", "flattened"}
    assert set(row.ratio) == {"hugging face", "flattened"}
    assert row.tokens == 512
    assert row.loss_difference < 1e-5
    assert "ratio" in row.line()
