"""Load AIMET's encodings into a simulation, in place of calibration.

Bit widths and symmetry are those of the file, whatever the quantization config says. Encodings hold ranges, but not how
weights are rounded: weights that AdaRound rounded are read from the float network that was exported with the encodings.
"""

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from ffnet.config import FLOAT_MODEL_FILE, MANIFEST_FILE, ROUNDED_LAYERS
from ffnet.quantization.encodings_file import Encoding, EncodingsFile
from ffnet.quantization.sites import WEIGHT, QuantizerSite, quantizer_sites, site_parameter, sites_by_quantizer
from ffnet.quantization.tensor_names import match_encodings, wrapper_prefix
from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8, sha256_of
from ffnet.system.text import count, list_names

TOLERANCE = 1e-3  # quantization steps, for the arithmetic of float32


@dataclass(frozen=True)
class LoadedEncodings:
    """How a file differed from the simulation that it was loaded into."""

    missing: tuple[str, ...]  # names of the quantizers that the file does not cover: still to be calibrated
    unexpected: tuple[str, ...]  # names of the file's entries that match no quantizer: not used
    separated: tuple[str, ...]  # names of quantizers that AIMET 2 shares and that have different encodings in the file
    prefix: str = ""  # prefix of wrappers, such as "module.", that was removed from the file's names
    rounded: tuple[str, ...] = ()  # layers whose weights AdaRound had rounded, read from the export


def load_encodings(sim: QuantizationSimModel, file: EncodingsFile, partial: bool = False) -> LoadedEncodings:
    """Load a file's encodings into an uncalibrated simulation; a later calibration does not change them.

    If the file belongs to an export whose weights AdaRound rounded, these are loaded, too.

    Args:
        sim: Changed in place.
        file: The encodings.
        partial: Accept missing and unexpected entries; the caller calibrates what is missing.

    Raises:
        UserError: If entries are missing, unexpected, contradictory, or do not suit their quantizer, or if rounded
            weights are missing or belong to another network.
    """
    sites = quantizer_sites(sim)
    found, unexpected = match_encodings(sim, sites, file)
    chosen, missing, separated = _choose(sites_by_quantizer(sites), found)
    for site, encoding in chosen.items():
        _check_suitable(site, encoding, file.path)
    if not chosen:
        raise UserError(
            f"--encodings {file.path}: no entry matches this network; the entries are "
            f"{list_names(unexpected)}. Give the encodings of this network."
        )
    if not partial and (missing or unexpected):
        problems = [f"no entry for {count(len(missing), 'quantizer')} ({list_names(missing)})"] if missing else []
        problems += [f"{count(len(unexpected), 'unexpected name')} ({list_names(unexpected)})"] if unexpected else []
        raise UserError(
            f"--encodings {file.path}: the file has {' and '.join(problems)}. Give the encodings of this network and "
            "--config-file, or add --partial-encodings to calibrate what is missing and ignore what is unexpected."
        )
    for site, encoding in chosen.items():
        if site.name in separated:
            site.container[site.key] = copy.deepcopy(site.quantizer)
        _set_encoding(site, encoding, file.path)
    rounded = _load_rounded_weights(sim, file.path)
    prefix = wrapper_prefix(file, sites)
    return LoadedEncodings(tuple(missing), tuple(unexpected), tuple(separated), prefix, rounded)


def _choose(
    groups: Iterable[Sequence[QuantizerSite]], found: Mapping[QuantizerSite, Encoding]
) -> tuple[dict[QuantizerSite, Encoding], list[str], list[str]]:
    """Return which of the encodings `found` to set, the missing quantizers, and the sites to separate.

    If sites share a quantizer, one entry is enough for all of them. AIMET 1.x gave each site its own quantizer, and may
    have found different encodings.
    """
    chosen: dict[QuantizerSite, Encoding] = {}
    missing: list[str] = []
    separated: list[str] = []
    for group in groups:
        covered = [site for site in group if site in found]
        rest = [site.name for site in group if site not in found]
        differ = len({found[site] for site in covered}) > 1
        chosen |= {site: found[site] for site in (covered if differ else covered[:1])}
        separated += [site.name for site in covered] if differ else []
        missing += rest[:1] if differ or not covered else []
    return chosen, missing, separated


def _check_suitable(site: QuantizerSite, encoding: Encoding, path: Path) -> None:
    """Raise a UserError if the quantizer of a site can't hold the encoding."""
    scales, wanted = len(encoding.scales), math.prod(site.quantizer.shape)
    if scales != wanted:
        raise UserError(
            f"--encodings {path}: {site.name} needs {count(wanted, 'scale')}, but the file has {scales}. Give the "
            "encodings of this network, made with the same choice of per-channel or per-tensor quantization."
        )
    if encoding.qmax - encoding.qmin >= 1 << 31:
        problem = f"{site.name} has 32 bits, but AIMET simulates at most 31"
        raise UserError(f"--encodings {path}: {problem}. Give encodings of fewer bits.")


