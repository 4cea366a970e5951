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
from ffnet.quantization.layers import Comparison, Integers, activations, compare_activations, noisiest
from ffnet.quantization.sites import INPUT_TENSOR, QuantizerSite
from ffnet.system.errors import UserError
from ffnet.system.text import format_number

Execute = Callable[[np.ndarray], Mapping[str, np.ndarray]]
OpenFile = Callable[[Path], contextlib.AbstractContextManager[Execute]]


@contextlib.contextmanager
def open_with_onnx_runtime(path: Path) -> Iterator[Execute]:
    """Open a file; the result returns all outputs by name for a normalized image (1, 3, H, W) float32."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    yield lambda image: dict(zip(names, run_session(session, names, {INPUT_TENSOR: image}, path), strict=True))


def describe_divergence(found: Comparison, runtime: str) -> str:
    """Return which layer of `runtime` adds most noise, as a sentence."""
    if not (names := noisiest(found)):
        return f"For the same input, every layer of {runtime} computes what the simulation does."
    own = format_number(found[names[0]].own, 1)
    return f"For the same input, {names[0]} of {runtime} is farthest from the simulation, with an SQNR of {own} dB."


def compare_layers(
    lowered: torch.fx.GraphModule,
    sites: Sequence[QuantizerSite],
    path: Path,
    images: Iterable[torch.Tensor],
    open_file: OpenFile = open_with_onnx_runtime,
) -> Comparison:
    """Compare the quantized activations of a file with the simulation's.

    Args:
        lowered: The network that `lower` returned for the exported simulation, not compiled.
        sites: The simulation's quantizer sites.
        path: The exported `model.onnx`.
        images: Normalized, (1, 3, H, W) float32, of the file's size, on the CPU.
        open_file: Opens a file.

    Raises:
        UserError: If the file has other layers.
    """
    lowered = copy.deepcopy(lowered).to("cpu")  # the evaluation may still need the original on a GPU
    compared = activations(sites, lowered)

    def run(execute: Execute) -> Iterator[tuple[torch.Tensor, Integers]]:
        for image in images:
            outputs = execute(image.numpy())
            yield image, {tensor: torch.from_numpy(outputs[f"{tensor}_q"]) for tensor in compared}

    with tempfile.TemporaryDirectory() as folder, open_file(_with_outputs(path, compared, Path(folder))) as execute:
        return compare_activations(lowered, compared, run(execute))


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
