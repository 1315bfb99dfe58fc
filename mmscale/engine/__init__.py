"""Training steps on DeepSpeed: the engine, its optimizers, memory, timing and the watchdog."""
