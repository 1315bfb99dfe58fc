"""Structured pruning of a decoder: a smaller model out of the weights of a larger one, in a single cut.

    limits                 may this model be cut out of that one?
    weights | activations  what each removable unit is worth      -> Scores
    choice                 which of them stay, axis by axis        -> Choice
    cut                    where each tensor of the smaller model lies in the larger one's, and by what it is scaled
    write                  all of it: a checkpoint whose weights a stage takes

What stays keeps its order. Not for: winning back what the cut cost, which is training.

Source: Muralidharan et al. 2024, "Compact language models via pruning and knowledge distillation" (arXiv 2407.14679).
"""

from mmscale.prune.write import Calibration, PruneReport, prune_checkpoint

__all__ = ["Calibration", "PruneReport", "prune_checkpoint"]
