"""Match a checkpoint with a variant, and build the network with the checkpoint's tensors."""

import functools
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ffnet.checkpoints.unpickling import CheckpointContents, CheckpointProblem
from ffnet.model import FFNet, remove_batch_norms
from ffnet.system.text import list_names
from ffnet.variants import VARIANTS, Variant

BATCH_COUNTER = "num_batches_tracked"  # a buffer of batch norms; torch before 0.4.1 had none
SMOOTHING_SHAPE = (3, 1, 5, 5)
SHOWN_KEYS = 3


def without_prefix(contents: CheckpointContents) -> CheckpointContents:
    """Remove what a wrapper of the network puts before its keys, and the keys of other parts of the wrapper."""
    found = (re.match(r"(.+?\.)?backbone_model\.", key) for key in contents.state_dict)
    prefixes = Counter(match[1] or "" for match in found if match)
    prefix = max(prefixes, key=lambda prefix: ("ema" not in prefix, prefixes[prefix]), default="")
    if not prefix:
        return contents
    others = [key for key in contents.state_dict if not key.startswith(prefix)]
    ignored = f"the keys, and the others were ignored: {list_names([*map(repr, others)], SHOWN_KEYS)}"
    note = f"The prefix {prefix!r}, which a wrapper adds, was removed from {ignored if others else 'every key'}."

    def stripped(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}

    return replace(
        contents,
        state_dict=stripped(contents.state_dict),
        hyperparameters=stripped(contents.hyperparameters),
        notes=(*contents.notes, note),
    )


def match_state_dict(variant: Variant, contents: CheckpointContents) -> FFNet:
    """Return the FFNet of `variant`, in eval mode, with a checkpoint's tensors.

    Raises:
        CheckpointProblem: If keys, shapes, hyperparameters or values do not match.
    """
    state = with_counters(contents.state_dict)
    smoothing = state.get("smoothing.weight")
    if not variant.pre_down and not contents.equalized and smoothing is not None and smoothing.shape == SMOOTHING_SHAPE:
        del state["smoothing.weight"]  # the file is for a pre_down model, whose other weights are this model's
    model = empty_model(variant, contents.classes, contents.equalized, "smoothing.bias" in state)
    if differences := key_differences(state, model.state_dict()):
        names = " and ".join(matching_variants(contents))
        raise CheckpointProblem(
            f"this checkpoint does not match {variant.name}; it matches {names or 'no FFNet variant'}. {differences}",
            "Name its model with --model-name, or name another checkpoint." if names else "Name another checkpoint.",
        )
    state = converted(state, model.state_dict())
    check_hyperparameters(model, contents.hyperparameters)
    model.load_state_dict(state, assign=True)
    return model.eval()


def empty_model(variant: Variant, classes: int, folded: bool, smoothing_bias: bool = False) -> FFNet:
    """Return an FFNet without memory for its tensors, and without batch norms if they are `folded`."""
    with torch.device("meta"):
        model = FFNet(variant, classes)
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
    """Return a state_dict with `num_batches_tracked` for every batch norm: torch's strict loading needs none either."""
    norms = [key.removesuffix("running_var") for key in state if key.endswith(".running_var")]
    return {norm + BATCH_COUNTER: torch.tensor(0) for norm in norms} | dict(state)


def converted(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the expected dtypes; refuse complex numbers, NaN and infinity, also those beyond float32."""
    tensors = {}
    for key, tensor in state.items():
        tensors[key] = tensor if tensor.is_complex() else tensor.to(expected[key].dtype)
        if tensor.is_complex() or not torch.isfinite(tensors[key]).all():
            raise CheckpointProblem(f"{key} holds NaN, infinity or complex numbers", "Name another checkpoint.")
    return tensors


def check_hyperparameters(model: nn.Module, hyperparameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a pickled layer with other hyperparameters than the model's."""
    layers = dict(model.named_modules())
    for path, values in hyperparameters.items():
        for name, value in values.items():
            expected = getattr(layers.get(path), name, None)
            if expected is not None and value not in (expected, (expected, expected)):
                raise CheckpointProblem(
                    f"{path} has {name} {reprlib.repr(value)}, but the model's is {expected!r}",
                    "Name the model that it was trained as, or another checkpoint.",
                )


def matching_variants(contents: CheckpointContents, names: Iterable[str] | None = None) -> list[str]:
    """Return the variants, of those in `names` or of all, that have the keys and shapes of a checkpoint.

    A smoothing kernel does not matter for variants without pre_down, unless the file is equalized, because equalization
    may have rescaled the kernel.
    """
    counted = with_counters(contents.state_dict).items()
    shapes = {key: tuple(tensor.shape) for key, tensor in counted if not key.startswith("smoothing.")}
    smoothed = "smoothing.weight" in contents.state_dict
    variants = [VARIANTS[name] for name in (VARIANTS if names is None else names)]
    possible = [v for v in variants if (smoothed if v.pre_down else not (smoothed and contents.equalized))]
    return [v.name for v in possible if shapes == shapes_of(v, contents.classes, contents.equalized)]


@functools.cache
def shapes_of(variant: Variant, classes: int, folded: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a variant, without its smoothing kernel's."""
    state = empty_model(variant, classes, folded).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.startswith("smoothing.")}
