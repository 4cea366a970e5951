"""Whether a network returns probabilities in place of logits."""

import onnx
import torch

from ffnet.onnx.graph_index import GraphIndex, node_name

PASSING = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")  # operators that keep what a tensor stands for
PROBABILITIES = ("Softmax", "Sigmoid", "HardSigmoid")
SUM_TOLERANCE = 0.05  # of the 19 probabilities of a pixel, with 8 bits each


def describe_head(proto: onnx.ModelProto, output_name: str, output: torch.Tensor) -> str | None:
    """Return a note if a network returns probabilities; None otherwise.

    A LogSoftmax needs none: it subtracts the same from all logits of a pixel, also after resizing.

    Args:
        proto: the network.
        output_name: of its output.
        output: its output (N, 19, h, w) float32 for an image.
    """
    graph = GraphIndex.of(proto.graph)
    node = graph.producers.get(output_name)
    while node is not None and node.op_type in PASSING:
        node = graph.producers.get(node.input[0])
    if node is not None and node.op_type in PROBABILITIES:
        what = f"probabilities ({node_name(node)}, {node.op_type})"
    elif output.amin() >= -1e-6 and (output.sum(1) - 1).abs().amax() < SUM_TOLERANCE:
        what = "values that are not negative and add up to 1 per pixel, like probabilities"
    else:
        return None
    return (
        f"The file returns {what}, which are resized to the size of the labels in place of logits. At the borders of "
        "objects this gives other predictions, and mostly a lower mIoU (2.5 percentage points in the demo). Export the "
        "network without that operator to score its logits."
    )
