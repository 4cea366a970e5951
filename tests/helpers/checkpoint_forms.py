"""Makes files of the published forms out of our own model: pickles that name classes which are not installed here.

What is written is what AIMET 1.23's preparer under torch 1.9 wrote: protocol 2, the attributes that modules had then,
and a traced network as a call of `reduce_graph_module` with its Python text. Nothing of it is ever loaded back here.
"""

import copyreg
import pickle
import types
from collections import OrderedDict

import torch
from torch import fx, nn

from ffnet.model import GaussianConv2D

HOOKS = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class Name:
    """A global that the pickle names; there is no such thing here."""

    def __init__(self, text):
        self.text = text

    def __call__(self):
        raise NotImplementedError


class Add(nn.Module):
    pass


class Concat(nn.Module):
    pass


class Interpolate(nn.Module):
    pass


FUNCTIONS = {"add": Add, "cat": Concat, "interpolate": Interpolate}
NAMES = {GaussianConv2D: Name("models.ffnet_blocks GaussianConv2D")} | {
    kind: Name(f"aimet_torch.elementwise_ops {kind.__name__}") for kind in FUNCTIONS.values()
}
GRAPH_MODULE = Name("torch.fx.graph_module reduce_graph_module")
GETATTR, FUNCTIONS_CLASS = Name("__builtin__ getattr"), Name("torch._C _VariableFunctionsClass")


class ConvFunction:
    """`torch.conv2d` as a module's attribute, which pickles as getattr(torch._C._VariableFunctionsClass, "conv2d")."""


class Pickler(pickle._Pickler):
    """Writes modules with the attributes that they had in torch 1.9, under the names in NAMES."""

    def reducer_override(self, obj):
        if isinstance(obj, ConvFunction):
            return GETATTR, (FUNCTIONS_CLASS, "conv2d")
        if isinstance(obj, fx.GraphModule):
            return GRAPH_MODULE, (attributes(obj) | {"_code": obj.code}, "import torch\nfrom torch import device")
        if isinstance(obj, nn.Module):
            return copyreg.__newobj__, (NAMES.get(type(obj), type(obj)),), attributes(obj)
        return NotImplemented

    def save_reduce(self, func, args, state=None, *rest, obj=None):
        if func is not copyreg.__newobj__:
            super().save_reduce(func, args, state, *rest, obj=obj)
            return
        self.save(args[0])
        self.save(())
        self.write(pickle.NEWOBJ)
        self.memoize(obj)
        self.save(state)
        self.write(pickle.BUILD)

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name) and id(obj) not in self.memo:
            self.write("c{}\n{}\n".format(*obj.text.split()).encode())
            self.memoize(obj)
        else:
            super().save(obj, save_persistent_id)


def attributes(module):
    """A module's state as torch 1.9 pickled it."""
    state = {"training": module.training, "_is_full_backward_hook": None}
    state |= {name: OrderedDict() for name in HOOKS}
    state |= {name: OrderedDict(getattr(module, name)) for name in ("_parameters", "_buffers", "_modules")}
    state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    kinds = (bool, int, float, str, tuple, torch.Tensor)
    plain = {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name[0] != "_"}
    if isinstance(module, GaussianConv2D):
        plain["conv"] = ConvFunction()
    return state | plain


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, GaussianConv2D) or super().is_leaf_module(module, name)


def prepared(model):
    """A traced copy of `model` in which additions, concatenations and resizings are modules, as the preparer has it."""
    graph = Tracer().trace(model)
    traced = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        kind = FUNCTIONS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if kind is not None:
            name = f"module_{node.name}"
            traced.add_module(name, kind())
            node.op, node.target = "call_module", name
    traced.recompile()
    return traced


def save_pickled(module, path):
    """Writes a whole pickled module as torch 1.9 did."""
    torch.save(
        module,
        path,
        pickle_module=types.SimpleNamespace(__name__="tests.helpers.checkpoint_forms", Pickler=Pickler),
        pickle_protocol=2,
    )


def randomize(model, seed=0):
    """Gives each tensor of `model` values of its own, such that logits stay finite; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif key.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.dim() == 1:
            tensor.uniform_(-0.5, 0.5, generator=generator)
    return model


def folded(model):
    """The tensors of `model` with each batch norm folded into the convolution before it, by torch's own arithmetic."""
    state, conv = {}, None
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            conv = name, layer
            state |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        elif isinstance(layer, GaussianConv2D):
            state |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        elif isinstance(layer, nn.BatchNorm2d):
            fused = nn.utils.fusion.fuse_conv_bn_eval(conv[1], layer)
            state |= {f"{conv[0]}.{key}": tensor for key, tensor in fused.state_dict().items()}
    return state


def same(state, expected):
    """Return whether a state_dict has the expected keys, values and dtypes, in contiguous tensors."""
    return state.keys() == expected.keys() and all(
        state[key].dtype == t.dtype and torch.equal(state[key], t) and state[key].is_contiguous()
        for key, t in expected.items()
    )


def logits(model, seed=1):
    image = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(image)
