"""The preference loss of packed pairs, against one forward pass for each prompt with one answer, and against TRL.

Measured worst case of a gradient in float32, relative to its largest value: 2.4e-5, of a gate whose gradient is a sum
that nearly cancels. The gradients of key biases are zero but for rounding, so differences are relative to at least a
thousandth of the model's largest gradient.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from mmscale.models.build import build_model, media_spec
from mmscale.objectives.preference import Preference, pair_places
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import PreferenceConfig
from tests.engine.ranks import run_ranks
from tests.hf.decoders import reference_model
from tests.hf.reference_models import imported, their_gradients
from tests.models.reference_models import distance
from tests.models.tiny import MOE, config
from tests.objectives.answers import answer_document, answer_log_prob, batch_of, pair_document, written_out

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "with next tokens": {"next_token": 0.2, "beta": 0.5},
    "conservative": {"label_smoothing": 0.2, "beta": 0.5},
    "ipo": {"loss": "ipo"},
    "ipo of TRL": {"loss": "ipo", "length_normalised": True},
    "length-normalised": {"length_normalised": True, "beta": 2.0},
}
DEALS = [[[0, 1, 2, 3, 4]], [[3, 0], [], [1, 2, 4]]]


def gradients(model: Any) -> dict[str, Any]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def check(kind: str | None, loss: dict[str, Any], *, is_free: bool = False, deals: Any = DEALS) -> None:
    """Compare loss, gradients, metrics and the losses of documents, for several divisions of the pairs."""
    preference = PreferenceConfig.model_validate(loss)
    model, other = (build_model(config(kind), attention="sdpa", seed=seed) for seed in (1, 2))
    for each in (model, other):
        with torch.no_grad():
            each.head.weight.mul_(10)  # Otherwise all answers are about equally likely.
    spec = media_spec(model.config)
    reference = None if is_free else other
    numbers = list(itertools.chain(*deals[0]))
    expected, metrics = written_out(preference, model, reference, [pair_document(spec, n) for n in numbers])
    expected.sum().backward()
    wanted = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    objective = Preference(preference, () if is_free else [Teacher(other, 1.0, 1.0)])
    for deal in deals:
        total, sums = 0.0, dict.fromkeys(metrics, 0.0)
        assert sum(objective.weight(batch_of(spec, part)) for part in deal) == len(numbers)
        for part in deal:
            output = objective(model, batch_of(spec, part))
            output.loss_sum.backward()
            total += output.loss_sum.item()
            sums = {name: sums[name] + float(value) for name, value in output.metrics.items()}
            documents = expected.detach()[[numbers.index(number) for number in part]]
            torch.testing.assert_close(output.document_losses[: len(part)], documents, rtol=2e-5, atol=1e-5)
        assert total == pytest.approx(expected.sum().item(), rel=1e-5)
        assert sums == pytest.approx(metrics, rel=1e-4, abs=1e-4)
        for name, gradient in gradients(model).items():
            scale = max(float(wanted[name].abs().max()), 1e-3 * largest)
            torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=6e-5 * scale)


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_separate_sequences_however_pairs_are_packed(loss: str) -> None:
    check(None, LOSSES[loss])


@pytest.mark.parametrize("kind", ["embedding", "cross_attention", "hybrid"])
def test_the_images_of_a_prompt_are_shared_by_its_answers(kind: str) -> None:
    check(kind, LOSSES["with next tokens"], deals=DEALS[1:])


def test_without_a_reference_its_log_probabilities_are_0() -> None:
    check(None, {"beta": 0.5}, is_free=True, deals=DEALS[:1])


def test_stored_log_probabilities_replace_the_reference() -> None:
    model, other = (build_model(config(None), attention="sdpa", seed=seed) for seed in (1, 2))
    spec, loss = media_spec(model.config), PreferenceConfig(beta=0.5, next_token=0.2)
    documents = [pair_document(spec, number) for number in range(3)]
    expected, _ = written_out(loss, model, other, documents)
    expected.sum().backward()
    wanted = gradients(model)
    for number, document in enumerate(documents):
        answers = [float(answer_log_prob(other, answer_document(document, each)).detach()) for each in (0, 1)]
        documents[number] = replace(document, reference=tuple(answers))
    packs = [Pack((*documents[:2], dummy_document(spec, 0)), 0), Pack((documents[2],), 1)]
    parts = [collate([pack], spec) for pack in (Pack((dummy_document(spec, 0),), 2), *packs)]
    for batch in (collate(packs, spec), concatenate(parts, spec)):
        output = Preference(loss)(model, batch)
        output.loss_sum.backward()
        assert output.loss_sum.item() == pytest.approx(expected.sum().item(), rel=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(
                gradient, wanted[name], rtol=0, atol=6e-5 * float(wanted[name].abs().max()) + 1e-6
            )


def test_a_model_that_equals_its_reference_has_no_preference() -> None:
    model, other = (build_model(config(None), seed=1) for _ in range(2))
    batch = batch_of(media_spec(model.config), [0, 1, 2])
    for loss, value in (({}, math.log(2)), ({"loss": "ipo", "beta": 0.1}, 25.0)):
        output = Preference(PreferenceConfig.model_validate(loss), [Teacher(other, 1.0, 1.0)])(model, batch)
        assert output.loss_sum.item() / 3 == pytest.approx(value)
        assert output.metrics["reward_margin"].item() == 0


def test_a_loss_that_is_not_finite_reaches_the_engine() -> None:
    """The engine skips such a step. A row without a label must not reach the head, which would index with -100."""
    net = build_model(config(None))
    batch = batch_of(media_spec(net.config), [0, 1])
    weights = batch.loss_weights.where(batch.loss_weights == 0, math.nan)
    output = Preference(PreferenceConfig())(net, replace(batch, loss_weights=weights))
    assert math.isnan(output.loss_sum.item())


def test_only_documents_with_two_answers_are_pairs() -> None:
    net = build_model(config("embedding", mlp=MOE))
    dummies = batch_of(media_spec(net.config), [])
    output = Preference(PreferenceConfig(next_token=1.0))(net, dummies)
    output.loss_sum.backward()
    assert Preference(PreferenceConfig()).weight(dummies) == output.loss_sum.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in net.parameters())
    places = pair_places(batch_of(media_spec(net.config), [0, 1]))
    assert places == ([1, 4], [2, 5], [0, 1])


@pytest.mark.dist
def test_two_ranks_under_stage_3_take_the_step_of_separate_sequences() -> None:
    """One rank has several microbatches, the other an empty one."""
    deal = [[[0, 1], [2]], [[3, 4], []]]
    cases = [{"steps": [deal], "kind": "hybrid", "zero": 3, "moe": False}]
    found = run_ranks("tests.objectives.answers:train", 2, {"cases": cases})
    model, other = (build_model(config("hybrid"), attention="sdpa", seed=seed) for seed in (3, 4))
    documents = [pair_document(media_spec(model.config), number) for number in range(5)]
    expected, metrics = written_out(PreferenceConfig(beta=0.5, next_token=0.2), model, other, documents)
    expected.mean().backward()
    norm = torch.stack([gradient.norm() for gradient in gradients(model).values()]).norm().item()
    for rank, parts in zip(found, deal, strict=True):
        (step,) = rank[0]
        assert step["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert step["norm"] == pytest.approx(norm, rel=1e-4)
        assert step["metrics"] == pytest.approx({k: v / 5 for k, v in metrics.items()}, rel=1e-4, abs=1e-5)
        told = list(itertools.chain(*step["documents"]))
        assert told == pytest.approx(expected[list(itertools.chain(*parts))].tolist(), rel=1e-4)


@pytest.mark.dist
@pytest.mark.slow
def test_steps_do_not_depend_on_the_division_of_pairs_among_ranks() -> None:
    """Two AdamW steps on one rank, two and four, with idle ranks and several microbatches."""
    alone = [[[0, 1, 2, 3, 4]]]
    two = [[[0, 1], [2]], [[3, 4], []]]
    four = [[[4, 0]], [[]], [[1]], [[2, 3]]]
    runs = {1: [(alone, None, 0, True), (alone, "hybrid", 0, False)], 2: [], 4: [(four, None, 2, True)]}
    runs[2] = [(two, None, 3, True), (two, "hybrid", 3, False)]
    reports: dict[Any, Any] = {}
    for size, plan in runs.items():
        cases = [{"steps": [d, d], "kind": kind, "zero": zero, "moe": moe} for d, kind, zero, moe in plan]
        found = run_ranks("tests.objectives.answers:train", size, {"cases": cases})
        for number, (deal, kind, _, moe) in enumerate(plan):
            steps = found[0][number]
            truth = reports.setdefault((kind, moe), steps)
            assert [step["weight"] for step in steps] == [5, 5]
            for step, wanted in zip(steps, truth, strict=True):
                assert step["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
                assert step["norms"] == pytest.approx(wanted["norms"], rel=2e-4)
                assert step["metrics"] == pytest.approx(wanted["metrics"], rel=1e-3, abs=1e-5)
            if size == 1:
                continue
            by_pair = dict(zip(alone[0][0], itertools.chain(*truth[0]["documents"]), strict=True))
            for rank, parts in zip(found, deal, strict=True):
                told = list(itertools.chain(*rank[number][0]["documents"]))
                assert told == pytest.approx([by_pair[each] for each in itertools.chain(*parts)], rel=1e-4)
    assert reports[None, True][0]["loss"] > reports[None, True][1]["loss"]


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("loss", ["sigmoid", "with next tokens", "ipo of TRL", "length-normalised"])
def test_equals_the_trainer_of_trl(loss: str, tmp_path: Path) -> None:
    """TRL averages its next-token term over the tokens of a batch, so all chosen answers have one length here.

    Its ``sigmoid`` has no label smoothing, and its ``ipo`` is normalised by length.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, 120))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rng = np.random.default_rng(0)
    rows = [
        {name: " ".join(f"w{n}" for n in rng.integers(3, 120, count)) for name, count in lengths.items()}
        for lengths in ({"prompt": 2 + n, "chosen": 3, "rejected": 1 + 2 * n} for n in range(4))
    ]
    rows = [{**row, "chosen": f" {row['chosen']} ", "rejected": f" {row['rejected']} "} for row in rows]
    theirs, other = (reference_model("llama, biases everywhere", seed) for seed in (0, 1))
    for seed, each in enumerate((theirs, other)):
        each.save_pretrained(tmp_path / f"theirs-{seed}")
    preference = PreferenceConfig.model_validate(LOSSES[loss])
    name = "ipo" if preference.loss == "ipo" else "sigmoid_norm" if preference.length_normalised else "sigmoid"
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=preference.beta,
        loss_type=[name, "sft"],
        loss_weights=[1.0, preference.next_token],
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    trainer = DPOTrainer(theirs, other, settings, train_dataset=Dataset.from_list(rows), processing_class=processing)
    examples = list(trainer.train_dataset)
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    expected.backward()
    wanted = their_gradients(trainer.model, tmp_path)
    (model, _), (reference, _) = (imported(tmp_path / f"theirs-{n}", tmp_path / f"run-{n}") for n in (0, 1))
    spec = media_spec(model.config)
    pairs = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in examples]
    assert all(chosen[-1] == rejected[-1] == 2 for _, chosen, rejected in pairs)
    batch = collate([Pack(tuple(pair_document(spec, n, each) for n, each in enumerate(pairs)), 0)], spec)
    output = Preference(preference, [Teacher(reference, 1.0, 1.0)])(model, batch)
    (output.loss_sum / len(pairs)).backward()
    assert output.loss_sum.item() / len(pairs) == pytest.approx(expected.item(), rel=1e-5)
    for key, gradient in gradients(model).items():
        assert distance(gradient, wanted[key]) < 2e-5, key
    logged = trainer._metrics["train"]
    if not preference.length_normalised:
        for ours, name in (("reward_margin", "rewards/margins"), ("reward_accuracy", "rewards/accuracies")):
            assert output.metrics[ours].item() / len(pairs) == pytest.approx(logged[name][-1], rel=1e-4)
