"""Objectives: compute the loss of a microbatch, and the weight that the loss is divided by."""
