"""Benchmarks: one module each, on the shared timer `benchmarks.timing`. They are not part of the tests."""
