"""Optimizers that step ZeRO's shards as if they were whole parameters."""
