"""Load configurations: YAML with line numbers, layers, overrides, validation, origins.

Each part of mmscale declares its own configuration class, and ``mmscale.run.config`` composes them. This package
itself knows only the keys ``base`` and ``kind``, and the new names of renamed keys.
"""

from mmscale.config.load import DroppedKeyWarning, Loaded, dump, leaves, load, load_tree, located, to_yaml
from mmscale.config.tree import Origin, shorten

__all__ = [
    "DroppedKeyWarning",
    "Loaded",
    "Origin",
    "dump",
    "leaves",
    "load",
    "load_tree",
    "located",
    "shorten",
    "to_yaml",
]
