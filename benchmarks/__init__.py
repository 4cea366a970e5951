"""Benchmarks: what the program is compared with, and the ratios of its costs. Not part of the tests."""
