"""Recover accuracy: other ranges and roundings for weights, and mixed precision."""
