"""Bytes that are on the disk when a call returns. Knows no torch: a process that only writes starts in 50 ms."""
