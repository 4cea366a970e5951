"""Write, check and run ONNX files.

Modules in reading order:

- `reading`: read a file and the data that it keeps in other files
- `graph`: look up the nodes of a graph, and rewrite them for device runtimes
- `input_format`: value range and channel order of a file's input, and how they are found
- `placement`: compare an encodings file with the float network that it belongs to
- `quantizers`: put Q/DQ nodes into a float network where encodings say
- `aimet`: quantize a float file with aimet-onnx
- `export`: write a calibrated simulation as the files that device runtimes take
- `validation`: check whether a file is an ONNX network that may be run
- `runtime`: the ONNX Runtime backend, and which convolutions run on integer kernels
- `divergence`: compare the layers of an executed file with the simulation's
"""
