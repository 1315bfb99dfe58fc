"""Models, composed of one decoder family, towers and connectors."""
