"""What ``benchmarks.train_step`` runs: twins, batches, engines, and the ranks that hold them."""
