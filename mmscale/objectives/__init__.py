"""Objectives: from a model's output and a batch to a loss sum and a weight."""
