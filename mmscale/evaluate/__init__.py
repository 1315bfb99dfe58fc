"""Scores on held-out sets: choice of the right answer, use of the image, perplexity, generated answers, drawings.

config         the ``evaluation`` block: sets and their questions
heldout        samples, right answers, prompts as documents
questions      samples -> blocks with common candidates, and the image that each sample gets in the control
continuations  prompts and answers -> one packed batch in which answers share the image of their prompt
likelihood     batch -> log-likelihood of each label, of each segment
pairs          (prompt, answer) pairs -> log-likelihoods, over all ranks
similarity     (sample, candidate) pairs -> cosine of image and text, for contrastive models
choice         multiple-choice questions -> ChoiceResult
perplexity     documents -> PerplexityResult
generation     prompts -> generated answers -> GenerationResult
classifier     a contrastive run as a classifier of images
drawings       texts -> drawn images, for a user and for the report
drawing_scores drawings -> DrawingsResult
answer_metrics generated answers, reference answers -> values
score          every set -> its result
check          checks of the sets before a run starts
answers        answers to a user's prompt, and captions
mixed_answers  answers of text and drawings
drawn_pairs    several drawings of each text -> preference pairs
"""

from mmscale.evaluate.check import check_best, check_sets
from mmscale.evaluate.config import (
    BestConfig,
    CaptionsConfig,
    ChoiceSet,
    DrawingsConfig,
    DrawingSet,
    EvaluationConfig,
    GenerationSet,
    HeldOutSet,
    PerplexitySet,
)
from mmscale.evaluate.heldout import unanswerable_sets
from mmscale.evaluate.score import evaluate

__all__ = [
    "BestConfig",
    "CaptionsConfig",
    "ChoiceSet",
    "DrawingSet",
    "DrawingsConfig",
    "EvaluationConfig",
    "GenerationSet",
    "HeldOutSet",
    "PerplexitySet",
    "check_best",
    "check_sets",
    "evaluate",
    "unanswerable_sets",
]
