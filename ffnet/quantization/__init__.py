"""Quantize a network with AIMET: simulate, calibrate, load encodings, and measure how sensitive each quantizer is.

`quantize` is the entry point and names the steps. `sites` and `weighted_layers` say which quantizer sits where.
"""
