"""Optimizers on ZeRO's shards with the results of optimizers on whole parameters."""