def _set_encoding(site: QuantizerSite, encoding: Encoding, path: Path) -> None:
    """Give the quantizer of a site an encoding that calibration does not overwrite."""
    quantizer = site.quantizer
    quantizer.qmin, quantizer.qmax = encoding.qmin, encoding.qmax
    quantizer.symmetric = encoding.qmin < 0 and not any(encoding.offsets)
    values = torch.tensor([encoding.scales, encoding.offsets], dtype=torch.float64)
    scale, offset = values.reshape(2, *quantizer.shape)
    quantizer.set_range(*exact_range(scale, offset, encoding))
    quantizer.allow_overwrite(False)
    actual = quantizer.get_scale().detach().cpu()
    same_offset = torch.equal(quantizer.get_offset().detach().cpu().double(), offset)
    if not same_offset or not torch.allclose(actual, scale.float(), rtol=2**-23, atol=0):
        raise UserError(
            f"--encodings {path}: {site.name} has a scale of {scale.min():g} or an offset that AIMET's float32 can't "
            "hold. Give encodings with larger scales or fewer bits."
        )


def exact_range(scale: torch.Tensor, offset: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 minima and maxima from which AIMET's arithmetic, (max - min) / steps, gives `scale` back.

    Values that are merely rounded may give a neighbor of it, so both ends are moved by a few units in the last place:
    both, because a difference that falls half-way between two floats is rounded to every other one only.
    """
    low = (scale * (offset + encoding.qmin)).float()
    high = (scale * (offset + encoding.qmax)).float()
    best: tuple[torch.Tensor, ...] = torch.full_like(low, torch.inf), low, high
    near, far = (0, 1, -1), (0, 1, -1, 2, -2, 3, -3)  # units for the ends of smaller and larger magnitude
    for small, large in itertools.product(near, far):
        upper = torch.where(high >= -low, large, small)
        ends = _moved(low, large + small - upper), _moved(high, upper)
        error = ((ends[1] - ends[0]) / (encoding.qmax - encoding.qmin) - scale.float()).abs()
        best = tuple(torch.where(error < best[0], new, old) for new, old in zip((error, *ends), best, strict=True))
    return best[1], best[2]


def _moved(value: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Return float32 values moved away from zero by `units` in the last place."""
    return (value.view(torch.int32) + units.int()).view(torch.float32)


def rounded_layers(sim: QuantizationSimModel, float_network: nn.Module) -> list[str]:
    """Return the layers of a simulation whose weights are not those of its float network."""
    originals = dict(float_network.named_parameters())
    return [
        site.layer
        for site in quantizer_sites(sim)
        if site.kind == WEIGHT and not torch.equal(site_parameter(sim, site), originals[f"{site.layer}.{site.key}"])
    ]


@torch.no_grad()
def _load_rounded_weights(sim: QuantizationSimModel, encodings: Path) -> tuple[str, ...]:
    """Load the rounded weights that belong to an encodings file, and return the names of the rounded layers.

    They are in the float network beside it, if the manifest there lists rounded layers and describes this file. The
    weights of `sim` must have their encodings already.

    Raises:
        UserError: If the manifest is damaged, or if the float network is missing, was changed after the export, or is
            not that of `sim`.
    """
    path = encodings.with_name(MANIFEST_FILE)
    try:
        manifest = json.loads(read_utf8(path))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--encodings {encodings}: {path}, which says whether AdaRound rounded the weights, is damaged ({error}). "
            "Restore it or, if it is not that of an export, move the encodings elsewhere."
        ) from error
    layers = manifest.get(ROUNDED_LAYERS) if _describes(manifest, encodings) else None
    if not layers:
        return ()
    path = encodings.with_name(FLOAT_MODEL_FILE)
    tensors: dict[str, torch.Tensor] = {}
    with contextlib.suppress(Exception):  # whatever onnx raises on a file that it did not write
        if _describes(manifest, path):
            stored = onnx.load(path).graph.initializer
            tensors = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in stored}
    if not tensors or not isinstance(layers, list):
        raise UserError(
            f"--encodings {encodings}: AdaRound rounded the weights of this export, and {path}, which holds them, is "
            "missing or was changed. Keep the files of an export together."
        )
    sites = {site.layer: site for site in quantizer_sites(sim) if site.key == "weight"}
    for layer in map(str, layers):
        site = sites.get(layer)
        rounded = tensors.get(str(site.tensor)) if site else None
        if site is None or rounded is None or not _is_rounded(rounded, site_parameter(sim, site), site.quantizer):
            raise UserError(
                f"--encodings {encodings}: the rounded weights of {layer} in {FLOAT_MODEL_FILE} are not those of this "
                "network. Give the checkpoint and the options of the run that exported them."
            )
        site_parameter(sim, site).copy_(rounded)
    return tuple(layers)


def _describes(manifest: Any, path: Path) -> bool:
    """Return whether a file is as the manifest of its export says."""
    try:
        return manifest["files"][path.name]["sha256"] == sha256_of(path)
    except (KeyError, TypeError):  # the manifest is not that of an export
        return False


def _is_rounded(rounded: torch.Tensor, parameter: torch.Tensor, quantizer: QuantizerBase) -> bool:
    """Return whether a tensor is at most one step from a weight wherever this does not exceed its range."""
    weight, scale, low, high = (
        value.detach().as_subclass(torch.Tensor).cpu()
        for value in (parameter, quantizer.get_scale(), quantizer.get_min(), quantizer.get_max())
    )
    if rounded.shape != weight.shape:
        return False
    return bool(((rounded - weight.clamp(low, high)).abs() / scale <= 1 + TOLERANCE).all())  # also refuses nan
