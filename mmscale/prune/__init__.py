"""Structured pruning of a decoder: make a smaller model from the weights of a larger one, in one step.

    limits                 check that the smaller model can be cut out of the larger one
    weights | activations  score each removable unit                                      -> Scores
    choice                 choose the units to keep, axis by axis                         -> UnitChoice
    cut                    rows, columns and scale of each tensor of the smaller model    -> Cut
    write                  write a checkpoint whose weights a stage can load

Kept units keep their order. Pruning raises the loss; train the smaller model afterwards.

Source: Muralidharan et al. 2024, "Compact language models via pruning and knowledge distillation" (arXiv 2407.14679).
"""

from mmscale.prune.write import Calibration, PruneReport, prune_checkpoint

__all__ = ["Calibration", "PruneReport", "prune_checkpoint"]
