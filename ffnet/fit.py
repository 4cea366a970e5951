"""Which FFNet variant a checkpoint fits, and the network with its tensors."""

import functools
from dataclasses import replace

import torch

from ffnet.disarm import Refused
from ffnet.model import FFNet, fold_batch_norms_away
from ffnet.variants import VARIANTS, Published

SMOOTHING = "smoothing."
KERNEL_SHAPE = (3, 1, 5, 5)
# What a Gaussian layer does that its class in ffnet.model has no attribute for; a file may hold it as a convolution.
GAUSSIAN = {"kernel_size": 5, "padding": 0, "dilation": 1, "padding_mode": "zeros", "transposed": False}


def build_fitting(variant, contents):
    """The FFNet of `variant` in eval mode with the tensors of a Contents; Refused where they do not fit exactly."""
    state = dict(contents.state)
    if not variant.pre_down and not contents.equalized and shape_of(state.get("smoothing.weight")) == KERNEL_SHAPE:
        del state["smoothing.weight"]  # the file of a pre_down model, whose other weights are this model's
    model = empty_model(variant, contents.equalized, "smoothing.bias" in state)
    compare(variant, state, model.state_dict(), contents)
    check_values(state)
    check_options(model, contents.options)
    model.load_state_dict(state, assign=True)
    return model.eval()


def shape_of(tensor):
    return None if tensor is None else tuple(tensor.shape)


def empty_model(variant, folded, smoothing_bias=False):
    """An FFNet without memory for its tensors, folded as an equalized checkpoint is if asked."""
    with torch.device("meta"):
        model = FFNet(variant)
        if folded:
            fold_batch_norms_away(model)
            if smoothing_bias and variant.pre_down:
                model.smoothing.bias = torch.zeros(KERNEL_SHAPE[0])
    return model


def compare(variant, state, expected, contents):
    """Refused where keys, shapes or dtypes are not the expected ones; names the variants that they do fit."""
    wrong = {
        "lacks": [key for key in expected if key not in state],
        "has besides": [key for key in state if key not in expected],
        "has in another shape": [
            f"{key} {list(state[key].shape)} for {list(expected[key].shape)}"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    }
    if any(wrong.values()):
        names = fitting_variants(contents.state, contents.equalized)
        details = "; ".join(f"{what} {shortened(keys)}" for what, keys in wrong.items() if keys)
        looks = f"this looks like {' or '.join(names)}" if names else "it fits no FFNet variant"
        raise Refused(f"does not fit {variant.name}: {looks}. It {details}")
    for key, tensor in state.items():
        if tensor.dtype != expected[key].dtype:
            raise Refused(f"has {key} as {kind(tensor)}, not {kind(expected[key])}: convert it first")


def shortened(keys, count=3):
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(key[:80] for key in keys[:count]) + more


def kind(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def check_values(state):
    """Refused where a tensor holds NaN or infinity."""
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise Refused(f"has NaN or infinity in {key}: its training or its download failed")


def check_options(model, options):
    """Refused where a layer of a pickled module has other hyper-parameters than the model's."""
    layers = dict(model.named_modules())
    for path, held in options.items():
        layer = layers.get(path)
        for name, value in held.items() if layer is not None else ():
            expected = getattr(layer, name, GAUSSIAN.get(name) if path == "smoothing" else None)
            if expected is not None and pair(value) != pair(expected):
                raise Refused(f"has {path} with {name} {value}, but the model's is {expected}")


def pair(value):
    """(height, width) of a hyper-parameter that may be given as one number for both."""
    return value if isinstance(value, tuple) else (value, value)


def fitting_variants(state, equalized):
    """Names of the variants whose tensors have the keys and shapes of `state`; a file's smoothing kernel speaks for
    pre_down, and its siblings without follow where they may use it too."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if not key.startswith(SMOOTHING)}
    smoothed = "smoothing.weight" in state
    names = [name for name, variant in VARIANTS.items() if shapes == shape_table(bare(variant), equalized)]
    pre_down = [name for name in names if VARIANTS[name].pre_down and smoothed]
    plain = [name for name in names if not VARIANTS[name].pre_down and not (smoothed and equalized)]
    return pre_down + plain


def bare(variant):
    """The variant without what changes no tensor, so that those who share a table build it once."""
    return replace(variant, name="", upsampling="nearest", pre_down=False, release_file="", published=Published())


@functools.cache
def shape_table(variant, folded):
    return {key: tuple(tensor.shape) for key, tensor in empty_model(variant, folded).state_dict().items()}
