"""Prefixes that wrappers of a network put before the names of its layers.

A state_dict of `DataParallel(network)` has `module.conv.weight` in place of `conv.weight`, and AIMET names the layers
of a wrapped network likewise. Wrappers may be nested.
"""

from collections.abc import Collection

WRAPPER_PREFIXES = (
    "module.",  # DataParallel, DistributedDataParallel, AveragedModel, timm's ModelEma
    "_orig_mod.",  # torch.compile
    "_forward_module.",  # Lightning Fabric
    "_fsdp_wrapped_module.",  # FullyShardedDataParallel
    "model.",  # modules of Lightning and of other trainers, which hold the network under one of these names
    "_model.",
    "net.",
    "network.",
    "ema_model.",
    "model_ema.",
)


def common_prefix(names: Collection[str]) -> str:
    """Return the prefixes of wrappers that all names share, such as "module._orig_mod."; "" if there are none."""
    prefix = ""
    while longer := next((prefix + part for part in WRAPPER_PREFIXES if _all_have(names, prefix + part)), ""):
        prefix = longer
    return prefix


def _all_have(names: Collection[str], prefix: str) -> bool:
    """Return whether there are names, and all of them go on after `prefix`."""
    return bool(names) and all(name.startswith(prefix) and name != prefix for name in names)
