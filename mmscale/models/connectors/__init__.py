"""Connectors: pass the features of a tower to the decoder, or compare its features with texts (``contrastive``)."""
