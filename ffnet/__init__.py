"""FFNet under quantization. The names in `__all__` are the public Python API; torch and AIMET load on first use."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from ffnet.config import QuantizationConfig, Runtime
from ffnet.labels import CITYSCAPES, LabelSet, read_label_set
from ffnet.variants import VARIANTS

if TYPE_CHECKING:
    from ffnet.checkpoints.loading import load_checkpoint
    from ffnet.evaluation.loop import evaluate
    from ffnet.model import build_model
    from ffnet.quantization.lowering import lower
    from ffnet.quantization.quantize import quantize

# Before ONNX Runtime is imported, which otherwise writes a device id and a database under the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "2.2.0"
__all__ = [
    "CITYSCAPES",
    "VARIANTS",
    "LabelSet",
    "QuantizationConfig",
    "Runtime",
    "build_model",
    "evaluate",
    "load_checkpoint",
    "lower",
    "quantize",
    "read_label_set",
]

_MODULES = {
    "build_model": "ffnet.model",
    "evaluate": "ffnet.evaluation.loop",
    "load_checkpoint": "ffnet.checkpoints.loading",
    "lower": "ffnet.quantization.lowering",
    "quantize": "ffnet.quantization.quantize",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `--help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """List the public API."""
    return sorted([*__all__, "__version__"])
