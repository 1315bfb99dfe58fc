"""One runner a loader for ``benchmarks.loader``: each in a process, and if need be an environment, of its own.

A runner is a module with three functions:

    prepare(folder)           writes what it reads besides the tars, if anything (left out if there is nothing)
    batches(job)              batches without end, each given as its number of samples
    at(job, num_samples)      the state after so many samples
    resumed(job, state)       builds everything anew and returns after the first sample behind the state

``run`` is the command line that calls them. Not for: tests, or being imported by anything but ``run``.
"""
