"""Access to local files, HTTP servers and object stores through one interface.

    location.Location --> remote.RemoteStore (retries, conditional ranges) --> cache.Cache (bounded, on disk)
                                             --> objects.RemoteObject (pages) --> read_ahead.ReadAhead --> SampleReader

``SampleReader`` opens the local shards of a manifest directly, without this package.
"""
