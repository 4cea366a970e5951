"""Names of the backends of a W8A8 network in results."""

from ffnet.evaluation.scores import NPU, ONNX_RUNTIME, SIMULATED, BackendNames

INT8_SIMULATED, INT8_ONNX_RUNTIME, INT8_NPU = map(BackendNames("INT8").of, (SIMULATED, ONNX_RUNTIME, NPU))
