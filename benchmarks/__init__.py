"""Benchmarks: one module each, on the shared timer `benchmarks.timing`. They are not part of the tests."""

import ffnet  # noqa: F401  # first, because it disables the telemetry of ONNX Runtime
