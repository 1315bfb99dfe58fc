"""From tars of image-text samples to packed batches, in an order that is a pure function of the step.

Knows no model, no training engine and no process group: rank and world size are integers. What it must know of the
model arrives as one value, :class:`data_pipeline.media_spec.MediaSpec`.
"""
