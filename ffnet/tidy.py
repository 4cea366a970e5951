"""An exported ONNX graph, tidied: sizes are constants, and nodes and tensors carry the names of the network's layers.

The exporter names a node by the last part of its layer's name and a number, `/layers.2_7/Relu`. A reader of the files,
and whoever compares execution and simulation, needs `head.layers.1.fam_4.layers.2`.
"""

from collections import defaultdict

from torch import nn

# A layer's class -> the ONNX operator that it becomes
OPERATORS = {
    "Conv2d": "Conv",
    "GaussianConv2D": "Conv",
    "ReLU": "Relu",
    "MaxPool2d": "MaxPool",
    "Add": "Add",
    "Interpolate": "Resize",
    "Concat": "Concat",
    "Pad": "Pad",
}
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
SUFFIXES = ("", "_q", "_qdq", "_dq", "_scale", "_zero_point")  # of the names that AIMET derives from a tensor's


def fold_sizes(proto):
    """An onnx.ModelProto in which what depends on the static input shape alone is a constant; weights stay as they are.

    The legacy exporter leaves the sizes of Resize and Pad as chains of Shape, Slice and Concat.
    """
    from onnxscript import ir, optimizer

    model = ir.from_proto(proto)
    for _ in range(2):  # shapes behind a folded Resize are known only then
        optimizer.fold_constants(
            model, onnx_shape_inference=True, should_fold=lambda node: node.op_type == "ConstantOfShape" or None
        )
    optimizer.remove_unused_nodes(model)
    return ir.to_proto(model)


def layers(network):
    """Rows (name, ONNX operator, names of the layers it takes) of a torch.fx.GraphModule, in order; inputs have no
    name."""
    rows, sources = [], {}
    for node in network.graph.nodes:
        taken = [argument for argument in node.all_input_nodes if argument in sources]
        if node.op == "placeholder":
            sources[node] = ""
        elif node.op == "call_module":
            module = network.get_submodule(node.target)
            original = getattr(module, "get_original_module", lambda module=module: module)()
            if isinstance(original, nn.Identity):
                sources[node] = sources[taken[0]]
                continue
            rows.append((node.target, OPERATORS[type(original).__name__], [sources[source] for source in taken]))
            sources[node] = node.target
    return rows


def name_layers(proto, network):
    """Renames nodes and tensors of a folded onnx.ModelProto to the layers of `network`, a torch.fx.GraphModule.

    Returns {old tensor name: new one}. The last layer's tensor keeps its name, the model's output. RuntimeError where
    graph and network are not the same.
    """
    graph = proto.graph
    found = defaultdict(list)
    for node in graph.node:
        if node.op_type not in QUANTIZING:
            found[node.op_type].append(node)
    matched = {}
    for name, operator, _ in (rows := layers(network)):
        if not found[operator]:
            raise RuntimeError(f"the exported graph has no {operator} for {name}")
        matched[name] = found[operator].pop(0)
    _check_connected(graph, rows, matched)
    kept = {output.name.removesuffix("_qdq") for output in graph.output}
    tensors = {}
    for name, node in matched.items():
        node.name = name
        tensor = node.output[0].removesuffix("_qdq")
        tensors[tensor] = tensor if tensor in kept else name
    rename(graph, tensors)
    return tensors


def _check_connected(graph, rows, matched):
    """RuntimeError unless every node takes what its layer takes: same-named operators come in the same order."""
    layer_of = {node.output[0]: name for name, node in matched.items()}
    source_of = {node.output[0]: node.input[0] for node in graph.node if node.op_type in QUANTIZING}
    constants = {tensor.name for tensor in graph.initializer} | {""}
    for name, _, taken in rows:
        found = []
        for tensor in matched[name].input:
            while tensor in source_of:
                tensor = source_of[tensor]
            if tensor not in constants:
                found.append(layer_of.get(tensor, ""))
        if found != taken:
            raise RuntimeError(f"the exported graph feeds {name} from {found}, the network from {taken}")


def rename(graph, tensors):
    """Renames tensors of an onnx.GraphProto, and those whose names AIMET derived from them, wherever they stand."""
    names = {old + suffix: new + suffix for old, new in tensors.items() for suffix in SUFFIXES}
    for node in graph.node:
        node.name = names.get(node.name, node.name)
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
