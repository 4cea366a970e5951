"""Under which names AIMET's files know the quantizers of a simulated network.

By torch module, or by ONNX tensor; the tensors' names depend on the exporter, and each way of naming is worked out here
from the simulation's graph, whose nodes stand in the order of execution.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ffnet.errors import UserError

MOVERS = ("Pad", "MaxPool2d", "Interpolate")  # layers whose output needs no encoding but its input's
INPUT_NAMES = ("image", "images", "input", "inputs", "input.1", "input_1", "x", "x.1", "t.1", "data")
OUTPUT_NAMES = ("logits", "output", "outputs", "output_1", "out")  # and numbers


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a quantizer is plugged in."""

    name: str  # as in sim.model.named_modules()
    container: Any  # the module list or dict that holds it
    key: Any  # its index or key there
    quantizer: Any


def slots(sim):
    """The Slot of every quantizer that is switched on; several where AIMET shares one."""
    found = []
    for layer, module in sim.model.named_modules():
        if not hasattr(module, "param_quantizers"):
            continue
        for kind in ("param_quantizers", "input_quantizers", "output_quantizers"):
            container = getattr(module, kind)
            items = container.items() if kind == "param_quantizers" else enumerate(container)
            found += [Slot(f"{layer}.{kind}.{key}", container, key, q) for key, q in items if q is not None]
    return found


def match(sim, slots, encodings):
    """({slot name: Encoding}, names of entries that fit no slot); UserError where two entries of a slot differ.

    The 32-bit biases that AIMET 2 derives when it exports belong to no slot and are no surplus either.
    """
    graph = _graph(sim.model, slots)
    names = {slot.name.replace(".param_quantizers.", "."): slot.name for slot in slots}
    if encodings.by_layer:
        names |= _layer_names(graph)
        labels = {name: name for name in encodings.entries}
    else:
        labels = {name: _scope_of(name) for name in encodings.entries}
        # All of a file's names are of one exporter.
        ways = [way(graph) for way in (_scoped_names, _local_names, _node_names, _own_names)]
        names |= max(ways, key=lambda way: sum(label in way for label in labels.values()))
    slot_of = {name: names[label] for name, label in labels.items() if label in names}
    biases = {name for name, _ in sim.model.named_parameters() if name.endswith(".bias")}
    others = [name for name in labels if name not in slot_of]
    others = [name for name in others if not (name in biases and _is_derived(encodings.entries[name]))]
    if not encodings.by_layer:
        slot_of |= _ends(graph, slot_of, others, encodings.path)
    return _values(slot_of, encodings), [name for name in others if name not in slot_of]


def _values(slot_of, encodings):
    """{slot name: Encoding} of {entry name: slot name}."""
    origin = {}
    for name, slot in slot_of.items():
        first = origin.setdefault(slot, name)
        if encodings.entries[first] != encodings.entries[name]:
            raise UserError(
                f"--encodings {encodings.path}: {first!r} and {name!r} are of the same tensor and contradict each "
                "other; take one of them out"
            )
    return {slot: encodings.entries[name] for slot, name in origin.items()}


def _is_derived(encoding):
    """Whether this is a bias as AIMET 2 exports it: 32 bits, the scale that of the input times the weight's."""
    return encoding.qmax == (1 << 31) - 1 and not any(encoding.offsets)


@dataclass(frozen=True)
class _Graph:
    model: Any  # torch.fx.GraphModule
    taken: frozenset  # names of slots
    tensors: dict  # node -> name of the slot whose encoding holds for its output, where there is one

    def end(self, op):
        """The slot of the network's input ("placeholder") or output, or None."""
        (node,) = [node for node in self.model.graph.nodes if node.op == op]
        return self.tensors.get(node.args[0] if op == "output" else node)


def _graph(model, slots):
    taken = frozenset(slot.name for slot in slots)
    names = {node: f"{node.target}.output_quantizers.0" for node in model.graph.nodes}
    tensors = {node: name for node, name in names.items() if name in taken}
    for node in model.graph.nodes:
        for i, source in enumerate(_sources(node)):
            name = f"{node.target}.input_quantizers.{i}"
            if name in taken:
                tensors.setdefault(source, name)
        if node.op == "call_module" and node not in tensors and _kind(model, node) in ("Identity", *MOVERS):
            source = _sources(node)[0]
            if source in tensors:
                tensors[node] = tensors[source]
    return _Graph(model, taken, tensors)


def _sources(node):
    return [argument for argument in node.args if isinstance(argument, torch.fx.Node)]


def _layers(model):
    """The nodes that compute something: all modules but the folded batch norms."""
    nodes = [node for node in model.graph.nodes if node.op == "call_module"]
    return [node for node in nodes if not isinstance(model.get_submodule(node.target), torch.nn.Identity)]


