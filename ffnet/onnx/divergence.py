"""Compare the quantized activations of an executed file with the simulation's, layer by layer.

Correct kernels of ONNX Runtime differ from the simulation only for values halfway between two integers: at most 0.1 %
of them. The NPU rounds differently.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from ffnet.onnx.runtime import open_session, run_session
from ffnet.quantization.layers import LayerDivergence, activations, compare_activations
from ffnet.quantization.sites import INPUT_TENSOR, QuantizerSite
from ffnet.system.errors import UserError

Execute = Callable[[np.ndarray], Mapping[str, np.ndarray]]
OpenFile = Callable[[Path], contextlib.AbstractContextManager[Execute]]

TOLERATED = 0.01  # share of a layer's values that may be one quantization step off


def first_divergence(layers: Sequence[LayerDivergence]) -> LayerDivergence | None:
    """Return the first layer at which a runtime and the simulation diverge; None if all values are equal.

    A layer diverges if, for the same input, more than 1 % of its values differ, or one value by more than one
    quantization step. If no layer does, return the first one with any difference.
    """
    large = (each for each in layers if each.own.differing > TOLERATED or each.own.largest_steps > 1)
    return next(large, next((each for each in layers if each.own.largest_steps), None))


def largest_divergence(layers: Sequence[LayerDivergence]) -> LayerDivergence | None:
    """Return the layer whose own differences are the largest on average; None if all values are equal."""
    return max((each for each in layers if each.own.largest_steps), key=lambda each: each.own.mean_steps, default=None)


def compare_layers(
    lowered: torch.fx.GraphModule,
    sites: Sequence[QuantizerSite],
    path: Path,
    images: Iterable[torch.Tensor],
    open_file: OpenFile | None = None,
) -> list[LayerDivergence]:
    """Return how far the quantized activations of a file are from the simulation's, in order of execution.

    Args:
        lowered: The network that `lower` returned for the exported simulation, not compiled.
        sites: The simulation's quantizer sites.
        path: The exported `model.onnx`.
        images: Normalized, (1, 3, H, W) float32, of the file's size, on the CPU.
        open_file: Opens a file; None: with ONNX Runtime.

    Raises:
        UserError: If the file has other layers.
    """
    compared = activations(sites)
    lowered = copy.deepcopy(lowered).to("cpu")  # the evaluation may still need the original on a GPU
    with tempfile.TemporaryDirectory() as folder:
        file = _with_outputs(path, compared, Path(folder))
        with (open_file or open_with_onnx_runtime)(file) as execute:
            runs = ((image, _integers(execute(image.numpy()), compared)) for image in images)
            return compare_activations(lowered, lowered, compared, runs)


def _with_outputs(path: Path, tensors: Collection[str], folder: Path) -> Path:
    """Write a file into `folder` whose outputs are the integers of the named tensors, and return it."""
    proto = onnx.load(path)
    computed = {name for node in proto.graph.node for name in node.output}
    if missing := [tensor for tensor in tensors if f"{tensor}_q" not in computed]:
        raise UserError(f"{path}: this file has no layer {missing[0]}. Compare a file exported from this network.")
    del proto.graph.output[:]  # outputs in float would keep layers from running on integer kernels
    proto.graph.output.extend(onnx.ValueInfoProto(name=f"{tensor}_q") for tensor in tensors)
    onnx.save(proto, folder / path.name)
    return folder / path.name


def _integers(outputs: Mapping[str, np.ndarray], tensors: Iterable[str]) -> dict[str, torch.Tensor]:
    return {tensor: torch.from_numpy(outputs[f"{tensor}_q"]) for tensor in tensors}


@contextlib.contextmanager
def open_with_onnx_runtime(path: Path) -> Iterator[Execute]:
    """Open a file; the result returns all outputs by name for a normalized image (1, 3, H, W) float32."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    yield lambda image: dict(zip(names, run_session(session, names, {INPUT_TENSOR: image}, path), strict=True))
