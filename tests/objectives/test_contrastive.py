"""The contrastive loss of a step, for several divisions of its pairs, against autograd over all similarities."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss as clip_loss

from data_pipeline.batch import MultimodalBatch
from mmscale.dist import World
from mmscale.models.build import build_model, media_spec
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.models.connectors.contrastive import PairVectors
from mmscale.models.contrastive import ContrastiveModel
from mmscale.objectives import contrastive
from mmscale.objectives.contrastive import Contrastive, PreparedBatch
from tests.engine.ranks import run_ranks
from tests.objectives.pairs import CAPPED, SCALE_PAST_ITS_LIMIT, SIGMOID, SOFTMAX, batch_of, model_config, written_out

pytestmark = pytest.mark.dist
ALONE = World(0, 1, 0, torch.device("cpu"))
DEALS = [[[0, 1, 2, 3, 4, 5, 6]], [[0, 1, 2], [], [3, 4, 5, 6]], [[0], [1, 2, 3, 4], [5, 6]], [[0, 1], [2, 3, 4, 5, 6]]]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def truth(connector: dict[str, Any], past: float = 0.0) -> tuple[Any, torch.Tensor, torch.Tensor, dict[str, Any]]:
    config = model_config(connector)
    model = build_model(config, attention="sdpa", seed=3)
    with torch.no_grad():
        model.connector.logit_scale += past
    loss, shares = written_out(config, model(batch_of(media_spec(config), DEALS[0][0])))
    loss.backward()
    return model, loss.detach(), shares.detach(), gradients(model)


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("connector", [SOFTMAX, SIGMOID])
def test_loss_and_gradients_are_those_of_the_whole_step(
    connector: dict[str, Any], deal: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "_ROWS", 3)
    model, loss, shares, expected = truth(connector)
    spec, objective = media_spec(model.config), Contrastive(model.config.connector, ALONE)
    batches = [batch_of(spec, numbers) for numbers in deal]
    weight = sum(objective.weight(batch) for batch in batches)
    assert weight == 7
    with torch.no_grad():
        prepared = objective.prepare(model, batches)
    outputs = [objective(model, batch) for batch in prepared]
    sum(output.loss_sum / weight for output in outputs).backward()
    found = gradients(model)
    torch.testing.assert_close(sum(output.loss_sum for output in outputs) / weight, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        worst, largest = (found[name] - gradient).abs().max(), gradient.abs().max()
        assert worst <= 2e-5 * largest + 1e-7, f"{name}: {worst} of {largest}"
    # Each document has its term; dummy documents have none.
    documents = torch.cat([output.document_losses[:-1] for output in outputs])
    torch.testing.assert_close(documents, shares)
    assert all(output.document_losses[-1] == 0 for output in outputs)


def test_softmax_equals_the_loss_of_clip_and_counts_correct_matches() -> None:
    model, _, _, _ = truth(SOFTMAX)
    batch = batch_of(media_spec(model.config), DEALS[0][0])
    vectors = model(batch)
    logits = vectors.log_scale.exp() * vectors.images @ vectors.texts.T
    output = Contrastive(model.config.connector, ALONE)(model, batch)
    torch.testing.assert_close(output.loss_sum / 7, clip_loss(logits.T))
    own = torch.arange(7)
    assert output.metrics["image_to_text_accuracy"] == (logits.argmax(1) == own).sum()
    assert output.metrics["text_to_image_accuracy"] == (logits.argmax(0) == own).sum()
    torch.testing.assert_close(output.metrics["similarity_scale"] / 7, torch.tensor(1 / 0.07))
    assert ("similarity_bias" in output.metrics) == (vectors.bias is not None)


class GivenVectors(ContrastiveModel):
    """Returns parts of given vectors, one after the other."""

    def __init__(self, vectors: PairVectors, parts: Sequence[torch.Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.vectors, self.parts = vectors, itertools.cycle(parts)

    def forward(self, batch: MultimodalBatch) -> PairVectors:
        rows = next(self.parts)
        assert len(batch.pairs) == len(rows)
        return replace(self.vectors, images=self.vectors.images[rows], texts=self.vectors.texts[rows])


@pytest.mark.parametrize("noise", [0.1, 0.13, 0.16, 0.2])
@pytest.mark.parametrize("parts", [1, 5])
def test_no_farther_from_the_truth_than_torch(noise: float, parts: int) -> None:
    """Losses of 5e-9, 4e-7, 3e-3 and 0.2 in float32, of one and of several microbatches, against float64.

    Measured errors, ours relative to torch's: in the loss 0.01, 0.2, 0.75, 0.9; in gradients 0.01, 0.3, 0.97, 0.86.
    """
    worst = {"loss": [0.0, 0.0], "gradient": [0.0, 0.0]}
    log_scale = torch.tensor(99.0).log()
    scale = log_scale.exp()
    spec = media_spec(model_config(SOFTMAX))
    batches = [batch_of(spec, part.tolist()) for part in torch.arange(40).chunk(parts)]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        images = F.normalize(torch.randn(40, 16, generator=generator))
        texts = F.normalize(images + noise * torch.randn(40, 16, generator=generator))
        images.requires_grad_()
        loss = clip_loss((scale * images @ texts.T).T)
        (image_gradient,) = torch.autograd.grad(loss, images)
        exact_images = images.detach().double().requires_grad_()
        exact = clip_loss((scale.double() * exact_images @ texts.double().T).T)
        (exact_gradient,) = torch.autograd.grad(exact, exact_images)
        config = ContrastiveConnectorConfig.model_validate({"kind": "contrastive", "dim": 16, "max_scale": 100.0})
        rows = torch.arange(40).chunk(parts)
        model = GivenVectors(PairVectors(images, texts, log_scale, None), rows)
        objective = Contrastive(config, ALONE)
        with torch.no_grad():
            prepared = objective.prepare(model, batches)
        outputs = [objective(model, batch) for batch in prepared]
        total = sum(output.loss_sum for output in outputs) / 40
        (found,) = torch.autograd.grad(total, images)
        for name, mine, theirs, truth in (
            ("loss", total, loss, exact),
            ("gradient", found, image_gradient, exact_gradient),
        ):
            for each, value in enumerate((mine, theirs)):
                worst[name][each] = max(worst[name][each], float((value - truth).detach().abs().max()))
    for name, (mine, theirs) in worst.items():
        assert mine <= theirs * 1.25, f"{name}: {mine:.2e}, torch {theirs:.2e}"


@pytest.mark.parametrize("past", [0.5, -0.5])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [1.0, 0.002])
def test_a_scale_past_its_limit_learns_to_fall_and_never_to_rise(
    shift: int, past: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each image is similar to its own text, a larger scale lowers the loss; if to another text, it raises it."""
    model, _, _, _ = truth(CAPPED)
    images, texts = torch.eye(7), size * (0.9 * torch.eye(7).roll(shift, 0) + 0.02)
    log_scale = (torch.tensor(CAPPED["max_scale"]).log() + past).requires_grad_()
    monkeypatch.setattr(model, "forward", lambda batch: PairVectors(images, texts, log_scale, None))
    output = Contrastive(model.config.connector, ALONE)(model, batch_of(media_spec(model.config), DEALS[0][0]))
    output.loss_sum.backward()
    free = log_scale.detach().clamp(max=torch.tensor(CAPPED["max_scale"]).log()).requires_grad_()
    loss = 7 * clip_loss((free.exp() * images @ texts.T).T)
    output_gradient = torch.autograd.grad(loss, free)[0]
    assert (output_gradient < 0) == (shift == 0)
    assert size == 1 or 0.01 < output_gradient.abs() < 1
    torch.testing.assert_close(output.loss_sum, loss)
    expected = output_gradient if past < 0 else output_gradient.clamp(min=0)
    torch.testing.assert_close(log_scale.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("worse", [False, True])
def test_ranks_decide_together_whether_a_scale_past_its_limit_falls(worse: bool) -> None:
    """Three ranks, one without pairs: the gradient of the first rank's pairs has the opposite sign of the sum."""
    deal = [[0, 1], [], [2, 3, 4, 5, 6]]
    # The images outside of the first rank are similar to their own text.
    partner = torch.tensor([0, 1, 3, 4, 5, 6, 2] if worse else [1, 0, 2, 3, 4, 5, 6])
    images, texts = torch.eye(7), 0.1 * torch.eye(7)[partner] + 0.01
    limit = torch.tensor(CAPPED["max_scale"]).log().requires_grad_()
    free_images = images.clone().requires_grad_()
    logits = limit.exp() * free_images @ texts.T
    own = torch.arange(7)
    shares = (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2
    (first_slope,) = torch.autograd.grad(shares[deal[0]].sum(), limit, retain_graph=True)
    output_gradient, image_slopes = torch.autograd.grad(shares.sum(), (limit, free_images))
    assert (output_gradient > 0) == worse == (first_slope < 0)

    config = model_config(CAPPED)
    spec, sent, all_there = media_spec(config), [torch.empty(0)] * 3, threading.Barrier(3, timeout=60)

    class ThreadRank(World):
        def gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
            sent[self.rank] = rows
            all_there.wait()
            found = list(sent)
            all_there.wait()
            return found

    def step(rank: int) -> tuple[torch.Tensor, ...]:
        past = (limit.detach() + 0.5).requires_grad_()
        mine = images.clone().requires_grad_()
        model = GivenVectors(PairVectors(mine, texts, past, None), [torch.tensor(deal[rank], dtype=torch.int64)])
        objective = Contrastive(config.connector, ThreadRank(rank, 3, rank, torch.device("cpu")))
        try:
            output = objective(model, batch_of(spec, deal[rank]))
        except BaseException:
            all_there.abort()  # Otherwise the other ranks would wait for this one.
            raise
        return output.loss_sum.detach(), *torch.autograd.grad(output.loss_sum, (past, mine))

    with ThreadPoolExecutor(3) as pool:
        losses, of_scale, of_images = map(torch.stack, zip(*pool.map(step, range(3)), strict=True))
    torch.testing.assert_close(losses, torch.stack([shares[pairs].sum() for pairs in deal]).detach())
    torch.testing.assert_close(of_scale.sum(), output_gradient.clamp(min=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_images.sum(0), image_slopes, rtol=1e-4, atol=1e-6)


def test_sigmoid_reports_its_bias() -> None:
    model, _, _, _ = truth(SIGMOID)
    with torch.no_grad():
        model.connector.logit_bias.fill_(-2.5)
    output = Contrastive(model.config.connector, ALONE)(model, batch_of(media_spec(model.config), DEALS[0][0]))
    assert output.metrics["similarity_bias"].item() == pytest.approx(7 * -2.5)


def test_prepare_adds_vectors_only_to_several_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of similarities, of an image or a text, is computed twice: for its normaliser and for its gradient."""
    rows, logits = list[int](), contrastive._logits

    def counted(pairs: contrastive.StepPairs, part: slice) -> torch.Tensor:
        rows.append(part.stop - part.start)
        return logits(pairs, part)

    monkeypatch.setattr(contrastive, "_logits", counted)
    model, _, _, _ = truth(SOFTMAX)
    spec, objective = media_spec(model.config), Contrastive(model.config.connector, ALONE)
    batches = [batch_of(spec, numbers) for numbers in ([0, 1], [2])]
    with torch.no_grad():
        assert objective.prepare(model, batches[:1]) == batches[:1]
        prepared = objective.prepare(model, batches)
    for each, first in zip(prepared, (0, 2), strict=True):
        assert isinstance(each, PreparedBatch)
        moved = each.to("meta")
        assert moved.batch.token_ids.device.type == moved.batch.media["image"].values.device.type == "meta"
        assert (moved.pairs, moved.first) == (each.pairs, first)
        assert each.batch.token_ids.device.type == "cpu"
        objective(model, each)
    assert sum(rows) == 2 * (3 + 3)


@pytest.mark.parametrize("worse", [False, True])
def test_a_scale_past_its_limit_comes_back_and_goes_no_further(worse: bool) -> None:
    """The loss uses the clamped scale; above the limit only a gradient that lowers the scale applies."""
    model, _, _, _ = truth(CAPPED, SCALE_PAST_ITS_LIMIT)
    with torch.no_grad():
        if not worse:  # Images and texts are similar: a larger scale would lower the loss.
            model.connector.visual_projection.weight.zero_()[:, 0] = 1
            model.connector.text_projection.weight.zero_()[:, 0] = 1
    batch = batch_of(media_spec(model.config), DEALS[0][0])
    with torch.no_grad():
        vectors = model(batch)
    scale = torch.tensor(20.0).requires_grad_()
    logits = scale * vectors.images @ vectors.texts.T
    output_gradient = torch.autograd.grad(clip_loss(logits.T), scale)[0] * 20
    output = Contrastive(model.config.connector, ALONE)(model, batch)
    (output.loss_sum / 7).backward()
    torch.testing.assert_close(output.loss_sum / 7, clip_loss(logits.T))
    torch.testing.assert_close(
        model.connector.logit_scale.grad, output_gradient.clamp(min=0).view(1), rtol=1e-4, atol=1e-6
    )


def test_steps_do_not_depend_on_the_division_of_pairs_among_ranks() -> None:
    """Two AdamW steps; one rank has no pair, or microbatches have different sizes, or some are empty."""
    idle = [[[0, 1, 2, 3, 4, 5, 6]], [[]]]
    uneven = [[[0, 1], [2, 3, 4]], [[5], [6]]]
    empty = [[[], [0]], [[1, 2, 3, 4, 5, 6], []]]
    plan = [(idle, SOFTMAX, 3), (uneven, SOFTMAX, 0), (empty, SOFTMAX, 3), (empty, SIGMOID, 3)]
    cases = [
        {"steps": [deal, deal], "connector": connector, "zero": zero, "activation_checkpointing": deal is empty}
        for deal, connector, zero in plan
    ]
    reported = run_ranks("tests.objectives.pairs:train", 2, {"cases": cases})
    later: dict[str, Any] = {}
    for number, (deal, connector, _) in enumerate(plan):
        _, loss, shares, gradients = truth(connector)
        norms = {
            part: torch.stack([g.norm() for n, g in gradients.items() if n.startswith(part)]).norm().item()
            for part in ("vision", "connector", "decoder")
        }
        first, second = reported[0][number]["reports"]
        assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert first["weight"] == 7
        assert first["norms"] == pytest.approx(norms, rel=1e-4)
        for rank, pairs in zip(reported, deal, strict=True):
            told = list(itertools.chain(*rank[number]["reports"][0]["documents"]))
            assert told == pytest.approx(shares[list(itertools.chain(*pairs))].tolist(), rel=1e-4)
        same = later.setdefault(str(connector), second)
        assert second["loss"] == pytest.approx(same["loss"], rel=1e-4)
        assert second["metrics"] == pytest.approx(same["metrics"], rel=1e-3)
        assert second["loss"] < loss
