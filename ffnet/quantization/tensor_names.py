"""Match the names in AIMET's encodings files with the quantizer sites of a simulation.

Files name torch modules or ONNX tensors. The names of tensors depend on the exporter; each naming scheme is computed
here from the simulation's graph, whose nodes are in order of execution.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.encodings_file import Encoding, EncodingsFile
from ffnet.quantization.sites import INPUT_TENSOR, OUTPUT_TENSOR, WEIGHT, QuantizerSite, tensor_arguments
from ffnet.system.errors import UserError

Node = torch.fx.Node
Names = dict[str, QuantizerSite]

VALUE_PRESERVING = ("Identity", "Pad", "MaxPool2d", "Interpolate")  # layers whose output has their input's encoding
INPUT_NAMES = (INPUT_TENSOR, "images", "input", "inputs", "input.1", "input_1", "x", "x.1", "t.1", "data")
OUTPUT_NAMES = (OUTPUT_TENSOR, "output", "outputs", "output_1", "out")  # and numbers
OPERATORS = {"ReLU": "relu", "Conv2d": "conv2d", "GaussianConv2D": "conv2d", "Add": "add", "Concat": "cat",
             "Pad": "pad", "MaxPool2d": "max_pool2d"}  # fmt: skip  # class -> name that torch.export gives its tensor


def match_encodings(
    sim: QuantizationSimModel, sites: list[QuantizerSite], file: EncodingsFile
) -> tuple[dict[QuantizerSite, Encoding], list[str]]:
    """Return the encodings of the sites that a file covers, and the names of its entries that match no site.

    The symmetric 32-bit biases that AIMET 2 derives when it exports match no site and are not among these names.
    """
    graph = _Graph(sim.model, sites)
    names: Names = {site.tensor: site for site in sites if site.kind == WEIGHT and site.tensor}
    labels = _names_without_prefix(file, sites)
    if file.by_layer:
        names |= _layer_names(graph)
    else:
        labels = {name: _scope_of(label) for name, label in labels.items()}
        matches = [(sum(label in scheme for label in labels.values()), scheme) for scheme in _tensor_names(graph)]
        names |= max(matches, key=lambda match: match[0])[1]  # all names of a file come from one exporter
    matched = {name: names[label] for name, label in labels.items() if label in names}
    biases = {name for name, _ in sim.model.named_parameters() if name.endswith(".bias")}
    derived = {
        name
        for name, encoding in file.entries.items()
        if labels[name] in biases and encoding.qmax == (1 << 31) - 1 and not any(encoding.offsets)
    }
    others = [name for name in file.entries if name not in matched and name not in derived]
    if not file.by_layer:
        matched |= _match_ends(graph, matched, others, file)
    encodings: dict[QuantizerSite, Encoding] = {}
    for name, site in matched.items():
        if encodings.setdefault(site, file.entries[name]) != file.entries[name]:
            raise UserError(
                f"--encodings {file.path}: the entry {name!r} contradicts another one for the same tensor "
                f"({site.name}). Remove one of them."
            )
    return encodings, [name for name in others if name not in matched]


def wrapper_prefix(file: EncodingsFile, sites: Iterable[QuantizerSite]) -> str:
    """Return the prefix that wrappers of the network, such as DataParallel, put before the names of its weights.

    In every format the weights are named after their layers. Activations do not count: the layers that AIMET's preparer
    adds to a wrapped network may have no prefix.
    """
    weights = [name for name in file.entries if name.endswith((".weight", ".bias"))]
    known = [site.tensor for site in sites if site.kind == WEIGHT and site.tensor]
    found = Counter(name.removesuffix(tensor) for name in weights for tensor in known if name.endswith(f".{tensor}"))
    prefix = max(found, key=lambda prefix: found[prefix], default="")
    return prefix if all(name.startswith(prefix) for name in weights) else ""


def _names_without_prefix(file: EncodingsFile, sites: Iterable[QuantizerSite]) -> dict[str, str]:
    """Return each name of a file without the prefix of wrappers, such as "model.", in each form that it takes.

    Layers: model.conv0. Tensors of AIMET's older exporter: /model/conv0. AIMET 1.x's own layers: module_model_relu_1.
    """
    prefix = wrapper_prefix(file, sites)
    if not prefix:
        return {name: name for name in file.entries}
    forms = {prefix: "", f"/{prefix.replace('.', '/')}": "/", f"module_{prefix.replace('.', '_')}": "module_"}
    pattern = re.compile(f"^({'|'.join(map(re.escape, forms))})")
    return {name: pattern.sub(lambda found: forms[found[0]], name) for name in file.entries}


class _Graph:
    """The layers of a simulation, and the quantizer sites of their tensors."""

    def __init__(self, model: Any, sites: list[QuantizerSite]) -> None:
        """Find the sites of all tensors; `model`: torch.fx.GraphModule with AIMET's quantized modules."""
        self.model, self.sites = model, sites
        self.inputs = {(site.node, site.key): site for site in sites if site.role == "input"}
        self.tensors = {site.node: site for site in sites if site.role == "output"}  # node -> site of its output
        self.layers: list[Node] = []  # modules that compute something: not the folded batch norms
        for node in model.graph.nodes:
            sources = tensor_arguments(node)
            for i, source in enumerate(sources):
                if (node, i) in self.inputs:
                    self.tensors.setdefault(source, self.inputs[node, i])
            if node.op == "call_module":
                if self.class_name(node) in VALUE_PRESERVING and sources[0] in self.tensors:
                    self.tensors.setdefault(node, self.tensors[sources[0]])
                if self.class_name(node) != "Identity":
                    self.layers.append(node)
        ends = {node.op: node for node in model.graph.nodes}
        self.input_site = self.tensors.get(ends["placeholder"])
        self.output_site = self.tensors.get(ends["output"].args[0])

    def class_name(self, node: Node) -> str:
        """Return the name of a layer's class before AIMET wrapped it."""
        return type(self.model.get_submodule(node.target)).__name__.removeprefix("Quantized")

    def aliases(self) -> Iterator[tuple[str, Node]]:
        """Yield the names that AIMET has for each layer.

        AIMET 1.x put the modules that its preparer made at the top, with the graph node's name: module_add_3, or
        module_backbone_model_layer1_0_relu_1 where AIMET 2 has backbone_model.layer1.0.module_relu_1.
        """
        last_parts = Counter(str(node.target).rpartition(".")[2] for node in self.layers)
        for node in self.layers:
            yield str(node.target), node
            parent, _, name = str(node.target).rpartition(".")
            if parent and name.startswith("module_"):
                yield f"module_{parent.replace('.', '_')}_{name.removeprefix('module_')}", node
                if last_parts[name] == 1:
                    yield name, node


