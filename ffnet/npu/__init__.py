"""Run ONNX files on Qualcomm's NPU: the backend, and the process in which Qualcomm's library runs."""
