"""Pages for a person: ``report.html`` of a finished or running run, a step's samples, statistics of data sets."""
