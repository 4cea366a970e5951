"""Names of the backends, which run the same network in different arithmetic.

The names are the keys of every result: scores, `result.json`, the tables and the report.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

FP32 = "FP32"
INT8_SIMULATED = "INT8 simulated"  # AIMET's simulation, lowered to plain torch modules
INT8_ONNX_RUNTIME = "INT8 ONNX Runtime"  # the exported file on ONNX Runtime's integer kernels
INT8_NPU = "INT8 NPU"  # the exported file on Qualcomm's NPU
ONNX_FILE = "ONNX file"  # a file that was given with --onnx
SAVED_BACKENDS = (INT8_SIMULATED, ONNX_FILE)  # --save-predictions writes their predictions


class Backend(Protocol):
    """A network as the evaluation loop calls it."""

    def __call__(self, images: "torch.Tensor", /) -> "torch.Tensor":
        """Return logits (N, 19, h, w) float32 of normalized images (N, 3, H, W) float32."""
        ...


def short_name(backend: str) -> str:
    """Return the name of a backend without spaces, as it appears in folder names."""
    return backend.replace(" ", "_")
