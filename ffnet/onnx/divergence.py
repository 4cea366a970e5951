"""Find the first layer, in order of execution, whose integers differ between ONNX Runtime and the simulation.

Each simulated layer gets the values that ONNX Runtime computed for its inputs, so a difference is the layer's own.
Correct kernels differ from the simulation only for values halfway between two integers: at most 0.1 % of them.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from ffnet.errors import UserError
from ffnet.onnx.runtime import open_session, run_session
from ffnet.quantization.lowering import FakeQuantize
from ffnet.quantization.sites import ACTIVATION, INPUT_TENSOR, QuantizerSite
from ffnet.wording import count

TOLERATED = 0.01  # share of a layer's values that may be one quantization step off


@dataclass(frozen=True)
class Divergence:
    """How far a layer's quantized values in ONNX Runtime are from the simulation's."""

    layer: str  # name of the tensor in the exported file; "image" is the quantized input
    differing: float  # share of values that are not equal
    steps: int  # largest difference of a value, in quantization steps

    def __str__(self) -> str:
        return (
            f"For the same input, {100 * self.differing:.2f} % of the values of {self.layer} differ between ONNX "
            f"Runtime and the simulation, by at most {count(self.steps, 'quantization step')}."
        )


def first_divergence(
    lowered: torch.fx.GraphModule, sites: Sequence[QuantizerSite], path: Path, image: torch.Tensor
) -> Divergence | None:
    """Return the first layer at which ONNX Runtime and the simulation diverge; None if all values are equal.

    That is the first layer of which more than 1 % of the values differ, or one value by more than one quantization
    step. If there is none, it is the first layer of which any value differs. The arguments are those of compare_layers.
    """
    divergences = compare_layers(lowered, sites, path, image)
    large = (each for each in divergences if each.differing > TOLERATED or each.steps > 1)
    return next(large, next((each for each in divergences if each.steps), None))


def compare_layers(
    lowered: torch.fx.GraphModule, sites: Sequence[QuantizerSite], path: Path, image: torch.Tensor
) -> list[Divergence]:
    """Return the divergence of each quantized activation, in order of execution.

    Args:
        lowered: the network that `lower` returned for the exported simulation, on the CPU and not compiled.
        sites: the simulation's quantizer sites.
        path: of the exported `model.onnx`.
        image: normalized, (1, 3, H, W) float32, of the file's size.

    Raises:
        UserError: if the file has other layers.
    """
    proto = onnx.load(path)
    types = _quantized_activations(proto)
    compared = {site.tensor: site for site in sites if site.kind == ACTIVATION and site.tensor}
    missing = [tensor for tensor in compared if tensor not in types]
    if missing or not compared:
        layer = f"layer {missing[0]}" if missing else "quantized layer"
        raise UserError(f"{path}: this file has no {layer}. Compare a file that was exported from this network.")
    executed = _executed_integers(path, proto, types, image)
    found: list[Divergence] = []

    def compare(tensor: str, quantizer: FakeQuantize, _: object, output: torch.Tensor) -> torch.Tensor:
        simulated = torch.round(output / quantizer.scale).to(torch.int32) + quantizer.zero_point - quantizer.qmin
        integers = executed.pop(tensor)
        distance = (simulated - integers).abs()
        found.append(Divergence(tensor, float((distance > 0).float().mean()), int(distance.max())))
        return (integers + quantizer.qmin - quantizer.zero_point) * quantizer.scale

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for tensor, site in compared.items():
            quantizer = lowered.get_submodule(site.lowered_name)
            hooks.enter_context(quantizer.register_forward_hook(functools.partial(compare, tensor)))
        lowered(image)
    return found


def _quantized_activations(proto: onnx.ModelProto) -> dict[str, int]:
    """Return {tensor: ONNX's number of its integer type} of all activations that a QuantizeLinear quantizes."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    return {
        node.output[0].removesuffix("_q"): constants[node.input[2]].data_type
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }


def _executed_integers(
    path: Path, proto: onnx.ModelProto, types: Mapping[str, int], image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return {tensor: its integers in ONNX Runtime, counted from the smallest, int32}; `proto` is changed."""
    # The integers themselves: an output in float would keep the layer from running on an integer kernel.
    outputs = [onnx.helper.make_tensor_value_info(f"{tensor}_q", kind, None) for tensor, kind in types.items()]
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    feed = {INPUT_TENSOR: image.numpy()}
    arrays = run_session(open_session(path, proto), [output.name for output in outputs], feed, path)
    integers = (torch.from_numpy(array.astype(np.int32)) - int(np.iinfo(array.dtype).min) for array in arrays)
    return dict(zip(types, integers, strict=True))
