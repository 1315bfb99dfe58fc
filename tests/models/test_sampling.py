"""Sampling settings have the same meaning as in transformers, and greedy generation gives the same text.

Logits divided by a temperature are compared to 1e-5: the same float32 operations in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mmscale.models.generation import generate
from mmscale.models.sampling import SamplingConfig, choose_tokens, filter_logits
from tests.hf.decoders import saved_reference
from tests.hf.test_decoders import imported
from tests.models.test_parity import text_batch

pytestmark = pytest.mark.parity
VOCAB = 50


def _logits(rows: int = 40) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 500},
        {"top_p": 0.8},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    ],
    ids=str,
)
def test_the_same_tokens_are_allowed_with_the_same_odds(settings: dict[str, Any]) -> None:
    from transformers.generation import logits_process as theirs

    logits = _logits()
    expected = logits
    for name, processor in (
        ("temperature", theirs.TemperatureLogitsWarper),
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ):
        if name in settings:
            expected = processor(settings[name])(torch.zeros(len(logits), 1, dtype=torch.long), expected)
    ours = filter_logits(logits, SamplingConfig(**{"temperature": 1.0, **settings}))
    assert torch.equal(ours.isinf(), expected.isinf())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert not ours.isinf().all(1).any()


def test_repetition_is_penalised_as_in_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits, said = _logits(), torch.randint(0, VOCAB, (40, 12), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, said, True)
    for penalty in (1.3, 0.8):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(said, logits).argmax(-1)
        assert torch.equal(choose_tokens(logits, SamplingConfig(repetition_penalty=penalty), None, seen), expected)
    assert not torch.equal(expected, logits.argmax(-1))


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_text_of_an_imported_model_is_that_of_transformers(penalty: float, tmp_path: Path) -> None:
    theirs = saved_reference("llama, tied, grouped, stretched", tmp_path / "theirs").eval()
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    lengths = [7, 3, 12]
    prompts = text_batch(120, lengths=lengths)
    found = generate(ours.eval(), prompts, 20, eos_id=2, sampling=SamplingConfig(repetition_penalty=penalty))
    for said, ids in zip(found, prompts.token_ids.split(lengths), strict=True):
        whole = theirs.generate(
            ids[None], max_new_tokens=20, do_sample=False, repetition_penalty=penalty, eos_token_id=2, pad_token_id=0
        )
        assert [*ids.tolist(), *said] == [token for token in whole[0].tolist() if token != 2]
    assert len({tuple(said) for said in found}) == 3


def test_the_older_form_with_a_kind_keeps_its_meaning() -> None:
    assert SamplingConfig.model_validate({"kind": "greedy"}) == SamplingConfig()
    nucleus = SamplingConfig.model_validate({"kind": "nucleus", "seed": 3})
    assert nucleus == SamplingConfig(temperature=1.0, top_p=0.9, seed=3)
    assert SamplingConfig.model_validate(nucleus.model_dump()) == nucleus
    for wrong in ({"kind": "beam"}, {"kind": "greedy", "top_p": 0.5}, {"top_k": 0}, {"temperature": -1}, {"min_p": 2}):
        with pytest.raises(ValidationError):
            SamplingConfig.model_validate(wrong)
