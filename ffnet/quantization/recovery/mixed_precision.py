"""Mixed precision: more bits for the most sensitive quantizers, 8 for weights and 16 for activations.

NPUs and ONNX Runtime support these bit widths. Quantizer sites that share a quantizer form a group.
"""

from collections.abc import Callable, Sequence

from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.sensitivity import Sensitivity
from ffnet.quantization.sites import (
    ACTIVATION,
    WEIGHT,
    QuantizerSite,
    SimState,
    quantizer_sites,
    read_state,
    sites_by_quantizer,
)
from ffnet.quantization.weighted_layers import INT32_BITS

RAISED_BITS = {WEIGHT: 8, ACTIVATION: 16}

Groups = Sequence[tuple[QuantizerSite, ...]]


def precision_groups(sim: QuantizationSimModel) -> list[tuple[QuantizerSite, ...]]:
    """Return the sites of each quantizer whose bit width can be raised, in order of execution.

    Activations stay as they are if a weight is too wide for int32 arithmetic with 16-bit activations.
    """
    groups = sites_by_quantizer(quantizer_sites(sim))
    widest_weight = max((sites[0].bit_width for sites in groups if sites[0].kind == WEIGHT), default=0)
    raisable = {WEIGHT: True, ACTIVATION: widest_weight + RAISED_BITS[ACTIVATION] <= INT32_BITS}
    return [sites for sites in groups if raisable[sites[0].kind] and sites[0].bit_width < RAISED_BITS[sites[0].kind]]


def raised_state(sim: QuantizationSimModel, groups: Groups, calibrate: Callable[[], object]) -> SimState:
    """Return the encodings of all groups with raised bits, as `calibrate` finds them; `sim` is changed."""
    for site, *_ in groups:
        quantizer, bits = site.quantizer, RAISED_BITS[site.kind]
        lowest = -(1 << (bits - 1)) if quantizer.qmin < 0 else 0
        quantizer.qmin, quantizer.qmax = lowest, lowest + (1 << bits) - 1
        quantizer.allow_overwrite(True)
    calibrate()
    return read_state(sim)


def mixed_state(low: SimState, high: SimState, raised: Groups) -> SimState:
    """Return the state `low` with the quantizers of the raised groups, and their weights, as in `high`."""
    names = {site.name for sites in raised for site in sites}
    return {name: high[name] if name in names else state for name, state in low.items()}


def rank_groups(groups: Groups, sensitivity: Sensitivity) -> Groups:
    """Return the groups in the order of their most sensitive quantizer, most sensitive first."""
    ranks = {(row.layer, row.kind): rank for rank, row in reversed(list(enumerate(sensitivity.rows)))}
    return sorted(groups, key=lambda sites: min(ranks[site.layer, site.kind] for site in sites))


def raise_until(ranked: Groups, meets: Callable[[Groups], bool]) -> Groups | None:
    """Return the first 1, 2, 4, ... groups, as few as `meets` accepts; None if it does not accept all of them."""
    number = 1
    while number < 2 * len(ranked):
        if meets(ranked[:number]):
            return ranked[:number]
        number *= 2
    return None


def drop_unneeded(raised: Groups, meets: Callable[[Groups], bool]) -> Groups:
    """Drop every group from the result of `raise_until` that `meets` does not need.

    The less sensitive half is tried first, and the halves of a part only if the whole part is needed. No choice is
    tried twice, nor any that `raise_until` tried.
    """
    needed, parts = list(raised), [list(raised)]
    numbers = [0, *(1 << step for step in range((len(raised) - 1).bit_length()))]
    rejected = {tuple(raised[:number]) for number in numbers}
    while parts:
        part = parts.pop()
        rest = [group for group in needed if group not in part]
        if tuple(rest) not in rejected and meets(rest):
            needed = rest
            continue
        rejected.add(tuple(rest))
        if len(part) > 1:
            middle = len(part) // 2
            parts += [part[:middle], part[middle:]]
    return needed
