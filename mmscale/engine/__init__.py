"""Training steps: DeepSpeed behind a small surface."""
