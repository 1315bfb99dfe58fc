"""How features of a tower reach the decoder."""
