"""Examine a machine before a run: packages, devices, kernels, ranks, storage and limits."""
