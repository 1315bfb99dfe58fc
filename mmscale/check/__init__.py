"""Prove before a run that all ranks make the same collectives; see ``mmscale.check.check``."""
