"""Configuration machinery: YAML with line numbers, layers, overrides, validation, origins.

Knows no key of any configuration: each part declares its own class beside its code, ``mmscale.run.config`` composes
them.
"""

from mmscale.config.load import DroppedKeyWarning, Loaded, dump, leaves, load, load_tree
from mmscale.config.tree import Origin, shorten

__all__ = ["DroppedKeyWarning", "Loaded", "Origin", "dump", "leaves", "load", "load_tree", "shorten"]