def _kind(model, node):
    """The class of the layer before AIMET wrapped it, as text."""
    return type(model.get_submodule(node.target)).__name__.removeprefix("Quantized")


def _aliases(model):
    """{node: names under which AIMET knows the layer}.

    AIMET 1.x put the modules that its preparer made at the top, with the graph node's name: module_add_3, or
    module_backbone_model_layer1_0_relu_1 where AIMET 2 has backbone_model.layer1.0.module_relu_1.
    """
    nodes = _layers(model)
    last = Counter(node.target.rpartition(".")[2] for node in nodes)
    found = {}
    for node in nodes:
        parent, _, name = node.target.rpartition(".")
        found[node] = [node.target]
        if parent and name.startswith("module_"):
            found[node].append(f"module_{parent.replace('.', '_')}_{name.removeprefix('module_')}")
            found[node] += [name] * (last[name] == 1)
    return found


def _layer_names(graph):
    """{"layer input 0" or "layer output 0": slot name}."""
    names = {}
    graph_input = graph.end("placeholder")
    for node, aliases in _aliases(graph.model).items():
        places = {"output 0": graph.tensors.get(node)}
        for i, source in enumerate(_sources(node)):
            name = f"{node.target}.input_quantizers.{i}"
            # The network's input: whichever layer reads it, it is quantized once.
            at_input = graph_input if graph.tensors.get(source) == graph_input else None
            places[f"input {i}"] = name if name in graph.taken else at_input
        names |= {f"{alias} {place}": slot for alias in aliases for place, slot in places.items()}
    return _known(names)


def _scope_of(tensor):
    """The module's part of an ONNX tensor's name: /a/b of /a/b#1.end/Relu_output_0; the name if it has no such part."""
    scope = re.fullmatch(r"(/.+)/[^/]+_output_\d+", re.sub(r"#[^/]*", "", tensor))
    return scope[1] if scope else tensor


def _scoped_names(graph):
    """AIMET's older exporter: the path of modules, as /backbone_model/layer1/layer1.0/relu."""
    names = {}
    for node, aliases in _aliases(graph.model).items():
        for alias in aliases:
            parts = alias.split(".")
            scope = "/".join(f"{parts[i - 1]}.{part}" if part.isdecimal() else part for i, part in enumerate(parts))
            names[f"/{scope}"] = graph.tensors.get(node)
    return _known(names)


def _local_names(graph):
    """torch's TorchScript exporter: the last part of the path, numbered in the order of execution, as /relu_1."""

    def local(node):
        *_, parent, name = ("", *node.target.split("."))
        return f"/{parent}.{name}" if name.isdecimal() else f"/{name}"

    return _numbered(graph, local)


def _node_names(graph):
    """torch's exporter by torch.export: the operator, numbered in the order of execution, as conv2d_4."""
    operators = {"ReLU": "relu", "Conv2d": "conv2d", "GaussianConv2D": "conv2d", "Add": "add", "Concat": "cat",
                 "Pad": "pad", "MaxPool2d": "max_pool2d"}  # fmt: skip

    def operator(node):
        kind = _kind(graph.model, node)
        return f"upsample_{node.kwargs['mode']}2d" if kind == "Interpolate" else operators.get(kind, kind)

    return _numbered(graph, operator)


def _own_names(graph):
    """ffnet.export: the layer's own name."""
    return _known({node.target: graph.tensors.get(node) for node in _layers(graph.model)})


def _numbered(graph, label):
    count = Counter()
    names = {}
    for node in _layers(graph.model):
        base = label(node)
        names[f"{base}_{count[base]}" if count[base] else base] = graph.tensors.get(node)
        count[base] += 1
    return _known(names)


def _known(names):
    return {label: slot for label, slot in names.items() if slot is not None}


def _ends(graph, slot_of, others, path):
    """{name: slot name} of the network's input and output, which are called what whoever exported them liked.

    `others`: names of the file that no layer explains. UserError where several are numbers, which nothing explains.
    """
    numbers = [name for name in others if name.isdecimal()]
    if len(numbers) > 1:
        raise UserError(
            f"--encodings {path}: its tensors are numbers ({', '.join(numbers[:3])}, ...), from an exporter that does "
            "not say which layer they belong to; give the file of the same export that ends in _torch.encodings"
        )
    ends = {graph.end("placeholder"): INPUT_NAMES, graph.end("output"): (*OUTPUT_NAMES, *numbers)}
    found = {name: slot for slot, known in ends.items() if slot for name in others if name in known}
    rest = [name for name in others if name not in found]
    missing = graph.taken - {*slot_of.values(), *found.values()}
    # By elimination, and only if nothing else is open: one name without a place, one place without a name.
    if len(rest) == 1 and len(missing) == 1 and missing <= ends.keys() and not set(rest[0]) & set("/."):
        found[rest[0]] = next(iter(missing))
    return found
