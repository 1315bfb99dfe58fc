"""What a person looks at when a run is over, or still going: ``report.html`` from the run folder."""
