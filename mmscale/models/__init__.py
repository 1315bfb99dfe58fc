"""Models, composed of a decoder, vision towers and connectors."""
