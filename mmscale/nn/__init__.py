"""Layers. They know tensors and segments, no batch, no model, no engine."""
