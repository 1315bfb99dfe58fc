"""Code of ``benchmarks.train_step``: reference models, batches, engines, and the ranks that run them."""