def _layer_names(graph: _Graph) -> Names:
    """Return the sites by "layer input 0" or "layer output 0"."""
    names: dict[str, QuantizerSite | None] = {}
    for alias, node in graph.aliases():
        names[f"{alias} output 0"] = graph.tensors.get(node)
        for i, source in enumerate(tensor_arguments(node)):
            # The network's input is quantized once, whichever layer reads it.
            at_input = graph.input_site if graph.tensors.get(source) is graph.input_site else None
            names[f"{alias} input {i}"] = graph.inputs.get((node, i), at_input)
    return {name: site for name, site in names.items() if site is not None}


def _scope_of(tensor: str) -> str:
    """Return the module's part of a tensor's name: /a/b of /a/b#1.end/Relu_output_0; the name if there is none."""
    scope = re.fullmatch(r"(/.+)/[^/]+_output_\d+", re.sub(r"#[^/]*", "", tensor))
    return scope[1] if scope else tensor


def _tensor_names(graph: _Graph) -> list[Names]:
    """Return the sites by the names of their tensors in each naming scheme."""
    schemes: list[Iterable[tuple[str, Node]]] = [
        ((_scope_name(alias), node) for alias, node in graph.aliases()),
        _numbered(graph, _local_name),
        _numbered(graph, lambda node: _operator_name(graph, node)),
        ((str(node.target), node) for node in graph.layers),  # ffnet.onnx names tensors after layers
    ]
    tensors = graph.tensors
    return [{name: tensors[node] for name, node in dict(scheme).items() if node in tensors} for scheme in schemes]


def _scope_name(layer: str) -> str:
    """Return the name of AIMET's older exporter: the path of modules, as /backbone_model/layer1/layer1.0/relu."""
    parts = layer.split(".")
    return "/" + "/".join(f"{parts[i - 1]}.{part}" if part.isdecimal() else part for i, part in enumerate(parts))


def _local_name(node: Node) -> str:
    """Return the TorchScript exporter's name: the last part of the path, numbered by execution, as /relu_1."""
    *_, parent, name = ("", *str(node.target).split("."))
    return f"/{parent}.{name}" if name.isdecimal() else f"/{name}"


def _operator_name(graph: _Graph, node: Node) -> str:
    """Return the torch.export-based exporter's name: the operator, numbered by execution, as conv2d_4."""
    name = graph.class_name(node)
    return f"upsample_{node.kwargs['mode']}2d" if name == "Interpolate" else OPERATORS.get(name, name)


def _numbered(graph: _Graph, label: Callable[[Node], str]) -> Iterator[tuple[str, Node]]:
    seen: Counter[str] = Counter()
    for node in graph.layers:
        name = label(node)
        yield (f"{name}_{seen[name]}" if seen[name] else name), node
        seen[name] += 1


def _match_ends(graph: _Graph, matched: Names, others: list[str], file: EncodingsFile) -> Names:
    """Match `others`, names that no layer explains, with the network's input and output, whose names vary."""
    numbers = [name for name in others if name.isdecimal()]
    if len(numbers) > 1:
        raise UserError(
            f"--encodings {file.path}: its tensors have numbers for names ({', '.join(numbers[:3])}, ...), so their "
            "layers are unknown. Give the file of the same export that ends in _torch.encodings."
        )
    ends = {graph.input_site: INPUT_NAMES, graph.output_site: (*OUTPUT_NAMES, *numbers)}
    found = {name: site for site, known in ends.items() if site for name in others if name in known}
    rest = [name for name in others if name not in found]
    missing = {*graph.sites} - {*matched.values(), *found.values()}
    # If one name and one site are left, they belong together.
    if len(rest) == 1 and len(missing) == 1 and missing <= ends.keys() and not set(rest[0]) & set("/."):
        found[rest[0]] = missing.pop()
    return found
