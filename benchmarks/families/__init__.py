"""Models of each family: one of transformers, and ours with the same weights, imported from its folder."""
