"""Plan a run before it starts: memory, time, cost and limits on a cluster."""
