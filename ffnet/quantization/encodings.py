"""Load AIMET's encodings into a simulation, in place of calibration.

Bit widths and symmetry are those of the file, whatever the quantization config says.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.encodings_file import Encoding, EncodingsFile
from ffnet.quantization.rounded_weights import load_rounded_weights
from ffnet.quantization.sites import QuantizerSite, quantizer_sites
from ffnet.quantization.tensor_names import match_encodings, wrapper_prefix
from ffnet.system.errors import UserError
from ffnet.system.text import count, list_names


@dataclass(frozen=True)
class LoadedEncodings:
    """How a file differed from the simulation that it was loaded into."""

    missing: tuple[str, ...]  # names of the quantizers that the file does not cover: still to be calibrated
    unexpected: tuple[str, ...]  # names of the file's entries that match no quantizer: not used
    separated: tuple[str, ...]  # names of quantizers that AIMET 2 shares and that have different encodings in the file
    prefix: str = ""  # of wrappers, such as "module.", that was removed from the file's names
    rounded: tuple[str, ...] = ()  # layers whose weights AdaRound had rounded, read from the export


def load_encodings(sim: QuantizationSimModel, file: EncodingsFile, partial: bool = False) -> LoadedEncodings:
    """Load a file's encodings into an uncalibrated simulation; a later calibration does not change them.

    If the file belongs to an export whose weights AdaRound rounded, these are loaded, too.

    Args:
        sim: changed in place.
        file: the encodings.
        partial: accept missing and unexpected entries; the caller calibrates what is missing.

    Raises:
        UserError: if entries are missing, unexpected, contradictory, or do not suit their quantizer, or if rounded
            weights are missing or belong to another network.
    """
    sites = quantizer_sites(sim)
    found, unexpected = match_encodings(sim, sites, file)
    chosen, missing, separated = _choose(sites, found)
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
            site.container[site.key] = _new_quantizer(site.quantizer)
        _set_encoding(site, encoding, file.path)
    rounded = load_rounded_weights(sim, file.path)
    return LoadedEncodings(tuple(missing), tuple(unexpected), tuple(separated), wrapper_prefix(file), rounded)


def _choose(
    sites: Iterable[QuantizerSite], found: Mapping[QuantizerSite, Encoding]
) -> tuple[dict[QuantizerSite, Encoding], list[str], list[str]]:
    """Return which of the encodings `found` to set, the missing quantizers, and the sites to separate.

    AIMET 2 lets the inputs and the output of a concatenation share a quantizer: one entry is enough for all of them.
    AIMET 1.x gave each its own, and may have found different encodings.
    """
    sharing: dict[int, list[QuantizerSite]] = defaultdict(list)
    for site in sites:
        sharing[id(site.quantizer)].append(site)
    chosen: dict[QuantizerSite, Encoding] = {}
    missing: list[str] = []
    separated: list[str] = []
    for group in sharing.values():
        covered = [site for site in group if site in found]
        rest = [site.name for site in group if site not in found]
        differ = len({found[site] for site in covered}) > 1
        chosen |= {site: found[site] for site in (covered if differ else covered[:1])}
        separated += [site.name for site in covered] if differ else []
        missing += rest[:1] if differ or not covered else []
    return chosen, missing, separated


def _check_suitable(site: QuantizerSite, encoding: Encoding, path: Path) -> None:
    """Raise a UserError if the quantizer of a site can't hold the encoding."""
    quantizer = site.quantizer
    if type(quantizer) is not QuantizeDequantize or quantizer.block_size:
        raise UserError(f"--encodings {path}: {site.name} is {quantizer}, which is not supported. Check --config-file.")
    scales, wanted = len(encoding.scales), math.prod(quantizer.shape)
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
    held = quantizer.get_scale().detach().cpu()
    same_offset = torch.equal(quantizer.get_offset().detach().cpu().double(), offset)
    if not same_offset or not torch.allclose(held, scale.float(), rtol=2**-23, atol=0):
        raise UserError(
            f"--encodings {path}: {site.name} has a scale of {scale.min():g} or an offset that AIMET's float32 can't "
            "hold. Give encodings with larger scales or fewer bits."
        )


def exact_range(scale: torch.Tensor, offset: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 minima and maxima from which AIMET's arithmetic, (max - min) / steps, gives `scale` back.

    Values that are merely rounded may give a neighbour of it, so both ends are moved by a few units in the last place:
    both, because a difference that falls half-way between two floats is rounded to every other one only.
    """
    low = (scale * (offset + encoding.qmin)).float()
    high = (scale * (offset + encoding.qmax)).float()
    best: tuple[torch.Tensor, ...] = torch.full_like(low, torch.inf), low, high
    near, far = (0, 1, -1), (0, 1, -1, 2, -2, 3, -3)  # of the ends of smaller and larger magnitude
    for small, large in itertools.product(near, far):
        upper = torch.where(high >= -low, large, small)
        ends = _moved(low, large + small - upper), _moved(high, upper)
        error = ((ends[1] - ends[0]) / (encoding.qmax - encoding.qmin) - scale.float()).abs()
        best = tuple(torch.where(error < best[0], new, old) for new, old in zip((error, *ends), best, strict=True))
    return best[1], best[2]


def _moved(value: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Return float32 values moved away from zero by so many units in the last place."""
    return (value.view(torch.int32) + units.int()).view(torch.float32)


def _new_quantizer(quantizer: QuantizeDequantize) -> QuantizeDequantize:
    """Return a quantizer of the same kind, not yet calibrated, that is not shared."""
    new = QuantizeDequantize(quantizer.shape, quantizer.qmin, quantizer.qmax, quantizer.symmetric)
    return new.to(next(quantizer.parameters()).device)
