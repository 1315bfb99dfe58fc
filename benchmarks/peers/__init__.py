"""Runners for ``benchmarks.loader``, one per loader. Each runs in a separate process, some in another environment.

A runner is a module with these functions (``bare`` has ``batches`` only):

    prepare(folder)           write the files that the loader needs besides the tars (optional).
    batches(job)              yield the number of samples of each batch, without end.
    at(job, num_samples)      return the state after ``num_samples`` samples.
    resumed(job, state)       build a new loader from the state and return after its first sample or batch.

``run`` is the command line that calls them; no other module imports them.
"""
