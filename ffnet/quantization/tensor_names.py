"""Match the names in AIMET's encodings files with the quantizer sites of a simulation.

Files name torch modules or ONNX tensors. Tensor names depend on the exporter; each scheme of names is computed here
from the simulation's graph, whose nodes are in order of execution.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.checkpoints.matching import common_prefix
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
    sim: QuantizationSimModel, sites: Iterable[QuantizerSite], file: EncodingsFile
) -> tuple[dict[QuantizerSite, Encoding], list[str]]:
    """Return the encodings of the sites that a file covers, and the names of its entries that match no site.

    The symmetric 32-bit biases that AIMET 2 derives when it exports match no site and are not among these names.
    """
    graph = _Graph.of(sim.model, list(sites))
    names = {site.tensor: site for site in graph.sites if site.kind == WEIGHT and site.tensor}
    labels = _names_without_prefix(file)
    if file.by_layer:
        names |= _layer_names(graph)
    else:
        labels = {name: _scope_of(label) for name, label in labels.items()}
        # All names of a file come from one exporter.
        schemes = [_known(graph, scheme(graph)) for scheme in (_scopes, _local_names, _operator_names, _own_names)]
        best: Names = max(schemes, key=lambda scheme: sum(label in scheme for label in labels.values()))
        names |= best
    matched = {name: names[label] for name, label in labels.items() if label in names}
    biases = {name for name, _ in sim.model.named_parameters() if name.endswith(".bias")}
    others = [
        name
        for name, encoding in file.entries.items()
        if name not in matched and not (labels[name] in biases and _is_derived(encoding))
    ]
    if not file.by_layer:
        matched |= _match_ends(graph, matched, others, file)
    return _encodings_of_sites(matched, file), [name for name in others if name not in matched]


def _is_derived(encoding: Encoding) -> bool:
    """Return whether a bias has the symmetric 32-bit encoding that AIMET 2 derives."""
    return encoding.qmax == (1 << 31) - 1 and not any(encoding.offsets)


def wrapper_prefix(file: EncodingsFile) -> str:
    """Return the prefixes that wrappers of the network, such as DataParallel, put before the names of its weights.

    In every format the weights are named after their layers. What AIMET's preparer adds to a wrapped network may have
    no prefix, so that activations are not asked.
    """
    return common_prefix([name for name in file.entries if name.endswith((".weight", ".bias"))])


def _names_without_prefix(file: EncodingsFile) -> dict[str, str]:
    """Return each name of a file without the prefix of wrappers, such as "model.", in each form that it takes.

    Layers: model.conv0. Tensors of AIMET's older exporter: /model/conv0. AIMET 1.x's own layers: module_model_relu_1.
    """
    prefix = wrapper_prefix(file)
    if not prefix:
        return {name: name for name in file.entries}
    forms = {prefix: "", f"/{prefix.replace('.', '/')}": "/", f"module_{prefix.replace('.', '_')}": "module_"}
    pattern = re.compile(f"^({'|'.join(map(re.escape, forms))})")
    return {name: pattern.sub(lambda found: forms[found[0]], name) for name in file.entries}


def _encodings_of_sites(matched: Names, file: EncodingsFile) -> dict[QuantizerSite, Encoding]:
    first_names: dict[QuantizerSite, str] = {}
    for name, site in matched.items():
        first = first_names.setdefault(site, name)
        if file.entries[first] != file.entries[name]:
            raise UserError(
                f"--encodings {file.path}: the entries {first!r} and {name!r} describe the same tensor and contradict "
                "each other. Remove one of them."
            )
    return {site: file.entries[name] for site, name in first_names.items()}


@dataclass(frozen=True)
class _Graph:
    model: Any  # torch.fx.GraphModule with AIMET's quantized modules
    sites: list[QuantizerSite]
    inputs: Mapping[tuple[Node, int | str], QuantizerSite]  # (node of the layer, index of the input) -> site
    tensors: Mapping[Node, QuantizerSite]  # node -> site whose encoding holds for its output, if there is one

    @classmethod
    def of(cls, model: Any, sites: list[QuantizerSite]) -> "_Graph":
        inputs = {(site.node, site.key): site for site in sites if site.role == "input"}
        tensors = {site.node: site for site in sites if site.role == "output"}
        graph = cls(model, sites, inputs, tensors)
        for node in model.graph.nodes:
            sources = tensor_arguments(node)
            for i, source in enumerate(sources):
                if (node, i) in inputs:
                    tensors.setdefault(source, inputs[node, i])
            keeps_values = node.op == "call_module" and graph.class_name(node) in VALUE_PRESERVING
            if keeps_values and node not in tensors and sources[0] in tensors:
                tensors[node] = tensors[sources[0]]
        return graph

    def end(self, op: str) -> QuantizerSite | None:
        """Return the site of the network's input ("placeholder") or "output"."""
        (node,) = (node for node in self.model.graph.nodes if node.op == op)
        return self.tensors.get(node.args[0] if op == "output" else node)

    def layers(self) -> list[Node]:
        """Return the nodes of all modules that compute something: not the folded batch norms."""
        nodes = [node for node in self.model.graph.nodes if node.op == "call_module"]
        return [node for node in nodes if not isinstance(self.model.get_submodule(node.target), nn.Identity)]

    def class_name(self, node: Node) -> str:
        """Return the name of a layer's class before AIMET wrapped it."""
        return type(self.model.get_submodule(node.target)).__name__.removeprefix("Quantized")

    def aliases(self) -> dict[Node, list[str]]:
        """Return the names that AIMET has for each layer.

        AIMET 1.x put the modules that its preparer made at the top, with the graph node's name: module_add_3, or
        module_backbone_model_layer1_0_relu_1 where AIMET 2 has backbone_model.layer1.0.module_relu_1.
        """
        nodes = self.layers()
        last_parts = Counter(str(node.target).rpartition(".")[2] for node in nodes)
        found = {}
        for node in nodes:
            parent, _, name = str(node.target).rpartition(".")
            found[node] = [str(node.target)]
            if parent and name.startswith("module_"):
                found[node].append(f"module_{parent.replace('.', '_')}_{name.removeprefix('module_')}")
                found[node] += [name] * (last_parts[name] == 1)
        return found


