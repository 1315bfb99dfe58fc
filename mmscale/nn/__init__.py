"""Layers on tensors and segments, independent of batches, models and the engine."""
