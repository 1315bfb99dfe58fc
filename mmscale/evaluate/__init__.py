"""Held-out scores: does the model choose the right answer, does it look at the image to do so, and what surprises it?

config      which sets, which question
heldout     samples, right answers, prompts as documents
questions   sample -> candidates, and which image stands in for which in the control
branch      prompts and candidates -> one packed batch in which candidates share their image
likelihood  batch -> log-likelihood of each learned token, of each candidate
pairs       (prompt, candidate) pairs -> log-likelihoods, over all ranks
similarity  (sample, candidate) pairs -> how near image and text are, of a model that compares them
choice      multiple-choice questions -> ChoiceResult
perplexity  documents -> PerplexityResult
score       all of it -> a result for each set
check       all of it that can be known before a run
"""

from mmscale.evaluate.check import check_sets
from mmscale.evaluate.config import (
    CaptionsConfig,
    ChoiceSet,
    EvaluationConfig,
    HeldOutSet,
    PerplexitySet,
)
from mmscale.evaluate.heldout import not_asked
from mmscale.evaluate.score import evaluate

__all__ = [
    "CaptionsConfig",
    "ChoiceSet",
    "EvaluationConfig",
    "HeldOutSet",
    "PerplexitySet",
    "check_sets",
    "evaluate",
    "not_asked",
]
