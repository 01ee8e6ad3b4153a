"""Benchmarks: what is fast, against what, on which machine. Nothing here runs in the tests."""
