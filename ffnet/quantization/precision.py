"""Which quantizer sites change their bit width together, and how 8-bit and 16-bit integers relate."""

from aimet_torch.quantsim import QuantizationSimModel

from ffnet.quantization.sites import QuantizerSite, quantizer_sites

WIDE_STEPS = 257  # 16-bit steps in an 8-bit step of the same range: 65535 / 255


def precision_groups(sim: QuantizationSimModel) -> list[tuple[QuantizerSite, ...]]:
    """Return the sites of a simulation in groups that share a quantizer, and so a bit width, in order of execution.

    In AIMET's simulations of FFNets these are the inputs and the output of a concatenation. Any choice of 8 or 16 bits
    per group of activations, and of 4 or 8 bits per group of weights, can be exported and run.
    """
    groups: dict[int, list[QuantizerSite]] = {}
    for site in quantizer_sites(sim):
        groups.setdefault(id(site.quantizer), []).append(site)
    return [tuple(group) for group in groups.values()]
