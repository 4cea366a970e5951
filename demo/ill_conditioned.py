"""A network that quantizes badly: the same function in FP32, but the ranges of its channels differ widely."""

import copy

import torch

from ffnet.model import BasicBlock, FFNet

LARGEST_EXPONENT = 4  # the factors are powers of two from 2**-4 to 2**4


def ill_conditioned(model: FFNet, seed: int = 0) -> FFNet:
    """Return a copy of the network in whose blocks `bn1` scales every channel and `conv2` scales it back.

    The outputs stay the same to the last bit, because the factors are powers of two. Cross-layer equalization
    (arXiv 1906.04721) makes the ranges similar again.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for block in model.modules():
        if isinstance(block, BasicBlock):
            exponents = torch.randint(
                -LARGEST_EXPONENT, LARGEST_EXPONENT + 1, block.bn1.weight.shape, generator=generator
            )
            factors = torch.exp2(exponents.float())
            with torch.no_grad():
                block.bn1.weight.mul_(factors)
                block.bn1.bias.mul_(factors)
                block.conv2.weight.div_(factors[:, None, None])
    return model
