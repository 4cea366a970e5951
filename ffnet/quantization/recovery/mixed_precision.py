"""Mixed precision: more bits for the quantizers that cost most accuracy.

Weights get 8 bits and activations 16, which NPUs and ONNX Runtime take. Quantizers that must change together form a
group.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.bias_ranges import MOST_BITS
from ffnet.quantization.sensitivity import Sensitivity
from ffnet.quantization.sites import ACTIVATION, WEIGHT, QuantizerSite, quantizer_sites
from ffnet.quantization.state import SimState, read_state

RAISED_BITS = {WEIGHT: 8, ACTIVATION: 16}


@dataclass(frozen=True, eq=False)
class PrecisionGroup:
    """Quantizers that get more bits together."""

    sites: tuple[QuantizerSite, ...]

    @property
    def kind(self) -> str:
        """WEIGHT or ACTIVATION."""
        return self.sites[0].kind

    @property
    def bits(self) -> int:
        """Number of bits if they are raised."""
        return RAISED_BITS[self.kind]


Groups = Sequence[PrecisionGroup]


def precision_groups(sim: QuantizationSimModel) -> list[PrecisionGroup]:
    """Return the groups whose bit width can be raised, in order of execution."""
    sharing: dict[int, list[QuantizerSite]] = defaultdict(list)
    for site in quantizer_sites(sim):
        sharing[id(site.quantizer)].append(site)
    groups = [PrecisionGroup(tuple(sites)) for sites in sharing.values()]
    widest_weight = max((group.sites[0].bit_width for group in groups if group.kind == WEIGHT), default=0)
    raisable = {WEIGHT: True, ACTIVATION: widest_weight + RAISED_BITS[ACTIVATION] <= MOST_BITS}
    return [group for group in groups if raisable[group.kind] and group.sites[0].bit_width < group.bits]


def raised_state(sim: QuantizationSimModel, groups: Groups, calibrate: Callable[[], object]) -> SimState:
    """Return the encodings of all groups with raised bits, as `calibrate` finds them; `sim` is changed."""
    for group in groups:
        for site in group.sites:
            quantizer = site.quantizer
            lowest = -(1 << (group.bits - 1)) if quantizer.qmin < 0 else 0
            quantizer.qmin, quantizer.qmax = lowest, lowest + (1 << group.bits) - 1
            quantizer.allow_overwrite(True)
    calibrate()
    return read_state(sim)


def mixed_state(low: SimState, high: SimState, raised: Groups) -> SimState:
    """Return the state `low` with the quantizers of the raised groups, and their weights, as in `high`."""
    names = {site.name for group in raised for site in group.sites}
    return {name: high[name] if name in names else state for name, state in low.items()}


def rank_groups(groups: Groups, sensitivity: Sensitivity) -> list[PrecisionGroup]:
    """Return the groups, that of the most sensitive quantizer first, as the sensitivity analysis ranks them."""
    ranks = {(row.layer, row.kind): rank for rank, row in reversed(list(enumerate(sensitivity.rows)))}
    return sorted(groups, key=lambda group: min(ranks[site.layer, site.kind] for site in group.sites))


def raise_until(ranked: Groups, meets: Callable[[Groups], bool]) -> Groups | None:
    """Raise the first 1, 2, 4, ... groups until `meets` accepts them; return these, or None if all do not suffice."""
    number = 1
    while number < 2 * len(ranked):
        if meets(ranked[:number]):
            return ranked[:number]
        number *= 2
    return None


def lower_again(raised: Groups, meets: Callable[[Groups], bool]) -> Groups:
    """Return what of the groups that `raise_until` returned is left after lowering all that `meets` does not need.

    The least sensitive ones, at the end, are lowered first. Half of them are tried together, and their halves only if
    that fails. No choice is tried twice, nor those that `raise_until` tried.
    """
    kept = list(raised)
    parts = [list(raised)]
    numbers = [0, *(1 << step for step in range((len(raised) - 1).bit_length()))]
    rejected = {tuple(raised[:number]) for number in numbers}
    while parts:
        part = parts.pop()
        rest = [group for group in kept if group not in part]
        if tuple(rest) not in rejected and meets(rest):
            kept = rest
            continue
        rejected.add(tuple(rest))
        if len(part) > 1:
            middle = len(part) // 2
            parts += [part[:middle], part[middle:]]
    return kept
