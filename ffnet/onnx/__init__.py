"""Write, check and run ONNX files.

Modules in reading order:

- `formats`: file names and bit widths of an export; needs no torch
- `chips`: the chips whose NPU can be named; needs no torch
- `export`: a calibrated simulation to the files that device runtimes take
- `validation`: whether a file is an ONNX network that may be run
- `graph_index`: the nodes and constants of a graph by name
- `quantized_values`: inputs and outputs of integers
- `input_operations`: what a file does to its image before the first layer
- `input_format`: what a file takes as its image
- `heads`: whether a file returns probabilities
- `runtime`: the ONNX Runtime backend
- `inspection`: which convolutions of a file run on integer kernels
- `float_convolutions`: why others do not
- `divergence`: the first layer whose integers differ between ONNX Runtime and the simulation
"""
