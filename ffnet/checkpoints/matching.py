"""Match a checkpoint with a variant, and build the network with the checkpoint's tensors."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ffnet.checkpoints.problems import CheckpointProblem
from ffnet.checkpoints.unpickling import CheckpointContents
from ffnet.model import FFNet, remove_batch_norms
from ffnet.system.text import list_names
from ffnet.variants import VARIANTS, Published, Variant

SMOOTHING_SHAPE = (3, 1, 5, 5)
SHOWN_KEYS = 3
COUNTER = "num_batches_tracked"  # of a batch norm; torch before 0.4.1 had none
# Hyperparameters of GaussianConv2D for which it has no attributes; in a file it may be a convolution, which has them.
SMOOTHING = {"kernel_size": 5, "padding": 0, "dilation": 1, "padding_mode": "zeros", "transposed": False}


def match_state_dict(variant: Variant, contents: CheckpointContents) -> FFNet:
    """Return the FFNet of `variant`, in eval mode, with a checkpoint's tensors; refuse what is not the model's."""
    state = with_counters(contents.state_dict)
    smoothing = state.get("smoothing.weight")
    if not variant.pre_down and not contents.equalized and smoothing is not None and smoothing.shape == SMOOTHING_SHAPE:
        del state["smoothing.weight"]  # the file is of a pre_down model, whose other weights are this model's
    model = empty_model(variant, contents.equalized, "smoothing.bias" in state)
    if differences := key_differences(state, model.state_dict()):
        names = " and ".join(matching_variants(contents.state_dict, contents.equalized))
        raise CheckpointProblem(
            f"this checkpoint does not match {variant.name}; it matches {names or 'no FFNet variant'}. {differences}",
            "Name its model with --model-name, or name another checkpoint." if names else "Name another checkpoint.",
        )
    state = converted(state, model.state_dict())
    check_hyperparameters(model, contents.hyperparameters)
    model.load_state_dict(state, assign=True)
    return model.eval()


def empty_model(variant: Variant, folded: bool, smoothing_bias: bool = False) -> FFNet:
    """Return an FFNet without memory for its tensors, and without batch norms if they are `folded`."""
    with torch.device("meta"):
        model = FFNet(variant)
        if folded:
            remove_batch_norms(model)
            if smoothing_bias and model.smoothing is not None:
                model.smoothing.bias = torch.zeros(SMOOTHING_SHAPE[0])
    return model


def key_differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return how the keys and shapes of `state` differ from the expected ones; "" if they do not."""
    differences = {
        "Missing keys": [key for key in expected if key not in state],
        "Unexpected keys": [key for key in state if key not in expected],
        "Other shapes": [
            f"{key} {list(state[key].shape)} instead of {list(expected[key].shape)}"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    }
    return ". ".join(f"{what}: {list_names(keys, SHOWN_KEYS)}" for what, keys in differences.items() if keys)


def with_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict with `num_batches_tracked` for every batch norm, as torch's strict loading completes it.

    No result depends on these counters. torch before 0.4.1 saved none, and others have one dimension.
    """
    completed = dict(state)
    for key in state:
        layer, _, name = key.rpartition(".")
        if name == "running_var":
            counter = completed.setdefault(f"{layer}.{COUNTER}", torch.tensor(0))
            completed[f"{layer}.{COUNTER}"] = counter[0] if counter.shape == (1,) else counter
    return completed


def converted(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the expected dtypes; refuse complex numbers, NaN and infinity, also those beyond float32."""
    tensors = {}
    for key, tensor in state.items():
        if tensor.is_complex():
            raise CheckpointProblem(f"{key} holds complex numbers", "Name another checkpoint.")
        tensors[key] = tensor.to(expected[key].dtype)
        if not torch.isfinite(tensors[key]).all():
            raise CheckpointProblem(f"{key} holds NaN or infinity", "Name another checkpoint, or download it again.")
    return tensors


def converted_dtypes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the dtypes in `state` that `converted` changes to float32."""
    float32 = [tensor for key, tensor in state.items() if key in expected and expected[key].dtype == torch.float32]
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in float32} - {"float32"})


def check_hyperparameters(model: nn.Module, hyperparameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a pickled layer with other hyperparameters than the model's."""
    layers = dict(model.named_modules())
    for path in hyperparameters.keys() & layers.keys():
        for name, value in hyperparameters[path].items():
            expected = getattr(layers[path], name, SMOOTHING.get(name) if path == "smoothing" else None)
            if expected is not None and as_pair(value) != as_pair(expected):
                raise CheckpointProblem(
                    f"{path} has {name} {value}, but the model's is {expected}",
                    "Name the model that it was trained as, or another checkpoint.",
                )


def as_pair(value: Any) -> tuple[Any, ...]:
    """Return (height, width) of a hyperparameter that may be one value for both."""
    return value if isinstance(value, tuple) else (value, value)


def matching_variants(state: Mapping[str, Tensor], equalized: bool) -> list[str]:
    """Return the names of the variants that have the keys and shapes of `state`.

    If the file holds a smoothing kernel, pre_down variants come first; their siblings without pre_down follow, unless
    the file is equalized, because equalization may have rescaled the kernel.
    """
    counted = with_counters(state).items()
    shapes = {key: tuple(tensor.shape) for key, tensor in counted if not key.startswith("smoothing.")}
    smoothed = "smoothing.weight" in state
    names = [name for name, variant in VARIANTS.items() if shapes == shapes_of(without_details(variant), equalized)]
    pre_down = [name for name in names if VARIANTS[name].pre_down and smoothed]
    plain = [name for name in names if not VARIANTS[name].pre_down and not (smoothed and equalized)]
    return pre_down + plain


def without_details(variant: Variant) -> Variant:
    """Return a variant without what changes no tensor, so that variants with the same tensors are built once."""
    return replace(variant, name="", upsampling="nearest", pre_down=False, release_file="", published=Published())


@functools.cache
def shapes_of(variant: Variant, folded: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a variant."""
    return {key: tuple(tensor.shape) for key, tensor in empty_model(variant, folded).state_dict().items()}
