"""Where simulation and execution part: the first layer, in graph order, whose integers differ.

Every simulated layer is fed what the executed one was fed, so a difference is the layer's own. Sound kernels differ
from the simulation where a value lies on the edge between two quantization steps: in 0.1 % of the values or fewer.
"""

from dataclasses import dataclass

import torch

from ffnet.errors import UserError
from ffnet.execute import open_session, run_session
from ffnet.export import INPUT, OUTPUT
from ffnet.lower import FakeQuantize

TOLERATED = 0.01  # share of a layer's values that may be one step apart


@dataclass(frozen=True)
class Parting:
    """How far a layer's quantized values in the execution are from the simulation's."""

    layer: str  # in the network's names; "image" is the quantized input
    differing: float  # share of values that are not equal
    steps: int  # the most steps that a value is off

    def __str__(self):
        return (
            f"{self.layer}: fed the same, {100 * self.differing:.2f} % of its values differ, by at most {self.steps} "
            "quantization steps"
        )


def first_parting(lowered, path, image):
    """The Parting of the first layer at which execution of our exported file and simulation part, or None.

    They part where more than 1 % of a layer's values differ, or one by more than a quantization step; if no layer is so
    far off, where values first differ at all. `lowered`: what lower(sim) returns, on the CPU, not compiled; `image`:
    normalized float32 (1, 3, H, W) of the file's size. UserError where the file has other layers.
    """
    partings = compare_layers(lowered, path, image)
    far = (parting for parting in partings if parting.differing > TOLERATED or parting.steps > 1)
    return next(far, next((parting for parting in partings if parting.steps), None))


def compare_layers(lowered, path, image):
    """A Parting for each quantized layer output that both have, in graph order."""
    levels = executed_levels(path, image)
    names = quantized_tensors(lowered)
    absent = [tensor for tensor in names.values() if tensor not in levels]
    if absent or not names:
        raise UserError(f"{path}: has no layer {absent[:1] or ''}; compare a file that was exported from this network")
    partings, hooks = [], []
    for layer, tensor in names.items():
        quantizer = lowered.get_submodule(layer)

        def compare(module, _, output, tensor=tensor):
            simulated = torch.round(output / module.scale).to(torch.int32) + module.zero_point - module.qmin
            executed = levels.pop(tensor)
            partings.append(parting(tensor, simulated, executed))
            return (executed + module.qmin - module.zero_point) * module.scale

        hooks.append(quantizer.register_forward_hook(compare))
    try:
        with torch.inference_mode():
            lowered(image)
    finally:
        for hook in hooks:
            hook.remove()
    return partings


def quantized_tensors(lowered):
    """{name of a FakeQuantize: the tensor in the exported file}, in graph order; no input quantizer but the image's."""
    (output,) = (node for node in lowered.graph.nodes if node.op == "output")
    names = {}
    for node in lowered.graph.nodes:
        if node.op != "call_module" or not isinstance(lowered.get_submodule(node.target), FakeQuantize):
            continue
        if node.args[0].op == "placeholder":
            names[node.target] = INPUT
        elif node.target.endswith("_output_quantizer"):
            last = node is output.args[0]
            names[node.target] = OUTPUT if last else node.target.removesuffix("_output_quantizer")
    return names


def executed_levels(path, image):
    """{tensor: its integers, counted from the least, int32} of every QuantizeLinear of an activation, executed."""
    import onnx

    proto = onnx.load(path)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    activations = [n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants]
    types = {node.output[0]: constants[node.input[2]].data_type for node in activations}
    del proto.graph.output[:]
    # The integers themselves: an output in float would keep the layer from being run in integers.
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in types.items())
    session = open_session(path, proto)
    arrays = run_session(session, list(types), {INPUT: image.numpy()}, path)
    return {
        name.removesuffix("_q"): torch.from_numpy(array.astype("int32")) - _least(array.dtype)
        for name, array in zip(types, arrays, strict=True)
    }


def _least(dtype):
    import numpy as np

    return int(np.iinfo(dtype).min)


def parting(tensor, simulated, executed):
    """The Parting of one tensor from its integers in both."""
    distance = (simulated - executed).abs()
    return Parting(tensor, float((distance > 0).float().mean()), int(distance.max()))
