"""Compare the quantized activations of an executed file with the simulation's, layer by layer.

Each layer is compared twice. Its own differences are those that remain if the simulated layer gets the values that the
runtime computed for its inputs. Its total differences include those of its inputs.

Correct kernels of ONNX Runtime differ from the simulation only for values halfway between two integers: at most 0.1 %
of them. The NPU rounds differently.
"""

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from ffnet.onnx.runtime import open_session, run_session
from ffnet.quantization.lowering import FakeQuantize
from ffnet.quantization.sites import ACTIVATION, INPUT_TENSOR, QuantizerSite
from ffnet.system.errors import UserError
from ffnet.system.text import count

Execute = Callable[[Path, np.ndarray], Mapping[str, np.ndarray]]

TOLERATED = 0.01  # share of a layer's values that may be one quantization step off


@dataclass(frozen=True)
class Difference:
    """How far the quantized values of a layer are from the simulation's."""

    differing: float  # share of values that are not equal
    mean_steps: float  # mean difference, in quantization steps
    largest_steps: int  # largest difference of a value, in quantization steps


@dataclass(frozen=True)
class LayerDivergence:
    """The differences of one quantized activation."""

    layer: str  # name of the tensor in the exported file; "image" is the quantized input
    own: Difference  # for the same input
    total: Difference  # for the same image, including the differences of its inputs

    def describe(self, runtime: str) -> str:
        """Return the layer's own differences as a sentence; `runtime`: the name of what ran the file."""
        return (
            f"For the same input, {100 * self.own.differing:.2f} % of the values of {self.layer} differ between "
            f"{runtime} and the simulation, by at most {count(self.own.largest_steps, 'quantization step')}."
        )


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
    image: torch.Tensor,
    execute: Execute | None = None,
) -> list[LayerDivergence]:
    """Return the divergence of each quantized activation, in order of execution.

    Args:
        lowered: The network that `lower` returned for the exported simulation, not compiled.
        sites: The simulation's quantizer sites.
        path: The exported `model.onnx`.
        image: Normalized, (1, 3, H, W) float32, of the file's size, on the CPU.
        execute: Returns all outputs of a file by name for an image.

    Raises:
        UserError: If the file has other layers.
    """
    compared = {site.tensor: site for site in sites if site.kind == ACTIVATION and site.tensor}
    executed = _execute(path, compared, image.numpy(), execute or run_with_onnx_runtime)
    lowered = copy.deepcopy(lowered).to("cpu")  # the evaluation may still need the original on a GPU
    simulated: dict[str, torch.Tensor] = {}
    own: dict[str, Difference] = {}

    def keep(tensor: str, quantizer: FakeQuantize, _: object, output: torch.Tensor) -> None:
        narrow = quantizer.qmax - quantizer.qmin < 256  # a large network has a billion values
        simulated[tensor] = _integers(quantizer, output).to(torch.uint8 if narrow else torch.int32)

    def compare(tensor: str, quantizer: FakeQuantize, _: object, output: torch.Tensor) -> torch.Tensor:
        integers = _counted_from_smallest(executed[f"{tensor}_q"])
        own[tensor] = _difference(_integers(quantizer, output), integers)
        return (integers + quantizer.qmin - quantizer.zero_point) * quantizer.scale

    for hook in (keep, compare):
        with contextlib.ExitStack() as hooks, torch.inference_mode():
            for tensor, site in compared.items():
                quantizer = lowered.get_submodule(site.lowered_name)
                hooks.enter_context(quantizer.register_forward_hook(functools.partial(hook, tensor)))
            lowered(image)
    totals = (_difference(simulated[tensor], _counted_from_smallest(executed[f"{tensor}_q"])) for tensor in own)
    return [LayerDivergence(tensor, own[tensor], total) for tensor, total in zip(own, totals, strict=True)]


def _execute(path: Path, tensors: Collection[str], image: np.ndarray, execute: Execute) -> Mapping[str, np.ndarray]:
    """Return the integers that a file computes for the named tensors, by these names and `_q`."""
    proto = onnx.load(path)
    computed = {name for node in proto.graph.node for name in node.output}
    if missing := [tensor for tensor in tensors if f"{tensor}_q" not in computed]:
        raise UserError(f"{path}: this file has no layer {missing[0]}. Compare a file exported from this network.")
    del proto.graph.output[:]  # outputs in float would keep layers from running on integer kernels
    proto.graph.output.extend(onnx.ValueInfoProto(name=f"{tensor}_q") for tensor in tensors)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        onnx.save(proto, file)
        return execute(file, image)


def _integers(quantizer: FakeQuantize, output: torch.Tensor) -> torch.Tensor:
    """Return the integers behind a quantized tensor, counted from the smallest, int32."""
    return torch.round(output / quantizer.scale).to(torch.int32) + quantizer.zero_point - quantizer.qmin


def _counted_from_smallest(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32)) - int(np.iinfo(array.dtype).min)


def _difference(simulated: torch.Tensor, executed: torch.Tensor) -> Difference:
    steps = (simulated.to(torch.int32) - executed).abs()
    return Difference(float((steps > 0).double().mean()), float(steps.double().mean()), int(steps.max()))


def run_with_onnx_runtime(path: Path, image: np.ndarray) -> dict[str, np.ndarray]:
    """Return all outputs of a file by name for a normalized image (1, 3, H, W) float32."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, run_session(session, names, {INPUT_TENSOR: image}, path), strict=True))
