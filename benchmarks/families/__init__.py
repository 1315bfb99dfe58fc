"""One model of each family twice, with the same weights: transformers' and ours, imported from its folder."""
