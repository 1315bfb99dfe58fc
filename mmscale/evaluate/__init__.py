"""Held-out scores: does the model choose the right answer for an image, and does it look at the image to do so?

config      which sets, which question
questions   sample -> candidates, and which image stands in for which in the control
branch      prompts and candidates -> one packed batch in which candidates share their image
likelihood  batch -> log-likelihood of each candidate
score       all of it, over all ranks -> SetResult
"""

from mmscale.evaluate.config import CaptionsConfig, EvaluationConfig, HeldOutSet, Normalise
from mmscale.evaluate.score import evaluate

__all__ = ["CaptionsConfig", "EvaluationConfig", "HeldOutSet", "Normalise", "evaluate"]