def _layer_names(graph: _Graph) -> Names:
    """Return the sites by "layer input 0" or "layer output 0"."""
    names: dict[str, QuantizerSite | None] = {}
    network_input = graph.end("placeholder")
    for node, aliases in graph.aliases().items():
        found = {"output 0": graph.tensors.get(node)}
        for i, source in enumerate(tensor_arguments(node)):
            # The network's input is quantized once, whichever layer reads it.
            at_input = network_input if graph.tensors.get(source) is network_input else None
            found[f"input {i}"] = graph.inputs.get((node, i), at_input)
        names |= {f"{alias} {tensor}": site for alias in aliases for tensor, site in found.items()}
    return {name: site for name, site in names.items() if site is not None}


def _scope_of(tensor: str) -> str:
    """Return the module's part of a tensor's name: /a/b of /a/b#1.end/Relu_output_0; the name if there is none."""
    scope = re.fullmatch(r"(/.+)/[^/]+_output_\d+", re.sub(r"#[^/]*", "", tensor))
    return scope[1] if scope else tensor


def _known(graph: _Graph, nodes: Iterable[tuple[str, Node]]) -> Names:
    """Return the sites by the names of their nodes."""
    return {name: graph.tensors[node] for name, node in dict(nodes).items() if node in graph.tensors}


def _scopes(graph: _Graph) -> Iterator[tuple[str, Node]]:
    """Yield AIMET's older exporter's names: the path of modules, as /backbone_model/layer1/layer1.0/relu."""
    for node, aliases in graph.aliases().items():
        for alias in aliases:
            parts = alias.split(".")
            scope = "/".join(f"{parts[i - 1]}.{part}" if part.isdecimal() else part for i, part in enumerate(parts))
            yield f"/{scope}", node


def _local_names(graph: _Graph) -> Iterator[tuple[str, Node]]:
    """Yield the TorchScript exporter's names: the last part of the path, numbered by execution, as /relu_1."""

    def local(node: Node) -> str:
        *_, parent, name = ("", *str(node.target).split("."))
        return f"/{parent}.{name}" if name.isdecimal() else f"/{name}"

    return _numbered(graph, local)


def _operator_names(graph: _Graph) -> Iterator[tuple[str, Node]]:
    """Yield the torch.export-based exporter's names: the operator, numbered by execution, as conv2d_4."""

    def operator(node: Node) -> str:
        name = graph.class_name(node)
        return f"upsample_{node.kwargs['mode']}2d" if name == "Interpolate" else OPERATORS.get(name, name)

    return _numbered(graph, operator)


def _own_names(graph: _Graph) -> Iterator[tuple[str, Node]]:
    """Yield the names that ffnet.onnx.export writes: those of the layers."""
    return ((str(node.target), node) for node in graph.layers())


def _numbered(graph: _Graph, label: Callable[[Node], str]) -> Iterator[tuple[str, Node]]:
    seen: Counter[str] = Counter()
    for node in graph.layers():
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
    ends = {graph.end("placeholder"): INPUT_NAMES, graph.end("output"): (*OUTPUT_NAMES, *numbers)}
    found = {name: site for site, known in ends.items() if site for name in others if name in known}
    rest = [name for name in others if name not in found]
    missing = {*graph.sites} - {*matched.values(), *found.values()}
    # By elimination, if nothing else is open: one name without a site, and one site without a name.
    if len(rest) == 1 and len(missing) == 1 and missing <= ends.keys() and not set(rest[0]) & set("/."):
        found[rest[0]] = missing.pop()
    return found
