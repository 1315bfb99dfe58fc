"""Where shards lie: local files, HTTP servers and object stores behind one small interface.

    location.Location --> remote.RemoteStore (retries, conditional ranges) --> cache.Cache (bounded, on disk)
                                             --> objects.RemoteObject (pages) --> read_ahead.ReadAhead --> SampleReader

Local shards of a manifest never pass through here: the reader opens them by itself.
"""
